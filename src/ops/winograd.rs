//! winograd: a 3x3 convolution after a norm by Winograd's minimal filtering, F(2x2, 3x3): 4 of 9 multiplications.
//!
//! Lavin and Gray 2015, arXiv 1509.09308. The norm stores the transforms of its result's 4x4 tiles, sixteen matrix products multiply them by the transformed
//! weights, and the norm after them transforms back what it reads (`kernels/lib/winograd.wgsl`): no dispatch more than the convolution
//! as one product in shares. In f16 the transforms round once more: the error of a convolution is about twice that of the direct one.

use super::product::{self, Product, TILED};
use super::tiles::{Layout, Method, Shape};
use super::{Conv, Epilogue, Param, Row, assert_residual, matmul, source, vec4_of};
use crate::gpu::graph::{DType, Graph, Node, Statistics, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static WEIGHTS: Source = source!("winograd/weights.wgsl", "lib/linear.wgsl");
static OUTPUT: Source =
    source!("winograd/output.wgsl", "lib/linear.wgsl", "lib/epilogue.wgsl", "lib/ended_tile.wgsl", "lib/winograd.wgsl");
/// Where tiles lie.
pub(crate) static TILES: Source = source!("lib/winograd.wgsl");

/// None of the convolutions, or those after norms in tiles of 2x2. That is not timed on a card yet: it is taken only where it is asked for, by name.
pub static VARIANTS: &[Row] = &[("none", |_| true), ("f2x2", |caps| !caps.is_cpu())];

/// Products of a tile: its 4x4 inputs.
const PRODUCTS: u32 = 16;

/// Do tiles of 2x2 cover x [B, H, W, C]?
pub(crate) fn even(x: Tensor) -> bool {
    x.height().is_multiple_of(2) && x.width().is_multiple_of(2)
}

/// The size of the transforms of so many pixels of so many channels.
pub(crate) fn dims(rows: u32, channels: u32) -> [u32; 4] {
    [PRODUCTS, 1, rows / 4, channels]
}

/// The products of so many pixels.
fn shape(pixels: u32, [c, n]: [u32; 2]) -> Shape {
    Shape { m: pixels / 4, n, k: c, slices: PRODUCTS, depth: c, whole: 0, apart: true }
}

/// What multiplies such tiles here.
fn multiplied_by(g: &Graph, shape: &Shape, weights: DType) -> Option<Method> {
    // Transforms are the operands.
    let coop = || product::fits(g, shape, Layout::Rows, [g.operands, weights]).then_some(Method::Coop);
    let tile = || product::tiled(g, shape).then_some(Method::Tile);
    match g.forced_variant("conv2d") {
        Some("tile") => tile(),
        // Too few tiles for matrix units are multiplied without.
        None | Some("coop") => coop().or_else(tile),
        Some(_) => None,
    }
}

/// Record the weights that [`winograd`] takes, [1, 16, C, C_out] (`kernels/winograd/weights.wgsl`): from the layer alone, so once is enough. None where a picture
/// of [h, w] is not convolved so.
pub fn fold(g: &mut Graph, layer: &Conv, [h, w]: [u32; 2]) -> Option<Tensor> {
    let [_, _, k, n] = layer.weight.dims;
    let c = k / 9;
    let wanted = g.forced_variant("winograd") == Some("f2x2");
    let even = h.is_multiple_of(2) && w.is_multiple_of(2);
    // Packed weights are not transformed, and a tile's norms are not its own.
    let takes = layer.kernel == 3 && layer.weight.dtype != DType::Packed && matches!(g.statistics, Statistics::Own);
    if !(wanted && even && takes) {
        return None;
    }
    // A sum of f16 weights is no f16: where all else is f32 it stays exact.
    let dtype = if g.operands == DType::F32 { DType::F32 } else { layer.weight.dtype };
    // As many rows as make a tile: how many there are is not known yet.
    multiplied_by(g, &shape((h * w).max(256), [c, n]), dtype)?;
    let weight = layer.weight.bind(g);
    let folded = g.weights("transformed weights", [1, PRODUCTS, c, n], dtype);
    g.push(Node {
        op: "winograd_fold",
        variant: "portable",
        kernel: Kernel {
            source: &WEIGHTS,
            libs: vec![],
            head: vec![("weight4", vec4_of(weight.dtype)), ("folded4", vec4_of(dtype))],
        },
        reads: vec![weight],
        writes: vec![folded],
        dims: vec![c, n / 4],
        step: false,
        grid: linear_grid(u64::from(c * n / 4), 64),
        flops: 28 * u64::from(c * n),
    });
    Some(folded)
}

/// Can the transforms of so many pixels, and their products by the `folded` weights, be bound?
pub fn fits(g: &Graph, rows: u32, folded: Tensor) -> bool {
    let [_, _, c, n] = folded.dims;
    let [transforms, products] = [(c, g.operands), (n, DType::F32)]
        .map(|(channels, dtype)| dims(rows, channels).iter().map(|&d| u64::from(d)).product::<u64>() * dtype.bytes());
    transforms.max(products) <= g.caps().max_binding
}

/// Record a 3x3 convolution of the `tiles` that [`super::group_norm::group_norm_to_tiles`] left of images of [B, H, W], with [`fold`]'s weights:
/// [B, H, W, C_out].
pub fn winograd(
    g: &mut Graph,
    tiles: Tensor,
    [batch, h, w]: [u32; 3],
    (folded, bias): (Tensor, Option<&Param>),
    epilogue: Epilogue,
) -> Tensor {
    let [_, _, c, n] = folded.dims;
    let rows = batch * h * w;
    assert_eq!(tiles.dims, dims(rows, c), "winograd: [{batch}, {h}, {w}] with weights {:?}", folded.dims);
    assert_residual("winograd", &epilogue, rows, n);
    let shape = shape(rows, [c, n]);
    let way = format!("{:?} {:?}", tiles.dtype, folded.dtype);
    let method = multiplied_by(g, &shape, folded.dtype);
    let Some(cut) = method.and_then(|method| product::pick_cut(g, "winograd", &shape, &way, method)) else {
        unreachable!("winograd: weights were transformed for {:?}", tiles.dims)
    };
    let product = Product {
        op: "winograd",
        sources: matmul::SOURCES,
        shape,
        cut,
        head: vec![],
        dims: vec![shape.m, n / 4, c / 4],
        reads: vec![tiles, folded],
        narrowed: false,
        out: [PRODUCTS, 1, shape.m, n],
        epilogue: &Epilogue::default(),
        bias: None,
    };
    let shares = product::record_shares(g, product);
    let (mut head, [bias, residual], words) = epilogue.parts(g, bias, shares, rows);
    let size = [batch, h, w, n];
    let out = if epilogue.f32_out { g.activation_f32("winograd", size) } else { g.activation("winograd", size) };
    head.extend([
        ("SPLITS", Value::U32(cut.shares)),
        (TILED, Value::U32(1)),
        ("STORES", Value::U32(0)),
        ("out4", vec4_of(out.dtype)),
    ]);
    g.push(Node {
        op: "winograd",
        variant: product::REDUCED,
        kernel: Kernel { source: &OUTPUT, libs: vec![], head },
        reads: vec![shares, bias, residual],
        writes: vec![out],
        dims: [&[rows, n / 4][..], &words, &[w]].concat(),
        step: false,
        grid: linear_grid(u64::from(rows / 4) * u64::from(n / 4), 64),
        flops: shares.len() * 2,
    });
    g.picked();
    out
}
