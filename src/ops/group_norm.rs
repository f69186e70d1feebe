//! group_norm: normalise groups of channels over an image, with SiLU if asked; two sources in place of a concatenation.

mod whole;

use whole::{ALONE, APPLIED, HELD, MOST_CHUNKS, THREADS, blocks, chunks, cut, held, lines, one_chunk, span4, together};

pub use self::whole::Whole;
use super::product::Ending;
use super::winograd::{self, Tiles};
use super::{Norm, Variant, candidates, choose, product, source, vec4_of};
use crate::gpu::graph::{Graph, Node, Statistics, Sums, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static SUMS: Source = source!("group_norm/sums.wgsl", "lib/linear.wgsl");
static MERGE: Source = source!("group_norm/merge.wgsl", "lib/linear.wgsl");
static MERGE_WORKGROUP: Source = source!("group_norm/merge_workgroup.wgsl");
static APPLY: Source = source!("group_norm/apply.wgsl", "lib/linear.wgsl");
static WORKGROUP: Source = source!("group_norm/workgroup.wgsl", "lib/groups.wgsl");
static MERGED: Source = source!("group_norm/merged.wgsl", "lib/groups.wgsl");
/// What norms need that store Winograd's transforms.
static TO_TILES: Source = source!("lib/to_tiles.wgsl");

/// The variants of a norm, the fastest first.
pub static VARIANTS: &[Variant<Whole>] = &[
    Variant {
        name: "workgroup",
        source: &WORKGROUP,
        needs: |caps| !caps.is_cpu() && caps.invocations >= THREADS,
        fits: |d| d.own && d.spans() && one_chunk(d).1 <= HELD && d.holds(),
        grid: |d| [d.c4 / d.span4, 1, d.batch],
    },
    Variant {
        // Statistics of chunks, and the norm, every workgroup of which merges its groups'.
        name: "chunks",
        source: &MERGED,
        needs: |caps| !caps.is_cpu() && caps.invocations >= THREADS,
        fits: |d| d.own && d.spans() && chunks(d).1 <= MOST_CHUNKS && d.holds_part(),
        grid: |d| [d.c4 / d.wide4(), blocks(d), d.batch],
    },
    Variant {
        // Sums of chunks, their merge, and the norm itself.
        name: "passes",
        source: &APPLY,
        needs: |_| true,
        fits: |d| d.to_tiles == 0,
        grid: |d| {
            let [x, y, _] = linear_grid(u64::from(d.pixels.div_ceil(APPLIED)) * u64::from(d.c4), 64);
            [x, y, d.batch]
        },
    },
];

/// What the table of merges looks at.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Images.
    pub batch: u32,
    /// Channels.
    pub channels: u32,
    /// Groups of them.
    pub groups: u32,
}

/// The variants of the merge of the chunks' sums, the fastest first.
pub static MERGE_VARIANTS: &[Variant<Dims>] = &[
    Variant {
        name: "workgroup",
        source: &MERGE_WORKGROUP,
        needs: |caps| !caps.is_cpu() && caps.invocations >= 256,
        fits: |d| d.batch * d.groups <= 65_535,
        grid: |d| [d.batch * d.groups, 1, 1],
    },
    Variant {
        name: "portable",
        source: &MERGE,
        needs: |_| true,
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.batch) * u64::from(d.channels), 64),
    },
];

/// A norm in a workgroup, or statistics of chunks, that end the product before them as well: as dispatches are named.
pub const ENDING: &str = "workgroup of shares";

/// A norm to record.
struct Recorded<'a> {
    /// x, and y or x again.
    sources: [Tensor; 2],
    /// Are there two?
    two: bool,
    norm: &'a Norm,
    silu: bool,
    groups: u32,
    whole: Whole,
    variant: &'static Variant<Whole>,
    /// What is stored is Winograd's transforms of the norm.
    to_tiles: Option<Tiles>,
}

/// Record group norm of x [B, H, W, C] (and y [B, H, W, C'] beside it); the result is [B, H, W, C + C'].
/// Statistics are merged in f32 from chunks of pixels, so that large means lose no digits. Where x was just summed from a product's
/// shares, what reads x first does that as well: a launch and a way to memory less.
pub fn group_norm(g: &mut Graph, x: Tensor, y: Option<Tensor>, norm: &Norm, groups: u32, silu: bool) -> Tensor {
    match recorded(g, x, y, norm, (groups, silu), None) {
        Some(out) => out,
        None => unreachable!("group_norm: the passes take everything"),
    }
}

/// As [`group_norm`], with SiLU, but what is stored is what Winograd's products take of it (`kernels/lib/winograd.wgsl`), [`winograd::dims`]: for [`winograd::winograd`].
/// None, and nothing recorded, where no variant does that.
pub fn group_norm_to_tiles(
    g: &mut Graph,
    x: Tensor,
    y: Option<Tensor>,
    norm: &Norm,
    groups: u32,
    tiles: Tiles,
) -> Option<Tensor> {
    recorded(g, x, y, norm, (groups, true), Some(tiles))
}

fn recorded(
    g: &mut Graph,
    x: Tensor,
    y: Option<Tensor>,
    norm: &Norm,
    (groups, silu): (u32, bool),
    to_tiles: Option<Tiles>,
) -> Option<Tensor> {
    let [batch, h, w, x_channels] = x.dims;
    let y_channels = y.map_or(0, |y| y.channels());
    let channels = x_channels + y_channels;
    assert!(channels.is_multiple_of(groups), "group_norm: {channels} channels in {groups} groups");
    assert_eq!(norm.gamma.dims[3], channels, "group_norm: gamma for {:?} + {y_channels}", x.dims);
    let group = channels / groups;
    let ending = product::ending(g, x);
    let whole = Whole {
        batch,
        pixels: h * w,
        wide: w,
        c4: channels / 4,
        group,
        span4: span4(group),
        own: matches!(g.statistics, Statistics::Own),
        // Each has two groups of four numbers and some in workgroup memory.
        threads: g.caps().invocations.min(g.caps().workgroup_memory / 32),
        ends: ending.is_some(),
        tiled: if let Some(Ending::Tiles(pixels)) = ending { pixels } else { 1 },
        to_tiles: to_tiles.map_or(0, Tiles::pixels),
        bytes: 4 * g.operands.bytes() as u32,
        memory: g.caps().workgroup_memory,
    };
    let wanted = |row: &Variant<Whole>| match g.forced_variant("group_norm") {
        Some(name) => name == row.name,
        None => (row.needs)(g.caps()),
    };
    if to_tiles.is_some_and(|tiles| !tiles.cover([h, w])) {
        return None;
    }
    if to_tiles.is_some() && !(VARIANTS.iter().any(|row| wanted(row) && (row.fits)(&whole))) {
        return None;
    }
    let mut rows = candidates(g, "group_norm", VARIANTS, &whole);
    rows.sort_by_key(|row| row.name == "workgroup" && whole.pixels * whole.span4 > ALONE);
    rows.sort_by_key(|row| row.name == "passes");
    let shares = ending.is_some() && rows.iter().any(|row| row.name != "passes");
    if g.after_pick() {
        // Timed together with what was picked, which is to differ alone; and to sum shares apart would cost more than it saves.
        rows.truncate(1);
    }
    let key = format!(
        "group_norm {:?} {batch}x{h}x{w}x{channels} in {groups}{}{}",
        x.dtype,
        match ending {
            Some(Ending::Shares) if shares => ", of shares",
            Some(Ending::Tiles(_)) if shares => ", of tiles",
            _ => "",
        },
        to_tiles.map_or(String::new(), |tiles| format!(", to {tiles:?}")),
    );
    let names = rows.iter().map(|row| row.name.to_owned()).collect();
    let variant = rows[g.pick(key, names)];
    let recorded =
        Recorded { sources: [x, y.unwrap_or(x)], two: y.is_some(), norm, silu, groups, whole, variant, to_tiles };
    let out = match variant.name {
        "workgroup" => recorded.in_a_workgroup(g),
        "chunks" => recorded.in_chunks(g),
        _ => recorded.in_passes(g),
    };
    g.picked();
    g.picked_together();
    Some(out)
}

impl Recorded<'_> {
    /// The values of the kernels' heads that all have.
    fn head(&self) -> Vec<(&'static str, Value)> {
        vec![("elem4", vec4_of(self.sources[0].dtype)), ("TWO_SOURCES", Value::Bool(self.two))]
    }

    fn out(&self, g: &mut Graph) -> Tensor {
        let ([batch, h, w, _], channels) = (self.sources[0].dims, 4 * self.whole.c4);
        match self.to_tiles {
            Some(tiles) => g.operand("group norm in tiles", winograd::dims(tiles, [batch, h, w], channels)),
            None => g.operand("group norm", [batch, h, w, channels]),
        }
    }

    /// What kernels have in common that end a product, or store transforms.
    fn ends(&self) -> Ends {
        Ends { to_tiles: self.to_tiles.is_some(), wide: self.sources[0].width() }
    }

    /// .. and of those that store the norm.
    fn out_head(&self, out: Tensor) -> Vec<(&'static str, Value)> {
        [self.head(), vec![("out4", vec4_of(out.dtype)), ("SILU", Value::Bool(self.silu))]].concat()
    }

    /// Pixels of an image, and channels / 4 of the sources.
    fn words(&self) -> [u32; 3] {
        let x4 = self.sources[0].channels() / 4;
        [self.whole.pixels, x4, self.whole.c4 - x4]
    }

    fn elements(&self) -> u64 {
        4 * u64::from(self.whole.batch * self.whole.pixels) * u64::from(self.whole.c4)
    }

    fn affine(&self, g: &mut Graph) -> [Tensor; 2] {
        [self.norm.gamma.bind(g), self.norm.beta.bind(g)]
    }

    fn in_a_workgroup(&self, g: &mut Graph) -> Tensor {
        let whole = &self.whole;
        let (threads, each) = one_chunk(whole);
        let reduce = product::take_sum(g, self.sources[0]);
        let out = self.out(g);
        let held = if whole.to_tiles > 0 { whole.pixels * whole.span4 } else { 1 };
        let own = [("WHOLE", 1), ("EACH", each), ("THREADS", threads), ("TO_TILES", whole.to_tiles), ("HELD", held)];
        let node = Node {
            op: "group_norm",
            variant: self.variant.name,
            kernel: Kernel {
                source: self.variant.source,
                libs: vec![],
                head: [self.out_head(out), own.map(|(name, n)| (name, Value::U32(n))).to_vec()].concat(),
            },
            reads: [self.sources, self.affine(g)].concat(),
            writes: vec![out],
            dims: [&self.words()[..], &[whole.span4, whole.group, self.norm.eps.to_bits()]].concat(),
            step: false,
            grid: (self.variant.grid)(whole),
            flops: 5 * self.elements(),
        };
        push(g, node, reduce, self.ends());
        out
    }

    fn in_chunks(&self, g: &mut Graph) -> Tensor {
        let whole = &self.whole;
        let wide4 = whole.wide4();
        let (each, chunks) = chunks(whole);
        let floats = 2 * whole.batch * chunks * self.groups;
        let reduce = product::take_sum(g, self.sources[0]);
        let stats = g.activation_f32("group norm statistics", [1, 1, 1, floats.next_multiple_of(4)]);
        let own = [("WHOLE", 0), ("EACH", each), ("THREADS", THREADS)];
        let node = Node {
            op: "group_norm",
            variant: "statistics",
            kernel: Kernel {
                source: &WORKGROUP,
                libs: vec![],
                head: [self.head(), own.map(|(name, n)| (name, Value::U32(n))).to_vec()].concat(),
            },
            reads: self.sources.to_vec(),
            writes: vec![stats],
            dims: [&self.words()[..], &[wide4, whole.group, self.norm.eps.to_bits()]].concat(),
            step: false,
            grid: [whole.c4 / wide4, chunks, whole.batch],
            flops: 3 * self.elements(),
        };
        push(g, node, reduce, Ends { to_tiles: false, ..self.ends() });
        let out = self.out(g);
        let [gamma, beta] = self.affine(g);
        let groups = 4 * wide4 / whole.group;
        let own = [
            ("THREADS", THREADS),
            ("TOGETHER", together(whole)),
            ("TO_TILES", whole.to_tiles),
            ("CUT", cut(whole)),
            ("HELD", held(whole)),
            ("MOST", chunks * groups),
        ];
        let node = Node {
            op: "group_norm",
            variant: self.variant.name,
            kernel: Kernel {
                source: self.variant.source,
                libs: vec![],
                head: [self.out_head(out), own.map(|(name, n)| (name, Value::U32(n))).to_vec()].concat(),
            },
            reads: [&self.sources[..], &[stats, gamma, beta]].concat(),
            writes: vec![out],
            dims: [&self.words()[..], &[wide4, whole.group, chunks, each * lines(whole), self.norm.eps.to_bits()]]
                .concat(),
            step: false,
            grid: (self.variant.grid)(whole),
            flops: 2 * self.elements(),
        };
        push(g, node, None, self.ends());
        out
    }

    fn in_passes(&self, g: &mut Graph) -> Tensor {
        let Whole { batch, c4, group, .. } = self.whole;
        let words = self.words();
        let given = match &mut g.statistics {
            Statistics::Tile(tile) => tile.given.pop_front(),
            Statistics::Own => None,
        };
        let sums = match given {
            // Of the whole image, merged into one chunk.
            Some((tensor, pixels)) => Sums { tensor, pixels, chunk: pixels, nodes: 0 },
            None => record_sums(g, self.sources, &self.head(), [words[1], words[2]]),
        };
        assert_eq!(sums.tensor.dims[2..], [c4, 8], "group_norm: statistics for {} channels", 4 * c4);
        let affine = g.activation_f32("group norm affine", [batch, 1, c4, 8]);
        let out = self.out(g);
        let [gamma, beta] = self.affine(g);
        let dims = Dims { batch, channels: 4 * c4, groups: self.groups };
        let merge = choose(g, "group_norm_merge", MERGE_VARIANTS, &dims);
        g.push(Node {
            op: "group_norm_merge",
            variant: merge.name,
            kernel: Kernel { source: merge.source, libs: vec![], head: vec![] },
            reads: vec![sums.tensor, gamma, beta],
            writes: vec![affine],
            dims: vec![
                batch,
                sums.pixels,
                dims.channels,
                group,
                sums.tensor.dims[1],
                sums.chunk,
                self.norm.eps.to_bits(),
            ],
            step: false,
            grid: (merge.grid)(&dims),
            flops: 8 * sums.tensor.len(),
        });
        g.push(Node {
            op: "group_norm",
            variant: "apply",
            kernel: Kernel { source: &APPLY, libs: vec![], head: self.out_head(out) },
            reads: vec![self.sources[0], self.sources[1], affine],
            writes: vec![out],
            dims: vec![words[0], words[0].div_ceil(APPLIED), words[1], words[2]],
            step: false,
            grid: (self.variant.grid)(&self.whole),
            flops: 2 * self.elements(),
        });
        out
    }
}

/// See [`push`].
struct Ends {
    to_tiles: bool,
    /// Pixels of a line.
    wide: u32,
}

/// Record `node`, which reads x and y first, with the work of `reduce`, of which x is the result, if there is one.
fn push(g: &mut Graph, mut node: Node, reduce: Option<Node>, ends: Ends) {
    let mut tiled = ends.to_tiles;
    if let Some(reduce) = reduce {
        let [x, mut y] = [node.reads[0], node.reads[1]];
        if y == x {
            // Nobody reads it, and what is written cannot be bound to be read.
            y = reduce.reads[0];
        }
        node.variant = ENDING;
        node.kernel.libs = product::ended_libs(&reduce);
        node.kernel.head.extend(product::ended_head(&reduce));
        node.reads = [&reduce.reads[..], &[y], &node.reads[2..]].concat();
        node.writes.insert(0, x);
        node.dims.extend(&reduce.dims[..5]);
        node.flops += reduce.flops;
        tiled |= product::in_tiles(&reduce).is_some();
    }
    if ends.to_tiles {
        node.kernel.libs.push(&TO_TILES);
    }
    if tiled {
        node.kernel.libs.push(&winograd::TILES);
        node.dims.push(ends.wide);
    }
    g.push(node);
}

/// Record the sums of the image's own pixels; a tile remembers the first that it was not given.
fn record_sums(g: &mut Graph, sources: [Tensor; 2], head: &[(&'static str, Value)], [x4, y4]: [u32; 2]) -> Sums {
    let [batch, h, w, _] = sources[0].dims;
    let whole = [[0, h], [0, w]];
    let [rows, columns] = match &g.statistics {
        // At another resolution than where the tile was cut, its own part is scaled.
        Statistics::Tile(tile) => {
            let scaled = |own: [u32; 2], now: u32, then: u32| own.map(|n| n * now / then);
            [scaled(tile.own[0], h, tile.size[0]), scaled(tile.own[1], w, tile.size[1])]
        }
        Statistics::Own => whole,
    };
    let inner = columns[1] - columns[0];
    let pixels = (rows[1] - rows[0]) * inner;
    // Enough chunks to fill a device, few enough to be merged quickly: by one thread, on software devices.
    let most = if g.caps().is_cpu() { 64 } else { (32_768 / (batch * (x4 + y4))).clamp(256, 1024) };
    let chunk = pixels.div_ceil(most).max(16);
    let chunks = pixels.div_ceil(chunk);
    let c4 = x4 + y4;
    let sums = g.activation_f32("group norm sums", [batch, chunks, c4, 8]);
    let inside = [rows, columns] != whole;
    g.push(Node {
        op: "group_norm",
        variant: "sums",
        kernel: Kernel { source: &SUMS, libs: vec![], head: [head, &[("INSIDE", Value::Bool(inside))]].concat() },
        reads: sources.to_vec(),
        writes: vec![sums],
        dims: vec![batch, pixels, x4, y4, chunks, chunk, h * w, w, inner, rows[0] * w + columns[0]],
        step: false,
        grid: linear_grid(u64::from(batch * chunks) * u64::from(c4), 64),
        flops: 12 * u64::from(batch * pixels) * u64::from(c4),
    });
    let found = Sums { tensor: sums, pixels, chunk, nodes: g.nodes().len() };
    if let Statistics::Tile(tile) = &mut g.statistics {
        tile.next.get_or_insert(found);
    }
    found
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use pollster::block_on;

    use super::*;
    use crate::gpu::noop::NoopProfile;
    use crate::gpu::{DType, Gpu};
    use crate::ops::matmul::matmul;
    use crate::ops::{Epilogue, Linear, Param};

    /// In every way that tuning tries, a product is timed with the norm after it, whether that sums its shares or there are none.
    #[test]
    fn a_product_is_tuned_with_the_norm_that_ends_it() {
        let gpu = block_on(Gpu::noop(&NoopProfile::H200)).expect("noop");
        let param = |dims: [u32; 4], dtype: DType| {
            let bytes = dims.iter().map(|&d| u64::from(d)).product::<u64>() * dtype.bytes();
            Param { buffer: block_on(gpu.storage("parameter", bytes)).expect("a buffer"), dims, dtype }
        };
        let layer = Linear { weight: param([1, 1, 640, 320], DType::F16), bias: None };
        let [gamma, beta] = [0; 2].map(|_| param([1, 1, 1, 320], DType::F32));
        let norm = Norm { gamma, beta, eps: 1e-5 };
        let mut shared = [0; 2];
        let expected = std::collections::BTreeMap::from([(8, "workgroup"), (64, "statistics")]);
        for (size, trial) in [8, 64].into_iter().flat_map(|size| (0..8).map(move |trial| (size, trial))) {
            let mut g = Graph::new(&gpu, DType::F16);
            g.trial = Some(trial);
            let x = g.argument("x", [1, size, size, 640], DType::F16);
            let x = matmul(&mut g, x, &layer, Epilogue::default());
            group_norm(&mut g, x, None, &norm, 32, true);
            assert!(g.nodes().iter().all(|node| node.variant != product::REDUCED), "{size}, {trial}: summed apart");
            let all = 0..g.nodes().len();
            assert_eq!(g.picked_nodes().collect::<Vec<_>>(), [all.clone(), 1..all.end], "{size}, {trial}");
            let norm = g.nodes()[1].variant;
            shared[usize::from(norm == ENDING)] += 1;
            assert!([ENDING, expected[&size]].contains(&norm), "{size}, {trial}: the norm differs, too");
        }
        assert!(shared.iter().all(|&times| times > 0), "whole products and shares: {shared:?}");
    }
}
