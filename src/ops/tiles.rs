//! Tiles of products: which there are, which suit a device, and in how many shares a product should be fastest.

use crate::gpu::Caps;
use crate::gpu::graph::DType;

/// Rows, columns and depth of a workgroup's tile, rows and columns of a subgroup's part, and the time of a step of BK, in
/// nanoseconds on an H200, alone on a multiprocessor and beside another one (benches/NOTES.md): two fit there if each takes at most half
/// of 48 KiB of workgroup memory and of the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows.
    pub bm: u32,
    /// Columns.
    pub bn: u32,
    /// Depth of a step.
    pub bk: u32,
    /// Rows of a subgroup.
    pub wm: u32,
    /// Columns of a subgroup.
    pub wn: u32,
    alone: u32,
    /// 0 where memory or registers allow one workgroup alone.
    beside: u32,
    /// What multiplies it.
    pub method: Method,
}

/// What multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Matrix units: f16, sums in f32. A subgroup has `wm` rows of `wn` columns.
    Coop,
    /// Multiply-adds in f32. A thread has `wm` rows of `wn` columns.
    Tile,
    /// Multiply-adds in f16, of which f32 takes the sums of eight. Less exact.
    Half,
}

impl Method {
    /// The row of the op's table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Method::Coop => "coop",
            Method::Tile => "tile",
            Method::Half => "half",
        }
    }
}

const fn tile([bm, bn, bk, wm, wn]: [u32; 5], alone: u32, beside: u32) -> Tile {
    Tile { bm, bn, bk, wm, wn, alone, beside, method: Method::Coop }
}

const fn fma(method: Method, [bm, bn, bk, wm, wn]: [u32; 5], alone: u32, beside: u32) -> Tile {
    Tile { bm, bn, bk, wm, wn, alone, beside, method }
}

/// Tiles of matrices with an edge of 16.
const TILES_16: &[Tile] = &[
    tile([128, 320, 32, 64, 80], 825, 0),
    tile([256, 160, 32, 64, 80], 1030, 0),
    tile([128, 256, 32, 64, 64], 890, 0),
    tile([128, 128, 32, 64, 64], 610, 900),
    tile([64, 320, 32, 32, 80], 680, 0),
    tile([128, 160, 32, 32, 80], 820, 0),
    tile([64, 160, 32, 32, 80], 640, 790),
    tile([128, 80, 32, 32, 80], 640, 800),
    tile([64, 128, 32, 32, 64], 415, 685),
    tile([64, 80, 64, 16, 80], 820, 1000),
    tile([64, 64, 64, 32, 32], 445, 700),
    tile([64, 64, 32, 32, 32], 400, 380),
    tile([128, 16, 32, 32, 16], 500, 550),
];

/// Tiles of matrices with an edge of 8.
const TILES_8: &[Tile] = &[tile([32, 32, 16, 16, 16], 1, 0), tile([32, 80, 16, 16, 80], 3, 0)];

/// How the second operand of a product lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// [K, N], as weights do.
    Rows,
    /// [N, K]: A times B transposed.
    Columns,
}

/// Tiles of multiply-adds; the last takes every depth. Their times are at 60 % of an H200's rate, as predicted and as measured for whole
/// products (benches/NOTES.md).
const TILES_FMA: &[Tile] = &of_threads(Method::Tile);
/// The same in f16.
const TILES_HALF: &[Tile] = &of_threads(Method::Half);

const fn of_threads(method: Method) -> [Tile; 4] {
    [
        fma(method, [128, 128, 16, 8, 8], 2000, 3700),
        fma(method, [128, 64, 16, 8, 8], 1150, 1900),
        fma(method, [64, 64, 16, 8, 8], 700, 1000),
        fma(method, [64, 64, 4, 8, 8], 300, 400),
    ]
}

impl Tile {
    /// Invocations of a workgroup.
    pub(crate) fn threads(&self, lanes: u32) -> u32 {
        let parts = (self.bm / self.wm) * (self.bn / self.wn);
        if self.method == Method::Coop { parts * lanes } else { parts }
    }

    /// Lines of B's tile, and how long they are.
    pub(crate) fn lines(&self, layout: Layout) -> [u32; 2] {
        if layout == Layout::Rows { [self.bk, self.bn] } else { [self.bn, self.bk] }
    }

    /// Groups of four of B that neighbouring threads load: the longest run that divides a line of its tile and the threads.
    pub(crate) fn run(&self, lanes: u32, layout: Layout) -> u32 {
        1 << (self.lines(layout)[1] / 4).trailing_zeros().min(self.threads(lanes).trailing_zeros())
    }

    /// Groups of four that a load of A has, and one of weights: two where they are of halves and threads still share them evenly.
    pub(crate) fn fours(&self, caps: &Caps, a: DType, n: u32) -> [u32; 2] {
        let [_, lanes] = caps.coop().unwrap_or_default();
        let threads = 2 * self.threads(lanes);
        let run = self.run(lanes, Layout::Rows);
        let even = |loads: u32| loads.is_multiple_of(threads);
        let b = n.is_multiple_of(8) && run.is_multiple_of(2) && even(self.bk * run);
        [1 + u32::from(a == DType::F16 && even(self.bm * self.bk / 4)), 1 + u32::from(b)]
    }

    /// Bytes of workgroup memory, as lib/coop.wgsl and lib/tile.wgsl declare it.
    fn memory(&self, edge: u32, layout: Layout) -> u32 {
        if self.method != Method::Coop {
            let bytes = if self.method == Method::Half { 8 } else { 16 };
            return (self.bk / 4 * (self.bm + 2) + self.bk * (self.bn / 4 + 8)) * bytes;
        }
        let subgroups = self.threads(1);
        let [lines, width] = self.lines(layout);
        let (a, b) = (self.bm * (self.bk / 4 + 2) * 8, lines * (width / 4 + 2) * 8);
        a + b + subgroups * edge * edge * 4
    }

    /// Groups of four by which the epilogue's rows are longer, so that they lie in different banks: none where that memory would leave a
    /// workgroup alone on a multiprocessor, or is not there. (Rows of 64 bytes meet; of 32, as matrices of 8 have, half as many do.)
    pub(crate) fn pad(&self, caps: &Caps, edge: u32, layout: Layout) -> u32 {
        let most = if self.beside > 0 { PAIR } else { caps.workgroup_memory };
        let padded = self.memory(edge, layout) + self.threads(1) * edge * 2 * 16;
        if edge == 16 && padded <= most { 2 } else { 0 }
    }

    /// Does it fit the device, and do its threads share its loads evenly? wgpu checks neither: too much workgroup memory hangs
    /// a driver's compiler.
    fn suits(&self, caps: &Caps, [edge, lanes]: [u32; 2], layout: Layout) -> bool {
        let threads = self.threads(lanes);
        let even = (self.bm * self.bk / 4).is_multiple_of(threads)
            && (self.lines(layout)[0] * self.run(lanes, layout)).is_multiple_of(threads);
        even && threads <= caps.invocations && self.memory(edge, layout) <= caps.workgroup_memory
    }
}

/// A product's size, and what of its depth lies in one piece.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows.
    pub m: u32,
    /// Columns.
    pub n: u32,
    /// Depth.
    pub k: u32,
    /// Products of this size side by side.
    pub slices: u32,
    /// Every source's channels are multiples of this.
    pub depth: u32,
    /// Columns that a subgroup must have together, of their whole depth; 0 where any may.
    pub whole: u32,
    /// Are its sums stored in any case for another kernel to end, as shares are?
    pub apart: bool,
}

impl Shape {
    /// May this tile cut it, into so many shares?
    pub(crate) fn takes(&self, tile: &Tile, shares: u32) -> bool {
        self.whole == 0 || (tile.wn == self.whole && shares == 1)
    }
}

/// Multiprocessors that work should fill: wgpu does not tell how many there are.
pub(crate) const UNITS: u32 = 132;

/// Bytes of workgroup memory up to which two workgroups fit on a multiprocessor (benches/NOTES.md).
pub(crate) const PAIR: u32 = 24 << 10;

/// The tiles of a method that suit the device, the layout and the depth; matrix units only where the device has them.
pub(crate) fn tiles(caps: &Caps, method: Method, layout: Layout, depth: u32) -> impl Iterator<Item = &'static Tile> {
    let units = caps.coop();
    let all = match (method, units) {
        (Method::Tile, _) => TILES_FMA,
        (Method::Half, _) => TILES_HALF,
        (Method::Coop, Some([16, _])) => TILES_16,
        (Method::Coop, Some(_)) => TILES_8,
        (Method::Coop, None) => &[],
    };
    let units = units.unwrap_or_default();
    all.iter().filter(move |tile| depth.is_multiple_of(tile.bk) && tile.suits(caps, units, layout))
}

/// Tiles of a product, which a grid counts in one dimension.
pub(crate) fn count(tile: &Tile, shape: &Shape) -> u64 {
    u64::from(shape.m.div_ceil(tile.bm)) * u64::from(shape.n.div_ceil(tile.bn))
}

/// A tile, and how many workgroups share its depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The tile.
    pub tile: Tile,
    /// Workgroups.
    pub shares: u32,
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Tile { bm, bn, bk, wm, wn, method, .. } = self.tile;
        write!(f, "{} {bm}x{bn}x{bk} of {wm}x{wn}, {} shares", method.name(), self.shares)
    }
}

/// What a product cut so should take, in nanoseconds.
pub(crate) fn time(shape: &Shape, Cut { tile, shares }: &Cut) -> u64 {
    let groups = count(tile, shape) * u64::from(shape.slices) * u64::from(*shares);
    let steps = u64::from((shape.k / tile.bk).div_ceil(*shares));
    let units = u64::from(UNITS);
    let (rounds, step) = match tile.beside {
        0 => (groups.div_ceil(units), tile.alone),
        beside if groups > units => (groups.div_ceil(2 * units), beside),
        _ => (1, tile.alone),
    };
    // Start and end of a tile: the first loads, and the traffic of what is stored. Of two, one works meanwhile.
    let ends = 2500 + u64::from(tile.bm * tile.bn) / 10;
    // The reduction: its dispatch, and its traffic, through the cache for the most part, at 7.4 TB/s.
    let share = u64::from(shape.m * shape.slices) * u64::from(shape.n) * 8 / 7400;
    let reduction = match (shares, shape.apart) {
        (_, true) => share * u64::from(shares - 1),
        (1, false) => 0,
        _ => 2900 + share * u64::from(*shares),
    };
    rounds * (steps * u64::from(step) + ends) + reduction
}

/// The ways to cut a product into up to `most` shares, the one that should be fastest first.
pub(crate) fn cuts(shape: &Shape, caps: &Caps, method: Method, layout: Layout, most: u32) -> Vec<Cut> {
    let splits = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
    let all =
        tiles(caps, method, layout, shape.depth).flat_map(|tile| splits.map(|shares| Cut { tile: *tile, shares }));
    let enough = |cut: &Cut| cut.shares == 1 || (cut.shares <= most && shape.k / cut.tile.bk / cut.shares >= 4);
    let mut cuts: Vec<Cut> = all.filter(|cut| count(&cut.tile, shape) <= 65_535).filter(enough).collect();
    cuts.retain(|cut| shape.takes(&cut.tile, cut.shares));
    cuts.sort_by_key(|cut| time(shape, cut));
    cuts
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::gpu::noop::NoopProfile;

    fn caps(profile: NoopProfile) -> Caps {
        pollster::block_on(Gpu::noop(&profile)).expect("noop").caps().clone()
    }

    #[test]
    fn some_tile_of_multiply_adds_suits_every_device() {
        for profile in [NoopProfile::BROWSER, NoopProfile::APPLE, NoopProfile::H200] {
            let caps = caps(profile);
            for depth in [4, 12, 16, 320] {
                let left: Vec<&Tile> = tiles(&caps, Method::Tile, Layout::Rows, depth).collect();
                assert!(!left.is_empty(), "{}: {depth}", caps.name);
                assert!(left.iter().all(|t| t.memory(0, Layout::Rows) <= caps.workgroup_memory && t.threads(0) <= 256));
            }
        }
        assert_eq!(
            tiles(&caps(NoopProfile::BROWSER), Method::Tile, Layout::Rows, 16).count(),
            3,
            "all but the largest"
        );
    }

    #[test]
    fn the_tables_suit_the_devices_they_were_made_for() {
        let nvidia = caps(NoopProfile::H200);
        assert!(TILES_16.iter().all(|tile| tile.suits(&nvidia, [16, 32], Layout::Rows)));
        assert!(TILES_8.iter().all(|tile| tile.suits(&caps(NoopProfile::LAVAPIPE_26), [8, 8], Layout::Rows)));
        // Two workgroups run beside each other where each takes at most half of 48 KiB (benches/NOTES.md).
        for tile in TILES_16 {
            assert_eq!(tile.beside > 0, tile.memory(16, Layout::Rows) <= PAIR, "{tile:?}");
        }
        // Some tile is left for other subgroups and for less memory, and every one that is left fits there.
        let others = [([16, 64], 64 << 10), ([16, 32], 32 << 10), ([8, 32], 32 << 10)];
        for ((units, memory), layout) in others.into_iter().flat_map(|o| [(o, Layout::Rows), (o, Layout::Columns)]) {
            let (cooperative, subgroup_size) = (vec![units[0]], [units[1]; 2]);
            let other = Caps { workgroup_memory: memory, cooperative, subgroup_size, ..nvidia.clone() };
            let left: Vec<&Tile> = tiles(&other, Method::Coop, layout, 320).collect();
            assert!(units[0] == 8 || !left.is_empty(), "{units:?}");
            assert!(left.iter().all(|tile| tile.memory(units[0], layout) <= memory), "{units:?}: {left:?}");
            for tile in left {
                let (threads, run) = (tile.threads(units[1]), tile.run(units[1], layout));
                // What the kernel loads is the whole tile: rows from load to load, runs side by side.
                let [lines, width] = tile.lines(layout);
                let (loads, runs) = (lines * width / 4 / threads, width / 4 / run);
                assert_eq!(loads / runs * (threads / run), lines, "{units:?}, {layout:?}: {tile:?}");
            }
        }
    }
}
