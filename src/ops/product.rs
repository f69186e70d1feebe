//! Products in tiles, as the coop and tile variants of matmul and conv2d record them: in one dispatch, or as shares of their depth and
//! the sum of those.

use std::sync::Arc;

use super::row_sums::RowSums;
use super::tiles::{Cut, Layout, Method, Shape, Tile, count, cuts, tiles, time};
use super::{Activation, BIAS, Epilogue, ONE_A_TILE, Param, SEVERAL, Variant, candidates, source, vec4_of, weight_lib};
use crate::gpu::Caps;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

/// act(acc + bias) + residual where a workgroup has the whole depth.
pub(crate) static EPILOGUE: Source = source!("lib/epilogue.wgsl");
/// Plain sums where it has a share.
static PARTIAL: Source = source!("lib/partial.wgsl");
static BARE: Source = source!("lib/bare.wgsl");
static REDUCE: Source = source!("matmul/reduce.wgsl", "lib/linear.wgsl", "lib/epilogue.wgsl", "lib/row_sums.wgsl");

/// The sum of a product's shares, as dispatches are named.
pub(crate) const REDUCED: &str = "reduce";

static ENDED: Source = source!("lib/ended.wgsl");
static ENDED_TILE: Source = source!("lib/ended_tile.wgsl");

/// How what a product left is to be ended by the next op, which reads it first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Shares of its depth are to be summed.
    Shares,
    /// .. and transformed back from Winograd's tiles of so many pixels (winograd.rs).
    Tiles(u32),
}

/// The pixels of a tile, if this sum of shares is one of Winograd's products.
pub(crate) fn in_tiles(node: &Node) -> Option<u32> {
    node.kernel.head.iter().find_map(|(name, value)| match value {
        Value::U32(pixels) if *name == TILED => Some(*pixels),
        _ => None,
    })
}

/// The head value of a kernel that ends those.
pub(crate) const TILED: &str = "TILED";

/// Was the sum of shares that gave `x` recorded last, and nothing more? See [`take_sum`].
pub(crate) fn ending(g: &Graph, x: Tensor) -> Option<Ending> {
    let node = g.nodes().last()?;
    let own = node.variant == REDUCED && node.writes == [x] && node.dims[1] == x.channels() / 4;
    let more = node.kernel.head.iter().any(|(name, _)| ["NORMED", "SUMMED"].contains(name));
    (own && !more).then(|| in_tiles(node).map_or(Ending::Shares, Ending::Tiles))
}

/// Take back the sum of shares that gave `x`, if that was recorded last: the op that reads `x` does it as well.
pub(crate) fn take_sum(g: &mut Graph, x: Tensor) -> Option<Node> {
    if ending(g, x).is_some() { g.take_last(|_| true) } else { None }
}

/// What a kernel needs that does the work of `reduce`, a sum of shares, before its own, and does not store as that does.
pub(crate) fn ended_libs(reduce: &Node) -> Vec<&'static Source> {
    vec![&EPILOGUE, if in_tiles(reduce).is_some() { &ENDED_TILE } else { &ENDED }]
}

/// .. and its head values.
pub(crate) fn ended_head(reduce: &Node) -> Vec<(&'static str, Value)> {
    let own = reduce.kernel.head.iter().filter(|(name, _)| !["out4", "STORES"].contains(name)).cloned();
    own.chain([("STORES", Value::U32(0))]).collect()
}

/// Can this product of a graph run in tiles of multiply-adds?
pub fn tiled(g: &Graph, shape: &Shape) -> bool {
    tiles(g.caps(), Method::Tile, Layout::Rows, shape.depth).any(|tile| count(tile, shape) <= 65_535)
}

/// Can this product of a graph run on matrix units? A in f32 is rounded to f16 only where the graph's operands are.
pub fn fits(g: &Graph, shape: &Shape, layout: Layout, [a, b]: [DType; 2]) -> bool {
    let halves = b == DType::F16 && (a == DType::F16 || g.operands == DType::F16);
    halves && shape.m >= 8 && tiles(g.caps(), Method::Coop, layout, shape.depth).any(|tile| shape.takes(tile, 1))
}

/// Shares of a product at most: of the 29 MB of weights of a convolution at 8x8, 24 and 32 bring more from memory at a time than 16.
const MOST_SHARES: u32 = 32;
/// Cuts of a product that are tried when it is tuned.
const TRIED: usize = 8;

/// The row of the op's table and, in tiles, the cut that a product runs with: the estimate's, or what tuning found.
/// `form` tells products of one size apart, where they run differently. [`Graph::picked`] ends what is recorded with it.
pub(crate) fn pick<'t, D>(
    g: &mut Graph,
    (op, table): (&str, &'t [Variant<D>]),
    dims: &D,
    shape: &Shape,
    form: &str,
) -> (&'t Variant<D>, Option<Cut>) {
    let (mut ways, mut names) = (Vec::new(), Vec::new());
    for row in candidates(g, op, table, dims) {
        let methods = [Method::Coop, Method::Tile, Method::Half];
        let Some(method) = methods.into_iter().find(|method| method.name() == row.name) else {
            ways.push((row, None));
            names.push(row.name.to_owned());
            continue;
        };
        for (cut, name) in cuts_of(g, shape, method, Layout::Rows, MOST_SHARES).iter() {
            ways.push((row, Some(*cut)));
            names.push(name.clone());
        }
    }
    ways[g.pick(key_of(op, form, shape), names)]
}

/// The cut of a product that has no other way than tiles of this method; none where they do not take it. As [`pick`].
pub(crate) fn pick_cut(g: &mut Graph, op: &str, shape: &Shape, form: &str, method: Method) -> Option<Cut> {
    let cuts = cuts_of(g, shape, method, Layout::Rows, MOST_SHARES);
    if cuts.is_empty() {
        return None;
    }
    let names = cuts.iter().map(|(_, name)| name.clone()).collect();
    Some(cuts[g.pick(key_of(op, form, shape), names)].0)
}

/// What a product should take at least, in nanoseconds on an H200; none where tiles of this method do not take it.
pub(crate) fn estimate(g: &Graph, shape: &Shape, method: Method) -> Option<u64> {
    cuts_of(g, shape, method, Layout::Rows, MOST_SHARES).first().map(|(cut, _)| time(shape, cut))
}

fn key_of(op: &str, form: &str, shape: &Shape) -> String {
    let Shape { m, n, k, depth, .. } = shape;
    format!("{op} {form} {m}x{n}x{k} of {depth}")
}

/// The cuts that are tried, best first, and their names. A network asks for the same ones for every picture.
fn cuts_of(g: &Graph, shape: &Shape, method: Method, layout: Layout, most: u32) -> Arc<Vec<(Cut, String)>> {
    let key = format!("cuts {shape:?} {method:?} {layout:?} {most}");
    g.memo(&key, || {
        let cuts = cuts(shape, g.caps(), method, layout, most).into_iter().take(TRIED);
        cuts.map(|cut| (cut, cut.to_string())).collect()
    })
}

/// One product to record.
pub(crate) struct Product<'a> {
    /// The op's name.
    pub op: &'static str,
    /// Its kernel: on matrix units, and by multiply-adds.
    pub sources: [&'static Source; 2],
    /// Size.
    pub shape: Shape,
    pub cut: Cut,
    /// The kernel's own head values, dims, and inputs without bias and residual.
    pub head: Vec<(&'static str, Value)>,
    pub dims: Vec<u32>,
    pub reads: Vec<Tensor>,
    /// The first of them was [`super::narrow`]ed.
    pub narrowed: bool,
    /// [B, H, W, columns].
    pub out: [u32; 4],
    pub epilogue: &'a Epilogue,
    pub bias: Option<&'a Param>,
}

/// Record a product's shares, at least one, [shares, 1, slices · rows, columns] in the graph's type, for another kernel to end.
pub(crate) fn record_shares(g: &mut Graph, product: Product<'_>) -> Tensor {
    record_as(g, product, true)
}

/// Record a product, in one dispatch or as shares and their sum.
pub(crate) fn record(g: &mut Graph, product: Product<'_>) -> Tensor {
    record_as(g, product, false)
}

fn record_as(g: &mut Graph, product: Product<'_>, apart: bool) -> Tensor {
    let Product {
        op,
        sources,
        shape,
        cut: Cut { tile, shares: splits },
        mut head,
        mut dims,
        mut reads,
        narrowed,
        out,
        epilogue,
        bias,
    } = product;
    let [coop, by_fma] = sources;
    let (source, variant) = (if tile.method == Method::Coop { coop } else { by_fma }, tile.method.name());
    let (stand_in, weights) = (reads[0], reads[reads.len() - 1].dtype);
    let rows = shape.m * shape.slices;
    let (parts, [bias, residual], words) = epilogue.parts(g, bias, stand_in, rows);
    let size = [splits, 1, rows, shape.n];
    let shares = match apart {
        true => Some(g.activation("products", size)),
        false => (splits > 1).then(|| g.activation_f32("shares of a product", size)),
    };
    let result = match shares {
        Some(shares) if apart => shares,
        _ if epilogue.f32_out => g.activation_f32(op, out),
        _ => g.activation(op, out),
    };
    let stored = shares.unwrap_or(result);
    let ragged = !shape.m.is_multiple_of(tile.bm) || !shape.n.is_multiple_of(tile.bn);
    head.extend(heads(&tile, g.caps(), Layout::Rows));
    let (mut elem4, mut weight4) = (vec4_of(stand_in.dtype), vec4_of(weights));
    if tile.method == Method::Coop {
        let [a_fours, b_fours] = tile.fours(g.caps(), stand_in.dtype, shape.n);
        head.extend([
            ("NARROWED", Value::Bool(narrowed)),
            ("A_FOURS", Value::U32(a_fours)),
            ("B_FOURS", Value::U32(b_fours)),
        ]);
        let eight = |fours, four| if fours == 2 { Value::Type("vec4<u32>") } else { four };
        (elem4, weight4) = (eight(a_fours, elem4), eight(b_fours, weight4));
    }
    head.extend([
        ("RAGGED", Value::Bool(ragged)),
        ("SPLITS", Value::U32(splits)),
        ("SLICES", Value::U32(shape.slices)),
        ("WIDE", Value::Bool(narrowed || stand_in.dtype == DType::F32)),
        ("elem4", elem4),
        ("weight4", weight4),
        ("out4", vec4_of(stored.dtype)),
    ]);
    // Sums of A's rows, the kernel's value for them, and its words.
    let normed: Vec<RowSums> = epilogue.normed.into_iter().collect();
    let parts_of_sums = normed.iter().map(|sums| ("NORMED", Value::U32(sums.parts)));
    let sums: Vec<Tensor> = normed.iter().map(|sums| sums.tensor).collect();
    let norm_words = normed.iter().flat_map(|sums| [(1.0 / sums.channels as f32).to_bits(), sums.eps.to_bits()]);
    let words: Vec<u32> = words.into_iter().chain(norm_words).collect();
    if shares.is_some() {
        head.push(("residual4", vec4_of(residual.dtype)));
        dims.extend(&words[..3]);
        reads.extend([bias, residual]);
    } else {
        assert!(normed.is_empty() || tile.method == Method::Coop, "{op}: rows normed by {}", tile.method.name());
        // Rows of a tile that share one of several rows of biases fetch it once.
        let own = if shape.slices == 1 { words[0].is_multiple_of(tile.bm) } else { words[0] == shape.m };
        let one = own && tile.method == Method::Coop;
        let shared = |part: (&'static str, Value)| match part {
            (BIAS, Value::U32(SEVERAL)) if one => (BIAS, Value::U32(ONE_A_TILE)),
            part => part,
        };
        head.extend(parts.iter().cloned().map(shared).chain(parts_of_sums.clone()));
        dims.extend(&words);
        reads.extend([&[bias, residual], &sums[..]].concat());
    }
    let tiles = shape.m.div_ceil(tile.bm) * shape.n.div_ceil(tile.bn);
    let weights = weight_lib(weights);
    g.push(Node {
        op,
        variant,
        kernel: Kernel {
            source,
            libs: if shares.is_some() { vec![weights, &BARE, &PARTIAL] } else { vec![weights, &EPILOGUE] },
            head,
        },
        reads,
        writes: vec![stored],
        dims,
        step: false,
        grid: [tiles, splits, shape.slices],
        flops: 2 * u64::from(rows) * u64::from(shape.n) * u64::from(shape.k),
    });
    let Some(shares) = shares.filter(|_| !apart) else { return result };
    let each = 1 + u32::from(epilogue.activation == Activation::Geglu);
    let types = [("out4", vec4_of(result.dtype)), ("SPLITS", Value::U32(splits))];
    g.push(Node {
        op,
        variant: REDUCED,
        kernel: Kernel {
            source: &REDUCE,
            libs: vec![],
            head: parts.into_iter().chain(types).chain(parts_of_sums).collect(),
        },
        reads: [&[shares, bias, residual], &sums[..]].concat(),
        writes: vec![result],
        dims: [&[rows, shape.n / 4][..], &words].concat(),
        step: false,
        grid: linear_grid(u64::from(rows) * u64::from(shape.n / 4 / each), 64),
        flops: u64::from(splits) * u64::from(rows) * u64::from(shape.n),
    });
    result
}

/// A product of activations, without an epilogue: the kernel stores the sums itself.
pub(crate) struct Bare {
    /// The op's name, and the kernel's as a variant.
    pub op: &'static str,
    pub variant: &'static str,
    pub source: &'static Source,
    pub shape: Shape,
    /// The kernel's own head values, dims, and bindings.
    pub head: Vec<(&'static str, Value)>,
    pub dims: Vec<u32>,
    pub reads: Vec<Tensor>,
    pub write: Tensor,
    /// How B lies.
    pub layout: Layout,
    /// Operands in f32 are scaled down.
    pub wide: bool,
}

/// Record a product of activations.
pub(crate) fn record_bare(g: &mut Graph, product: Bare) {
    let Bare { op, variant, source, shape, mut head, dims, reads, write, layout, wide } = product;
    let Some((Cut { tile, .. }, _)) = cuts_of(g, &shape, Method::Coop, layout, 1).first().cloned() else {
        unreachable!("{op}: {shape:?} was said to fit")
    };
    head.extend(heads(&tile, g.caps(), layout));
    head.push(("WIDE", Value::Bool(wide)));
    head.push(("RAGGED", Value::Bool(true)));
    let tiles = shape.m.div_ceil(tile.bm) * shape.n.div_ceil(tile.bn);
    g.push(Node {
        op,
        variant,
        kernel: Kernel { source, libs: vec![], head },
        reads,
        writes: vec![write],
        dims,
        step: false,
        grid: [tiles, 1, shape.slices],
        flops: 2 * u64::from(shape.m * shape.slices) * u64::from(shape.n) * u64::from(shape.k),
    });
}

fn heads(tile: &Tile, caps: &Caps, layout: Layout) -> Vec<(&'static str, Value)> {
    let Tile { bm, bn, bk, wm, wn, method, .. } = *tile;
    let [edge, lanes] = caps.coop().unwrap_or_default();
    let mut numbers = vec![("BM", bm), ("BN", bn), ("BK", bk), ("B_RUN", tile.run(lanes, layout))];
    let mut head = Vec::new();
    match method {
        Method::Tile | Method::Half => {
            let half = method == Method::Half;
            numbers.extend([("TM", wm), ("HALF", u32::from(half))]);
            head.push(("part4", vec4_of(if half { DType::F16 } else { DType::F32 })));
        }
        Method::Coop => {
            let columns = u32::from(layout == Layout::Columns);
            numbers.extend([("EDGE", edge), ("LANES", lanes), ("WM", wm), ("WN", wn), ("B_COLUMNS", columns)]);
            numbers.push(("C_PAD", tile.pad(caps, edge, layout)));
            head.extend(mat_types(edge));
        }
    }
    head.extend(numbers.into_iter().map(|(name, value)| (name, Value::U32(value))));
    head
}

/// The types of matrices with this edge.
pub(crate) fn mat_types(edge: u32) -> [(&'static str, Value); 3] {
    let [a, b, c] = match edge {
        16 => ["coop_mat16x16<f16, A>", "coop_mat16x16<f16, B>", "coop_mat16x16<f32, C>"],
        _ => ["coop_mat8x8<f16, A>", "coop_mat8x8<f16, B>", "coop_mat8x8<f32, C>"],
    };
    [("MatA", Value::Type(a)), ("MatB", Value::Type(b)), ("MatC", Value::Type(c))]
}
