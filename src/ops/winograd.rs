//! winograd: a 3x3 convolution after a norm by Winograd's minimal filtering: 4 of 9 multiplications, or 6.
//!
//! Lavin and Gray 2015, arXiv 1509.09308. The norm stores the transforms of its result's tiles, matrix products multiply them by the transformed
//! weights, and the norm after them transforms back what it reads (`kernels/lib/winograd.wgsl`): no dispatch more than the convolution
//! as one product in shares.

use super::product::{self, Product, TILED};
use super::tiles::{Layout, Method, Shape};
use super::{Conv, Epilogue, Param, Row, assert_residual, conv2d, matmul, source, vec4_of};
use crate::gpu::graph::{DType, Graph, Node, Statistics, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static WEIGHTS: Source = source!("winograd/weights.wgsl", "lib/linear.wgsl");
static OUTPUT: Source =
    source!("winograd/output.wgsl", "lib/linear.wgsl", "lib/epilogue.wgsl", "lib/ended_tile.wgsl", "lib/winograd.wgsl");
/// Where tiles lie.
pub(crate) static TILES: Source = source!("lib/winograd.wgsl");

/// None of the convolutions, or those after norms in tiles of 2x2 or of two pixels. That is not timed on a card yet: it is taken only where it is asked for, by
/// name.
pub static VARIANTS: &[Row] = &[("none", |_| true), ("f2x2", |caps| !caps.is_cpu()), ("f2", |caps| !caps.is_cpu())];

/// Pixels whose outputs are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tiles {
    /// F(2x2, 3x3): four pixels of 4x4 inputs by sixteen products.
    Square,
    /// F(2, 3): two pixels side by side by four products, each over three lines of taps.
    Pair,
}

impl Tiles {
    /// Pixels of one.
    pub(crate) fn pixels(self) -> u32 {
        match self {
            Tiles::Square => 4,
            Tiles::Pair => 2,
        }
    }

    /// Products, and inputs of one.
    fn products(self) -> u32 {
        self.pixels() * self.pixels()
    }

    /// Taps of each of them.
    fn taps(self) -> u32 {
        match self {
            Tiles::Square => 1,
            Tiles::Pair => 3,
        }
    }

    /// Do they cover pictures of [h, w]?
    pub(crate) fn cover(self, [h, w]: [u32; 2]) -> bool {
        w.is_multiple_of(2) && (self == Tiles::Pair || h.is_multiple_of(2))
    }
}

/// The size of the transforms of images of [B, H, W, C]: of every product's A, an image of tiles.
pub(crate) fn dims(tiles: Tiles, [batch, h, w]: [u32; 3], channels: u32) -> [u32; 4] {
    [tiles.products() * batch, 2 * h / tiles.pixels(), w / 2, channels]
}

/// Transformed weights.
#[derive(Clone, Copy, Debug)]
pub struct Transformed {
    /// [products, taps, C, C_out]
    pub weight: Tensor,
    /// Of what.
    pub tiles: Tiles,
}

impl Transformed {
    /// The same of another tensor: where it is bound elsewhere.
    pub fn map(&self, mut of: impl FnMut(Tensor) -> Tensor) -> Transformed {
        Transformed { weight: of(self.weight), tiles: self.tiles }
    }
}

/// The products of so many pixels.
fn shape(tiles: Tiles, pixels: u32, [c, n]: [u32; 2]) -> Shape {
    let slices = tiles.products();
    Shape { m: pixels / tiles.pixels(), n, k: tiles.taps() * c, slices, depth: c, whole: 0, apart: true }
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

/// Record the weights that [`winograd`] takes (`kernels/winograd/weights.wgsl`): from the layer alone, so once is enough. None where a picture
/// of [h, w] is not convolved so.
pub fn fold(g: &mut Graph, layer: &Conv, size: [u32; 2]) -> Option<Transformed> {
    let [_, _, k, n] = layer.weight.dims;
    let c = k / 9;
    let tiles = match g.forced_variant("winograd") {
        Some("f2x2") => Tiles::Square,
        Some("f2") => Tiles::Pair,
        _ => return None,
    };
    // Packed weights are not transformed, and a tile's norms are not its own.
    let takes = layer.kernel == 3 && layer.weight.dtype != DType::Packed && matches!(g.statistics, Statistics::Own);
    if !(takes && tiles.cover(size)) {
        return None;
    }
    // A sum of f16 weights is no f16: where all else is f32 it stays exact.
    let dtype = if g.operands == DType::F32 { DType::F32 } else { layer.weight.dtype };
    // As many rows as make a tile: how many there are is not known yet.
    multiplied_by(g, &shape(tiles, (size[0] * size[1]).max(256), [c, n]), dtype)?;
    let weight = layer.weight.bind(g);
    let folded = g.weights("transformed weights", [tiles.products(), tiles.taps(), c, n], dtype);
    g.push(Node {
        op: "winograd_fold",
        variant: "portable",
        kernel: Kernel {
            source: &WEIGHTS,
            libs: vec![],
            head: vec![
                ("weight4", vec4_of(weight.dtype)),
                ("folded4", vec4_of(dtype)),
                (TILED, Value::U32(tiles.pixels())),
            ],
        },
        reads: vec![weight],
        writes: vec![folded],
        dims: vec![c, n / 4],
        step: false,
        grid: linear_grid(u64::from(c) * u64::from(n / 4), 64),
        flops: 2 * folded.len(),
    });
    Some(Transformed { weight: folded, tiles })
}

/// Can the transforms of images of [B, H, W], and their products by these weights, be bound?
pub fn fits(g: &Graph, size: [u32; 3], weights: &Transformed) -> bool {
    let [_, _, c, n] = weights.weight.dims;
    let bytes = |channels, dtype: DType| {
        dims(weights.tiles, size, channels).iter().map(|&d| u64::from(d)).product::<u64>() * dtype.bytes()
    };
    bytes(c, g.operands).max(bytes(n, DType::F32)) <= g.caps().max_binding
}

/// Record a 3x3 convolution of what [`super::group_norm::group_norm_to_tiles`] left of images of [B, H, W], with [`fold`]'s weights:
/// [B, H, W, C_out].
pub fn winograd(
    g: &mut Graph,
    transforms: Tensor,
    [batch, h, w]: [u32; 3],
    (weights, bias): (Transformed, Option<&Param>),
    epilogue: Epilogue,
) -> Tensor {
    let Transformed { weight, tiles } = weights;
    let [_, _, c, n] = weight.dims;
    let rows = batch * h * w;
    assert_eq!(
        transforms.dims,
        dims(tiles, [batch, h, w], c),
        "winograd: [{batch}, {h}, {w}] with weights {:?}",
        weight.dims
    );
    assert_residual("winograd", &epilogue, rows, n);
    let shape = shape(tiles, rows, [c, n]);
    let way = format!("{:?} {:?} {tiles:?}", transforms.dtype, weight.dtype);
    let method = multiplied_by(g, &shape, weight.dtype);
    let Some(cut) = method.and_then(|method| product::pick_cut(g, "winograd", &shape, &way, method)) else {
        unreachable!("winograd: weights were transformed for {:?}", transforms.dims)
    };
    let (sources, head, dims, reads) = match tiles {
        Tiles::Square => (matmul::SOURCES, vec![], vec![shape.m, n / 4, c / 4], vec![transforms, weight]),
        Tiles::Pair => {
            let (head, dims) = conv2d::lines([batch, h, w / 2], [c, n]);
            (conv2d::SOURCES, head, dims, vec![transforms, transforms, weight])
        }
    };
    let product = Product {
        op: "winograd",
        sources,
        shape,
        cut,
        head,
        dims,
        reads,
        narrowed: false,
        out: [tiles.products(), 1, shape.m, n],
        epilogue: &Epilogue::default(),
        bias: None,
    };
    let shares = product::record_shares(g, product);
    let (mut head, [bias, residual], words) = epilogue.parts(g, bias, shares, rows);
    let size = [batch, h, w, n];
    let out = if epilogue.f32_out { g.activation_f32("winograd", size) } else { g.activation("winograd", size) };
    head.extend([
        ("SPLITS", Value::U32(cut.shares)),
        (TILED, Value::U32(tiles.pixels())),
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
        grid: linear_grid(u64::from(shape.m) * u64::from(n / 4), 64),
        flops: shares.len() * 2,
    });
    g.picked();
    out
}
