//! conv2d: 1x1 and 3x3 convolution, channels last, as an implicit matrix product over taps and channels.

use super::narrow::narrow;
use super::product::{self, Product};
use super::tiles::{Layout, Method, Shape};
use super::{Activation, Conv, Epilogue, Variant, assert_residual, source, vec4_of, weight_lib};
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

/// What the tables look at.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Output pixels of the batch.
    pub m: u32,
    /// Output channels, in groups of four.
    pub n4: u32,
    /// Do size and types suit matrix units?
    pub coop: bool,
    /// Does the size suit tiles of multiply-adds?
    pub tile: bool,
    /// Are both sides f16?
    pub half: bool,
}

static PORTABLE: Source = source!("conv2d/portable.wgsl", "lib/conv.wgsl", "lib/linear.wgsl", "lib/epilogue.wgsl");
static REGISTER: Source = source!("conv2d/register.wgsl", "lib/rows_each.wgsl", "lib/conv.wgsl", "lib/epilogue.wgsl");
static SUBGROUP: Source = source!("conv2d/register.wgsl", "lib/rows_shared.wgsl", "lib/conv.wgsl", "lib/epilogue.wgsl");
static FOLD: Source = source!("conv2d/fold.wgsl", "lib/linear.wgsl");
static COOP: Source = source!("conv2d/tiles.wgsl", "lib/conv.wgsl", "lib/coop.wgsl", "lib/halves.wgsl");
static TILE: Source = source!("conv2d/tiles.wgsl", "lib/conv.wgsl", "lib/tile.wgsl");

/// The convolution in tiles: on matrix units, and by multiply-adds.
pub(super) static SOURCES: [&Source; 2] = [&COOP, &TILE];

/// The variants, the fastest first.
pub static VARIANTS: &[Variant<Dims>] = &[
    Variant {
        name: "subgroup",
        source: &SUBGROUP,
        needs: |caps| caps.is_cpu() && caps.subgroup_of(8),
        fits: |d| d.m <= 64 * 65_535,
        grid: |d| [d.m.div_ceil(64), d.n4.div_ceil(8), 1],
    },
    Variant {
        name: "register",
        source: &REGISTER,
        needs: |caps| caps.is_cpu(),
        fits: |d| d.m <= 64 * 65_535,
        grid: |d| [d.m.div_ceil(64), d.n4.div_ceil(8), 1],
    },
    Variant {
        name: "coop",
        source: &COOP,
        needs: |caps| caps.coop().is_some(),
        fits: |d| d.coop,
        // By the tile: see tiles.rs.
        grid: |_| [1, 1, 1],
    },
    Variant {
        name: "tile",
        source: &TILE,
        needs: |caps| !caps.is_cpu(),
        fits: |d| d.tile,
        // By the tile: see tiles.rs.
        grid: |_| [1, 1, 1],
    },
    Variant {
        name: "half",
        source: &TILE,
        // Less exact than the others: taken only where it is asked for, by name.
        needs: |caps| !caps.is_cpu() && caps.f16,
        fits: |d| d.half && d.tile && d.m >= 8,
        grid: |_| [1, 1, 1],
    },
    Variant {
        name: "portable",
        source: &PORTABLE,
        needs: |_| true,
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.m) * u64::from(d.n4.div_ceil(2)), 64),
    },
];

/// How the taps move over the input.
#[derive(Clone, Copy, Debug)]
pub struct Taps {
    /// Output stride, 1 or 2.
    pub stride: u32,
    /// Zero rows above and below, columns left and right: [before, after]. Same for both axes.
    pub pad: [u32; 2],
    /// Resize the input to [H, W] by nearest neighbour before the taps.
    pub resize: Option<[u32; 2]>,
}

impl Taps {
    /// Stride 1, size kept.
    pub fn same(kernel: u32) -> Self {
        Taps { stride: 1, pad: [kernel / 2; 2], resize: None }
    }

    /// Stride 2, pad 1 all around: sizes halve, rounded up (the UNet's down-sampling).
    pub fn half() -> Self {
        Taps { stride: 2, pad: [1, 1], resize: None }
    }

    /// Stride 2, padded below and to the right only: sizes halve, rounded down (the VAE encoder's).
    pub fn half_after() -> Self {
        Taps { stride: 2, pad: [0, 1], resize: None }
    }

    /// Nearest-neighbour resize to [H, W], then stride 1.
    pub fn resized(size: [u32; 2]) -> Self {
        Taps { stride: 1, pad: [1, 1], resize: Some(size) }
    }
}

/// Record a convolution of x [B, H, W, C], or of x and y [B, H, W, C'] side by side along the channels.
/// The result is [B, H', W', C_out].
pub fn conv2d(g: &mut Graph, x: Tensor, y: Option<Tensor>, layer: &Conv, taps: Taps, epilogue: Epilogue) -> Tensor {
    let [batch, src_h, src_w, x_channels] = x.dims;
    let y_channels = y.map_or(0, |y| y.channels());
    let [_, _, k, n] = layer.weight.dims;
    let kernel = layer.kernel;
    assert_eq!(
        k,
        kernel * kernel * (x_channels + y_channels),
        "conv2d: {:?} + {y_channels} with weights [{k}, {n}]",
        x.dims
    );
    assert!(
        y.is_none_or(|y| y.dims[..3] == x.dims[..3] && y.dtype == x.dtype),
        "conv2d: two sources of different shape"
    );
    let [in_h, in_w] = taps.resize.unwrap_or([src_h, src_w]);
    let size = |n: u32| (n + taps.pad[0] + taps.pad[1] - kernel) / taps.stride + 1;
    let shape = [batch, size(in_h), size(in_w), n];
    let m = shape[0] * shape[1] * shape[2];
    let product = Shape { m, n, k, slices: 1, depth: common_divisor(x_channels, y_channels), whole: 0, apart: false };
    let coop = product::fits(g, &product, Layout::Rows, [x.dtype, layer.weight.dtype]);
    let half = [x.dtype, layer.weight.dtype] == [DType::F16; 2];
    let dims = Dims { m, n4: n / 4, coop, tile: product::tiled(g, &product), half };
    let way = format!("{:?} {:?} {kernel} {} {}", x.dtype, layer.weight.dtype, taps.stride, taps.resize.is_some());
    let (variant, cut) = product::pick(g, ("conv2d", VARIANTS), &dims, &product, &way);
    assert!(epilogue.activation != Activation::Geglu, "conv2d: no network has GEGLU after a convolution");
    assert_residual("conv2d", &epilogue, dims.m, n);
    let b = layer.weight.bind(g);
    let form = [
        ("KERNEL", Value::U32(kernel)),
        ("TWO_SOURCES", Value::Bool(y.is_some())),
        ("RESIZE", Value::Bool(taps.resize.is_some())),
    ];
    let geometry = [
        dims.m,
        dims.n4,
        shape[1],
        shape[2],
        in_h,
        in_w,
        x_channels / 4,
        y_channels / 4,
        taps.stride,
        taps.pad[0],
        src_h,
        src_w,
    ];
    // PyTorch's nearest: f32 scale = in / out, source index = floor(index * scale).
    let scales = [src_h as f32 / in_h as f32, src_w as f32 / in_w as f32].map(f32::to_bits);
    let dims_words = [&geometry[..], &scales].concat();
    if let Some(cut) = cut {
        let (x, narrowed) = narrowed(g, x, cut.tile.method, kernel, y.is_none());
        let reads = vec![x, y.unwrap_or(x), b];
        let linear = taps.stride == 1 && taps.resize.is_none() && shape[1..3] == [src_h, src_w];
        let head = [&form[..], &[("LINEAR", Value::Bool(linear))]].concat();
        let (bias, epilogue) = (layer.bias.as_ref(), &epilogue);
        let dims = dims_words;
        let product = Product {
            op: "conv2d",
            sources: SOURCES,
            shape: product,
            cut,
            head,
            dims,
            reads,
            narrowed,
            out: shape,
            epilogue,
            bias,
        };
        let out = product::record(g, product);
        g.picked();
        return out;
    }
    let reads = vec![x, y.unwrap_or(x), b];
    let (mut head, [bias, residual], words) = epilogue.parts(g, layer.bias.as_ref(), x, dims.m);
    let out = if epilogue.f32_out { g.activation_f32("conv2d", shape) } else { g.activation("conv2d", shape) };
    head.extend(form);
    head.extend([("elem4", vec4_of(x.dtype)), ("weight4", vec4_of(b.dtype)), ("out4", vec4_of(out.dtype))]);
    g.push(Node {
        op: "conv2d",
        variant: variant.name,
        kernel: Kernel { source: variant.source, libs: vec![weight_lib(b.dtype)], head },
        reads: [reads, vec![bias, residual]].concat(),
        writes: vec![out],
        dims: [dims_words, words.to_vec()].concat(),
        step: false,
        grid: (variant.grid)(&dims),
        flops: 2 * u64::from(dims.m) * u64::from(n) * u64::from(k),
    });
    g.picked();
    out
}

/// f32 activations for matrix units, where each is read at several taps: in f16, once. And whether that was done.
fn narrowed(g: &mut Graph, x: Tensor, method: Method, kernel: u32, alone: bool) -> (Tensor, bool) {
    match method == Method::Coop && x.dtype == DType::F32 && kernel > 1 && alone {
        true => (narrow(g, x), true),
        false => (x, false),
    }
}

/// A doubled picture's convolution as [`doubled`] runs it: x has `pixels`, in the graph's element type.
fn doubled_shape(layer: &Conv, pixels: u32) -> Shape {
    let [_, _, k, n] = layer.weight.dims;
    Shape { m: pixels, n, k: k / 9 * 4, slices: 4, depth: k / 9, whole: 0, apart: false }
}

/// What multiplies a doubled picture's convolution here; none where it is resized instead.
fn doubled_by(g: &Graph, shape: &Shape, x: DType, weights: DType) -> Option<Method> {
    let coop = product::fits(g, shape, Layout::Rows, [x, weights]).then_some(Method::Coop);
    // Packed weights are not added.
    let tile = (weights != DType::Packed && product::tiled(g, shape)).then_some(Method::Tile);
    match g.forced_variant("conv2d") {
        Some("coop") => coop,
        Some("tile") => tile,
        Some(_) => None,
        None if g.caps().is_cpu() => None,
        None => coop.or(tile),
    }
}

/// Record the weights that [`doubled`] takes, [1, 1, 16·C, C_out] (`kernels/conv2d/fold.wgsl`): from the layer alone, so once is
/// enough. None where a picture of that many pixels and more would not be doubled so; then [`conv2d`] resizes.
pub fn fold(g: &mut Graph, layer: &Conv, pixels: u32) -> Option<Tensor> {
    let shape = doubled_shape(layer, pixels);
    doubled_by(g, &shape, g.dtype, layer.weight.dtype).filter(|_| layer.kernel == 3)?;
    let weight = layer.weight.bind(g);
    let [_, _, k, n] = weight.dims;
    // A sum of f16 weights is no f16: where all else is f32 it stays exact.
    let dtype = if g.operands == DType::F32 { DType::F32 } else { weight.dtype };
    let folded = g.weights("folded weights", [1, 1, k / 9 * 16, n], dtype);
    g.push(Node {
        op: "conv2d_fold",
        variant: "portable",
        kernel: Kernel {
            source: &FOLD,
            libs: vec![],
            head: vec![("weight4", vec4_of(weight.dtype)), ("folded4", vec4_of(dtype))],
        },
        reads: vec![weight],
        writes: vec![folded],
        dims: vec![k / 9, n / 4],
        step: false,
        grid: linear_grid(folded.len() / 4, 64),
        flops: folded.len(),
    });
    Some(folded)
}

/// Record a 3x3 convolution of x [B, H, W, C] after doubling by nearest neighbour, with [`fold`]'s weights: [B, 2·H, 2·W, C_out], for 4/9
/// of the work.
pub fn doubled(g: &mut Graph, x: Tensor, layer: &Conv, folded: Tensor, epilogue: Epilogue) -> Tensor {
    let [batch, h, w, c] = x.dims;
    let shape = doubled_shape(layer, x.rows());
    assert_eq!([c * 16, shape.n], folded.dims[2..], "conv2d: {:?} with folded weights {:?}", x.dims, folded.dims);
    assert_residual("conv2d", &epilogue, 4 * shape.m, shape.n);
    let way = format!("{:?} {:?} doubled", x.dtype, folded.dtype);
    let method = doubled_by(g, &shape, x.dtype, folded.dtype);
    let Some(cut) = method.and_then(|method| product::pick_cut(g, "conv2d", &shape, &way, method)) else {
        unreachable!("conv2d: weights were folded for {:?}", x.dims)
    };
    let head = vec![
        ("KERNEL", Value::U32(2)),
        ("DOUBLED", Value::Bool(true)),
        ("TWO_SOURCES", Value::Bool(false)),
        ("RESIZE", Value::Bool(false)),
        ("LINEAR", Value::Bool(true)),
    ];
    let one = 1f32.to_bits();
    let dims = vec![shape.m, shape.n / 4, h, w, h, w, c / 4, 0, 1, 0, h, w, one, one];
    let (x, narrowed) = narrowed(g, x, cut.tile.method, 3, true);
    let (reads, out) = (vec![x, x, folded], [batch, 2 * h, 2 * w, shape.n]);
    let (bias, epilogue, sources) = (layer.bias.as_ref(), &epilogue, SOURCES);
    let product = Product { op: "conv2d", sources, shape, cut, head, dims, reads, narrowed, out, epilogue, bias };
    let out = product::record(g, product);
    g.picked();
    out
}

/// Head values and dims of convolutions by three lines of one tap, side by side, each of images [B, H, W] of its own, of [C, C_out] channels.
pub(super) fn lines([b, h, w]: [u32; 3], [c, n]: [u32; 2]) -> (Vec<(&'static str, Value)>, Vec<u32>) {
    let head = vec![
        ("KERNEL", Value::U32(3)),
        ("COLUMNS", Value::U32(1)),
        ("SLICED", Value::Bool(true)),
        ("TWO_SOURCES", Value::Bool(false)),
        ("RESIZE", Value::Bool(false)),
        ("LINEAR", Value::Bool(true)),
    ];
    let one = 1f32.to_bits();
    (head, vec![b * h * w, n / 4, h, w, h, w, c / 4, 0, 1, 1, h, w, one, one])
}

/// Head values and dims of a product by channels of two sources side by side, [B, H, W, K] and [B, H, W, C], to `n` columns.
pub(super) fn beside([k, c]: [u32; 2], [b, h, w]: [u32; 3], n: u32) -> (Vec<(&'static str, Value)>, Vec<u32>) {
    let head = vec![
        ("KERNEL", Value::U32(1)),
        ("TWO_SOURCES", Value::Bool(true)),
        ("RESIZE", Value::Bool(false)),
        ("LINEAR", Value::Bool(true)),
    ];
    let one = 1f32.to_bits();
    (head, vec![b * h * w, n / 4, h, w, h, w, k / 4, c / 4, 1, 0, h, w, one, one])
}

/// The greatest number that divides both (0 is divided by every number).
pub(super) fn common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { common_divisor(b, a % b) }
}
