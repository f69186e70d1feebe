//! matmul: C = act(A B + bias) + residual, A [M, K] activations, B [K, N] weights.

use super::product::{self, Product};
use super::tiles::{Layout, Method, Shape};
use super::{Activation, Epilogue, Linear, Variant, assert_residual, source, vec4_of, weight_lib};
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

/// The kernel's dims.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of A and C.
    pub m: u32,
    /// Columns of B, in groups of four.
    pub n4: u32,
    /// Depth, in groups of four.
    pub k4: u32,
    /// Do size and types suit matrix units?
    pub coop: bool,
    /// Does the size suit tiles of multiply-adds?
    pub tile: bool,
    /// Are both sides f16?
    pub half: bool,
}

static PORTABLE: Source = source!("matmul/portable.wgsl", "lib/linear.wgsl", "lib/epilogue.wgsl");
static REGISTER: Source = source!("matmul/register.wgsl", "lib/rows_each.wgsl", "lib/epilogue.wgsl");
static SUBGROUP: Source = source!("matmul/register.wgsl", "lib/rows_shared.wgsl", "lib/epilogue.wgsl");
static COOP: Source =
    source!("matmul/tiles.wgsl", "lib/coop.wgsl", "lib/halves.wgsl", "lib/row.wgsl", "lib/row_sums.wgsl");
static TILE: Source = source!("matmul/tiles.wgsl", "lib/tile.wgsl");

/// The product in tiles: on matrix units, and by multiply-adds.
pub(crate) static SOURCES: [&Source; 2] = [&COOP, &TILE];

/// The variants, the fastest first.
pub static VARIANTS: &[Variant<Dims>] = &[
    Variant {
        name: "subgroup",
        source: &SUBGROUP,
        needs: |caps| caps.is_cpu() && caps.subgroup_of(8),
        fits: |d| d.m >= 8 && d.m <= 64 * 65_535,
        grid: |d| [d.m.div_ceil(64), d.n4.div_ceil(8), 1],
    },
    Variant {
        name: "register",
        source: &REGISTER,
        needs: |caps| caps.is_cpu(),
        fits: |d| d.m >= 8 && d.m <= 64 * 65_535,
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
        fits: |d| d.m >= 8 && d.tile,
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

fn shape(a: Tensor, layer: &Linear) -> Shape {
    let [_, _, k, n] = layer.weight.dims;
    Shape { m: a.rows(), n, k, slices: 1, depth: k, whole: 0, apart: false }
}

/// Can matrix units multiply `a` by this layer?
pub(crate) fn on_units(g: &Graph, a: Tensor, layer: &Linear) -> bool {
    product::fits(g, &shape(a, layer), Layout::Rows, [a.dtype, layer.weight.dtype])
}

/// Record C = act(A B + bias) + residual. A: [B, H, W, K]; C: [B, H, W, N], or N/2 with GEGLU.
pub fn matmul(g: &mut Graph, a: Tensor, layer: &Linear, epilogue: Epilogue) -> Tensor {
    let [_, _, k, n] = layer.weight.dims;
    assert_eq!(a.channels(), k, "matmul: A {:?} with weights [{k}, {n}]", a.dims);
    let (shape, suits) = (shape(a, layer), on_units(g, a, layer));
    let half = [a.dtype, layer.weight.dtype] == [DType::F16; 2];
    let dims = Dims { m: a.rows(), n4: n / 4, k4: k / 4, coop: suits, tile: product::tiled(g, &shape), half };
    let form = format!("{:?} {:?} {:?}", a.dtype, layer.weight.dtype, epilogue.activation);
    let (variant, cut) = match epilogue.normed {
        None => product::pick(g, ("matmul", VARIANTS), &dims, &shape, &form),
        Some(_) => {
            let cut = product::pick_cut(g, "matmul", &shape, &form, Method::Coop);
            assert!(cut.is_some() && suits, "matmul: rows of {:?} are scaled on matrix units only", a.dims);
            (&VARIANTS[0], cut)
        }
    };
    let geglu = epilogue.activation == Activation::Geglu;
    let columns = if geglu { n / 2 } else { n };
    assert!(
        !geglu || (n.is_multiple_of(8) && epilogue.residual.is_none()),
        "matmul: GEGLU of {n} columns, or with a residual"
    );
    assert_residual("matmul", &epilogue, a.rows(), columns);
    let b = layer.weight.bind(g);
    let size = [a.dims[0], a.dims[1], a.dims[2], columns];
    if let Some(cut) = cut {
        let (bias, epilogue) = (layer.bias.as_ref(), &epilogue);
        let dims = vec![dims.m, dims.n4, dims.k4];
        let product = Product {
            op: "matmul",
            sources: SOURCES,
            shape,
            cut,
            head: vec![],
            dims,
            reads: vec![a, b],
            narrowed: false,
            out: size,
            epilogue,
            bias,
        };
        let out = product::record(g, product);
        g.picked();
        return out;
    }
    let (mut head, [bias, residual], words) = epilogue.parts(g, layer.bias.as_ref(), a, dims.m);
    let out = if epilogue.f32_out { g.activation_f32("matmul", size) } else { g.activation("matmul", size) };
    head.extend([("elem4", vec4_of(a.dtype)), ("weight4", vec4_of(b.dtype)), ("out4", vec4_of(out.dtype))]);
    g.push(Node {
        op: "matmul",
        variant: variant.name,
        kernel: Kernel { source: variant.source, libs: vec![weight_lib(b.dtype)], head },
        reads: vec![a, b, bias, residual],
        writes: vec![out],
        dims: [&[dims.m, dims.n4, dims.k4][..], &words].concat(),
        step: false,
        grid: (variant.grid)(&dims),
        flops: 2 * u64::from(dims.m) * u64::from(n) * u64::from(k),
    });
    g.picked();
    out
}

/// Element types (A, B, C) that the networks use; tests run all of them.
pub const TYPES: &[(DType, DType, DType)] = &[
    (DType::F32, DType::F32, DType::F32),
    (DType::F32, DType::Packed, DType::F32),
    (DType::F32, DType::F16, DType::F32),
    (DType::F16, DType::F16, DType::F16),
    (DType::F16, DType::F16, DType::F32),
];
