//! layer_norm: normalise the channels of each token.

use super::{Norm, Variant, choose, source, vec4_of};
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("layer_norm/portable.wgsl", "lib/linear.wgsl");
static WORKGROUP: Source = source!("layer_norm/workgroup.wgsl");
static SUBGROUP: Source = source!("layer_norm/subgroup.wgsl");

/// What the table looks at.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows.
    pub rows: u32,
    /// Groups of four channels that a lane of a subgroup would hold.
    pub per: u32,
}

/// Rows of a workgroup of the `subgroup` variant.
const ROWS: u32 = 4;

/// The variants, the fastest first.
pub static VARIANTS: &[Variant<Dims>] = &[
    Variant {
        name: "subgroup",
        source: &SUBGROUP,
        needs: |caps| !caps.is_cpu() && caps.lanes().is_some_and(|lanes| lanes * ROWS <= caps.invocations),
        // More leave registers.
        fits: |d| d.per <= 16,
        grid: |d| linear_grid(u64::from(d.rows.div_ceil(ROWS)), 1),
    },
    Variant {
        name: "workgroup",
        source: &WORKGROUP,
        needs: |caps| !caps.is_cpu(),
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.rows), 1),
    },
    Variant {
        name: "portable",
        source: &PORTABLE,
        needs: |_| true,
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.rows), 64),
    },
];

/// Record layer norm of x [B, H, W, C] over C.
pub fn layer_norm(g: &mut Graph, x: Tensor, norm: &Norm) -> Tensor {
    assert_eq!(norm.gamma.dims[3], x.channels(), "layer_norm: gamma for {:?}", x.dims);
    let rows = x.rows();
    let lanes = g.caps().lanes().unwrap_or(1);
    let dims = Dims { rows, per: (x.channels() / 4).div_ceil(lanes) };
    let variant = choose(g, "layer_norm", VARIANTS, &dims);
    let mut head = vec![("elem4", vec4_of(x.dtype))];
    if variant.name == "subgroup" {
        let values = [("LANES", lanes), ("PER", dims.per), ("ROWS", ROWS)];
        head.extend(values.map(|(name, value)| (name, Value::U32(value))));
    }
    let (gamma, beta) = (norm.gamma.bind(g), norm.beta.bind(g));
    let out = g.activation("layer norm", x.dims);
    assert_eq!(out.dtype, x.dtype, "layer_norm: input and output types");
    g.push(Node {
        op: "layer_norm",
        variant: variant.name,
        kernel: Kernel { source: variant.source, libs: vec![], head },
        reads: vec![x, gamma, beta],
        writes: vec![out],
        dims: vec![rows, x.channels() / 4, norm.eps.to_bits()],
        step: false,
        grid: (variant.grid)(&dims),
        flops: 7 * x.len(),
    });
    out
}
