//! How a group norm is cut: spans of groups, chunks of pixels, and the threads that have them.

/// What the table of norms looks at.
#[derive(Clone, Copy, Debug)]
pub struct Whole {
    /// Images.
    pub batch: u32,
    /// Pixels of an image.
    pub pixels: u32,
    /// .. and of a line.
    pub wide: u32,
    /// Channels / 4 of both sources.
    pub c4: u32,
    /// Channels of a group.
    pub group: u32,
    /// Channels / 4 of a span: of the fewest groups that have whole groups of four channels.
    pub span4: u32,
    /// Are the statistics the image's own?
    pub own: bool,
    /// Invocations of a workgroup, at most.
    pub threads: u32,
    /// Does x come as shares of a product?
    pub ends: bool,
    /// Pixels that a thread ends together: of Winograd's tiles, if x comes in such; else 1.
    pub tiled: u32,
    /// Pixels of the tiles whose transforms are stored; 0 where the norm itself is.
    pub to_tiles: u32,
    /// Bytes of four channels of the norm.
    pub bytes: u32,
    /// Bytes of workgroup memory.
    pub memory: u32,
}

/// Threads of a workgroup that has a chunk of an image, or norms a part of it.
pub(super) const THREADS: u32 = 256;
/// .. of one that has a whole image, at most.
const MOST_THREADS: u32 = 1024;
/// Pixels that a thread holds, at most: of an image, and of a chunk.
pub(super) const HELD: u32 = 8;
const MOST_HELD: u32 = 16;
/// Groups of four channels that a workgroup norms alone as fast as many do in two dispatches.
pub(super) const ALONE: u32 = 2560;
/// Bytes of a part of an image in workgroup memory, where its transforms are stored: some workgroups are to fit beside each other.
const PART: u32 = 16 << 10;
/// Chunks that every workgroup merges for itself, at most: more are merged once, by a dispatch of their own.
pub(super) const MOST_CHUNKS: u32 = 64;
/// Workgroups that there should be: some for each of a large GPU's multiprocessors.
const FILLED: u64 = 512;
/// Pixels of a thread that norms, at most: its loads are under way together.
pub(super) const APPLIED: u32 = 4;

impl Whole {
    /// Do spans suit workgroups, and have four channels two groups at most?
    pub(super) fn spans(&self) -> bool {
        self.group >= 3 && self.wide4() <= 64 && self.batch <= 65_535
    }

    /// Channels / 4 of a span, or of two where that makes rows of whole pieces of 32 bytes.
    pub(super) fn wide4(&self) -> u32 {
        let doubled = self.span4 % 2 == 1 && self.c4.is_multiple_of(2 * self.span4);
        self.span4 << u32::from(doubled)
    }

    /// Is there room for a whole image of a span, where its transforms are stored?
    pub(super) fn holds(&self) -> bool {
        // Each thread's first pixels and sums, and the groups'.
        let sums = 20 * one_chunk(self).0 + 2_112;
        self.to_tiles == 0 || sums + self.bytes * self.pixels * self.span4 <= self.memory
    }

    /// Is there, for a part of an image?
    pub(super) fn holds_part(&self) -> bool {
        8 * MOST_CHUNKS * 8 + 64 + self.bytes * held(self) <= self.memory
    }

    /// Pixels of a thread, of so many that have a column of four channels each.
    fn each(&self, lines: u32) -> u32 {
        self.tiled * (self.pixels / self.tiled).div_ceil(lines)
    }
}

/// Threads of a workgroup that has all pixels of a span, and how many each has.
pub(super) fn one_chunk(d: &Whole) -> (u32, u32) {
    // Sixteen products in registers leave no room for more threads.
    let most = d.threads.min(if d.tiled > 2 { MOST_THREADS / 4 * 3 } else { MOST_THREADS });
    let each = |threads: u32| d.each(threads / d.span4);
    if d.ends {
        // As many as have something to do at once: each has many shares to wait for. At least one for each channel, and for each part of groups of three.
        let units = d.pixels / d.tiled;
        let lines = units.div_ceil(units.div_ceil(most / d.span4));
        let threads = (lines.max(4) * d.span4).max(128).next_multiple_of(32).min(most);
        return (threads, each(threads));
    }
    let mut threads = THREADS;
    while each(threads) > 4 && 2 * threads <= most {
        threads *= 2;
    }
    (threads, each(threads))
}

/// Threads that have a column of four channels of a span.
pub(super) fn lines(d: &Whole) -> u32 {
    THREADS / d.wide4()
}

/// Twice as many as long as that leaves workgroups enough, from one pixel a thread.
fn doubled(d: &Whole) -> u32 {
    let singles = u64::from(d.batch * (d.c4 / d.wide4())) * u64::from(d.pixels.div_ceil(lines(d)));
    1 << (singles / FILLED).max(1).ilog2().min(31)
}

/// Pixels of a thread that has a part of a chunk, and the chunks that makes.
pub(super) fn chunks(d: &Whole) -> (u32, u32) {
    let least = d.pixels.div_ceil(lines(d) * MOST_CHUNKS).next_power_of_two();
    let each = doubled(d).max(least).max(d.tiled).min(MOST_HELD);
    (each, d.pixels.div_ceil(each * lines(d)))
}

/// Pixels of a thread that norms them, or tiles of two.
pub(super) fn together(d: &Whole) -> u32 {
    match d.to_tiles {
        0 => doubled(d).min(APPLIED),
        2 => doubled(d).min(2),
        _ => part(cut(d)).div_ceil(lines(d)),
    }
}

/// Tiles of 2x2 side by side of a workgroup that stores their transforms.
pub(super) fn cut(d: &Whole) -> u32 {
    let fits = |cut: &u32| d.bytes * part(*cut) * d.wide4() <= PART;
    [16, 8, 4].into_iter().filter(|cut| *cut < d.wide).find(fits).unwrap_or(2)
}

/// Pixels under so many: four lines, with one more at each end.
fn part(cut: u32) -> u32 {
    4 * (2 * cut + 2)
}

/// .. times channels / 4 of a span, where there are such tiles.
pub(super) fn held(d: &Whole) -> u32 {
    if d.to_tiles > 2 { part(cut(d)) * d.wide4() } else { 1 }
}

/// Workgroups of a span.
pub(super) fn blocks(d: &Whole) -> u32 {
    match d.to_tiles {
        4 => (d.wide / 2).div_ceil(cut(d)) * (d.pixels / d.wide / 2),
        tiles => d.pixels.div_ceil(lines(d) * together(d) * tiles.max(1)),
    }
}

/// Channels / 4 of the fewest groups of `group` channels that have whole groups of four.
pub(super) fn span4(group: u32) -> u32 {
    match group % 4 {
        0 => group / 4,
        2 => group / 2,
        _ => group,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What kernels/group_norm/workgroup.wgsl counts on: a workgroup has all pixels, a place for every channel's first pixel, and a thread for every part of its groups.
    #[test]
    fn workgroups_have_all_pixels_and_enough_threads() {
        for (group, tiled, ends) in (3..=64).flat_map(|g| [(g, 1, false), (g, 1, true), (g, 2, true), (g, 4, true)]) {
            for (pixels, threads) in
                [4, 8, 12, 60, 64, 100, 256, 1024].into_iter().flat_map(|p| [256, 512, 1024].map(|t| (p, t)))
            {
                let span4 = span4(group);
                let d = Whole {
                    batch: 1,
                    pixels,
                    wide: pixels / 2,
                    c4: 8 * span4,
                    group,
                    span4,
                    own: true,
                    threads,
                    ends,
                    tiled,
                    to_tiles: 0,
                    bytes: 8,
                    memory: 48 << 10,
                };
                if !d.spans() {
                    continue;
                }
                let (found, each) = one_chunk(&d);
                let lines = found / span4;
                let parts = lines.min(32) * (4 * span4 / group);
                assert!(found <= threads && 4 * span4 <= found && parts <= found, "{d:?}: {found}");
                assert!(lines * (each / tiled) >= pixels / tiled, "{d:?}: {each} pixels each of {found} threads");
            }
        }
    }
}
