//! group_norm: normalise groups of channels over an image, with SiLU if asked; two sources in place of a concatenation.

use super::{Norm, Variant, candidates, choose, source, vec4_of};
use crate::gpu::Caps;
use crate::gpu::graph::{Graph, Node, Statistics, Sums, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static SUMS: Source = source!("group_norm/sums.wgsl", "lib/linear.wgsl");
static MERGE: Source = source!("group_norm/merge.wgsl", "lib/linear.wgsl");
static MERGE_WORKGROUP: Source = source!("group_norm/merge_workgroup.wgsl");
static APPLY: Source = source!("group_norm/apply.wgsl", "lib/linear.wgsl");
static WORKGROUP: Source = source!("group_norm/workgroup.wgsl");

/// What the table of norms looks at.
#[derive(Clone, Copy, Debug)]
pub struct Whole {
    /// Images.
    pub batch: u32,
    /// Pixels of an image.
    pub pixels: u32,
    /// Channels / 4 of both sources.
    pub c4: u32,
    /// Channels / 4 of the fewest groups that have whole groups of four channels.
    pub span4: u32,
    /// Are the statistics the image's own?
    pub own: bool,
}

/// Groups of four that one workgroup of the most threads should norm, where that is not measured: on an H200 16,384 are faster so, of
/// 20,480 not all; fewer threads should norm half as many.
const MOST: u32 = 16 << 10;

/// Threads of a workgroup, of which the largest that suit are tried beside the smallest, with so many groups of four for each.
const THREADS: [u32; 3] = [256, 512, 1024];
const EACH: u32 = 4;

/// The variants of a norm, the fastest first.
pub static VARIANTS: &[Variant<Whole>] = &[
    Variant {
        name: "workgroup",
        source: &WORKGROUP,
        needs: |caps| !caps.is_cpu() && caps.invocations >= 256,
        fits: |d| d.own && d.span4 <= 64 && d.pixels * d.span4 <= 4 * MOST && d.batch * d.c4 / d.span4 <= 65_535,
        grid: |d| [d.batch * d.c4 / d.span4, 1, 1],
    },
    Variant {
        // Sums of chunks, their merge, and the norm itself.
        name: "passes",
        source: &APPLY,
        needs: |_| true,
        fits: |_| true,
        grid: |d| {
            let [x, y, _] = linear_grid(u64::from(d.pixels.div_ceil(APPLIED)) * u64::from(d.c4), 64);
            [x, y, d.batch]
        },
    },
];

/// Pixels of a thread that applies a norm: its loads are under way together.
const APPLIED: u32 = 4;

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

/// Record group norm of x [B, H, W, C] (and y [B, H, W, C'] beside it); the result is [B, H, W, C + C'].
/// Statistics are merged in f32 from chunks of pixels, so that large means lose no digits.
pub fn group_norm(g: &mut Graph, x: Tensor, y: Option<Tensor>, norm: &Norm, groups: u32, silu: bool) -> Tensor {
    let [batch, h, w, x_channels] = x.dims;
    let y_channels = y.map_or(0, |y| y.channels());
    let channels = x_channels + y_channels;
    assert!(channels.is_multiple_of(groups), "group_norm: {channels} channels in {groups} groups");
    assert_eq!(norm.gamma.dims[3], channels, "group_norm: gamma for {:?} + {y_channels}", x.dims);
    let sources = [x, y.unwrap_or(x)];
    let elem = ("elem4", vec4_of(x.dtype));
    let two = ("TWO_SOURCES", Value::Bool(y.is_some()));
    let (x4, y4, c4) = (x_channels / 4, y_channels / 4, channels / 4);
    let pixels = h * w;
    let elements = x.len() + y.map_or(0, |y| y.len());
    let span4 = span4(channels / groups);
    let own = matches!(g.statistics, Statistics::Own);
    let whole = Whole { batch, pixels, c4, span4, own };
    let mut rows = candidates(g, "group_norm", VARIANTS, &whole);
    // Large pictures have more pixels than one workgroup should go through.
    let most = if threads(g.caps(), &whole).next() == THREADS.last().copied() { MOST } else { MOST / 2 };
    rows.sort_by_key(|row| row.name == "workgroup" && pixels * span4 > most);
    let key = format!("group_norm {:?} {batch}x{h}x{w}x{channels} in {groups}", x.dtype);
    let mut ways = Vec::new();
    for row in rows {
        if row.name == "workgroup" {
            ways.extend(threads(g.caps(), &whole).map(|threads| (row, threads)));
        } else {
            ways.push((row, 0));
        }
    }
    let name = |(row, threads): &(&Variant<Whole>, u32)| match threads {
        0 => row.name.to_owned(),
        threads => format!("{} of {threads}", row.name),
    };
    let (variant, threads) = ways[g.pick(key, ways.iter().map(name).collect())];
    if variant.name == "workgroup" {
        let out = g.operand("group norm", [batch, h, w, channels]);
        let (gamma, beta) = (norm.gamma.bind(g), norm.beta.bind(g));
        g.push(Node {
            op: "group_norm",
            variant: variant.name,
            kernel: Kernel {
                source: variant.source,
                libs: vec![],
                head: vec![
                    elem,
                    two,
                    ("out4", vec4_of(out.dtype)),
                    ("SILU", Value::Bool(silu)),
                    ("THREADS", Value::U32(threads)),
                ],
            },
            reads: vec![sources[0], sources[1], gamma, beta],
            writes: vec![out],
            dims: vec![pixels, x4, y4, span4, channels / groups, norm.eps.to_bits()],
            step: false,
            grid: (variant.grid)(&whole),
            flops: 5 * elements,
        });
        g.picked();
        return out;
    }
    let given = match &mut g.statistics {
        Statistics::Tile(tile) => tile.given.pop_front(),
        Statistics::Own => None,
    };
    let sums = match given {
        // Of the whole image, merged into one chunk.
        Some((tensor, pixels)) => Sums { tensor, pixels, chunk: pixels, nodes: 0 },
        None => record_sums(g, sources, &[elem.clone(), two.clone()], [x4, y4]),
    };
    assert_eq!(sums.tensor.dims[2..], [c4, 8], "group_norm: statistics for {channels} channels");
    let affine = g.activation_f32("group norm affine", [batch, 1, c4, 8]);
    let out = g.operand("group norm", [batch, h, w, channels]);
    let (gamma, beta) = (norm.gamma.bind(g), norm.beta.bind(g));
    let dims = Dims { batch, channels, groups };
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
            channels,
            channels / groups,
            sums.tensor.dims[1],
            sums.chunk,
            norm.eps.to_bits(),
        ],
        step: false,
        grid: (merge.grid)(&dims),
        flops: 8 * sums.tensor.len(),
    });
    g.push(Node {
        op: "group_norm",
        variant: "apply",
        kernel: Kernel {
            source: &APPLY,
            libs: vec![],
            head: vec![elem, two, ("out4", vec4_of(out.dtype)), ("SILU", Value::Bool(silu))],
        },
        reads: vec![sources[0], sources[1], affine],
        writes: vec![out],
        dims: vec![pixels, pixels.div_ceil(APPLIED), x4, y4],
        step: false,
        grid: (variant.grid)(&whole),
        flops: 2 * elements,
    });
    g.picked();
    out
}

/// Threads of a workgroup that norms alone, the likely fastest first.
fn threads(caps: &Caps, whole: &Whole) -> impl Iterator<Item = u32> {
    let suits = |threads: u32| threads <= caps.invocations && threads * 32 + 64 <= caps.workgroup_memory;
    let wanted = (whole.pixels * whole.span4 / EACH).max(THREADS[0]);
    let most = THREADS.into_iter().rfind(|&threads| suits(threads) && threads <= wanted).unwrap_or(THREADS[0]);
    let least = (most > THREADS[0]).then_some(THREADS[0]);
    std::iter::once(most).chain(least)
}

/// Channels / 4 of the fewest groups of `group` channels that have whole groups of four.
fn span4(group: u32) -> u32 {
    match group % 4 {
        0 => group / 4,
        2 => group / 2,
        _ => group,
    }
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
    g.push(Node {
        op: "group_norm",
        variant: "sums",
        kernel: Kernel {
            source: &SUMS,
            libs: vec![],
            head: [head, &[("INSIDE", Value::Bool([rows, columns] != whole))]].concat(),
        },
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
