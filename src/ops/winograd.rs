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

/// What convolutions after norms run in: each in what should be fastest, none in tiles, all in tiles of 2x2, all in tiles of two pixels. Transformed weights take
/// twice the memory of others, and what a device that does not tell has to spare nobody knows.
pub static VARIANTS: &[Row] = &[
    ("estimated", |caps| !caps.is_cpu() && caps.memory.is_some()),
    ("none", |_| true),
    ("f2x2", |caps| !caps.is_cpu()),
    ("f2", |caps| !caps.is_cpu()),
];

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
    // Packed weights are not transformed, and a tile's norms are not its own.
    let own = matches!(g.statistics, Statistics::Own);
    if layer.kernel != 3 || layer.weight.dtype == DType::Packed || !own || g.frugal {
        return None;
    }
    // A sum of f16 weights is no f16: where all else is f32 it stays exact.
    let dtype = if g.operands == DType::F32 { DType::F32 } else { layer.weight.dtype };
    // Who names a kernel of convolutions wants to see that.
    let wanted = || g.forced_variant("conv2d").is_none() && (VARIANTS[0].1)(g.caps());
    let tiles = match g.forced_variant("winograd") {
        Some("f2x2") => Tiles::Square,
        Some("f2") => Tiles::Pair,
        Some("estimated") => fastest(g, size, [c, n], dtype)?,
        None if wanted() => fastest(g, size, [c, n], dtype)?,
        _ => return None,
    };
    if !(tiles.cover(size) && room(g, tiles, [1, size[0], size[1]], [c, n])) {
        return None;
    }
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

/// The tiles that should be fastest for pictures of [h, w] and [C, C_out] channels, none if that is the direct convolution. Estimated for two pictures, cond's and
/// uncond's: weights are transformed once for all batches.
fn fastest(g: &Graph, [h, w]: [u32; 2], [c, n]: [u32; 2], weights: DType) -> Option<Tiles> {
    let pixels = 2 * h * w;
    if h * w < LEAST {
        return None;
    }
    let direct = Shape { m: pixels, n, k: 9 * c, slices: 1, depth: c, whole: 0, apart: false };
    let method = multiplied_by(g, &direct, weights)?;
    let time = |tiles: Tiles| {
        let shape = shape(tiles, pixels, [c, n]);
        // Beside the direct one's: transforms for pixels, and products, written and read. Through the cache while they fit there.
        let more = u64::from(tiles.products() / tiles.pixels() - 1) * u64::from(pixels * c) * g.operands.bytes()
            + u64::from(tiles.products() / tiles.pixels()) * u64::from(pixels * n) * g.dtype.bytes();
        let rate = if more > CACHED { 4200 } else { 7400 };
        (multiplied_by(g, &shape, weights) == Some(method)).then_some(())?;
        Some(product::estimate(g, &shape, method)? + 2 * more / rate)
    };
    let square = time(Tiles::Square).filter(|_| Tiles::Square.cover([h, w])).map(|time| (time, Tiles::Square));
    let pair = time(Tiles::Pair).filter(|_| Tiles::Pair.cover([h, w])).map(|time| (time, Tiles::Pair));
    let best = square.into_iter().chain(pair).min_by_key(|(time, _)| *time)?;
    let direct = product::estimate(g, &direct, method)?;
    (best.0 < direct).then_some(best.1)
}

/// Bytes that stay in a large GPU's cache from one dispatch to the next.
const CACHED: u64 = 40 << 20;
/// Pixels of an image of which more are to be had than weights: of fewer, the weights are what is read, and there are 12 or 16 for 9.
const LEAST: u32 = 256;

/// Bytes that any device has for transforms and products of a convolution; large ones have more.
const FEW: u64 = 256 << 20;

/// Can the transforms of images of [B, H, W], and their products by these weights, be bound, and are they few for the device?
pub fn fits(g: &Graph, size: [u32; 3], weights: &Transformed) -> bool {
    let [_, _, c, n] = weights.weight.dims;
    room(g, weights.tiles, size, [c, n])
}

/// See [`fits`].
fn room(g: &Graph, tiles: Tiles, size: [u32; 3], [c, n]: [u32; 2]) -> bool {
    let bytes = |channels, dtype: DType| {
        dims(tiles, size, channels).iter().map(|&d| u64::from(d)).product::<u64>() * dtype.bytes()
    };
    let (transforms, products) = (bytes(c, g.operands), bytes(n, g.dtype));
    let most = g.caps().memory.map_or(0, |memory| memory / 64).max(FEW);
    transforms.max(products) <= g.caps().max_binding && transforms + products <= most
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
        ("share4", vec4_of(shares.dtype)),
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

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use pollster::block_on;

    use super::*;
    use crate::gpu::Gpu;
    use crate::gpu::noop::NoopProfile;

    /// Where a device does not tell its memory, or a kernel is named, only by name.
    #[test]
    fn weights_are_transformed_where_there_is_memory() {
        let folded = |profile: &NoopProfile| {
            let gpu = block_on(Gpu::noop(profile)).expect("noop");
            let buffer = block_on(gpu.storage("weight", 9 * 640 * 640 * 2)).expect("a buffer");
            let weight = Param { buffer, dims: [1, 1, 9 * 640, 640], dtype: DType::F16 };
            fold(&mut Graph::new(&gpu, DType::F16), &Conv { weight, bias: None, kernel: 3 }, [32; 2]).is_some()
        };
        let h200 = NoopProfile { memory: Some(1 << 37), ..NoopProfile::H200 };
        let silent = NoopProfile { memory: None, ..h200 };
        assert!(folded(&h200) && !folded(&silent));
        assert!(folded(&NoopProfile { variants: &[("winograd", "estimated")], ..silent }));
        assert!(!folded(&NoopProfile { variants: &[("conv2d", "coop")], ..h200 }));
        assert!(!folded(&NoopProfile { variants: &[("winograd", "none")], ..h200 }));
    }

    /// By estimate, as measured on an H200 (benches/NOTES.md).
    #[test]
    fn tiles_suit_the_shapes() {
        let gpu = block_on(Gpu::noop(&NoopProfile::H200)).expect("noop");
        let g = Graph::new(&gpu, DType::F16);
        let best = |size, channels| fastest(&g, [size; 2], channels, DType::F16);
        assert_eq!(best(64, [320, 320]), Some(Tiles::Pair));
        assert_eq!(best(32, [640, 640]), Some(Tiles::Square));
        assert_eq!(best(16, [2560, 1280]), Some(Tiles::Square));
        assert_eq!(best(512, [128, 128]), None, "what the products save, memory takes");
        assert_eq!(best(33, [640, 640]), None, "odd");
    }
}
