//! layer_norm: normalise the channels of each token.

use super::{Norm, Variant, choose, source, vec4_of};
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static PORTABLE: Source = source!("layer_norm/portable.wgsl", "lib/linear.wgsl");
static WORKGROUP: Source = source!("layer_norm/workgroup.wgsl");

/// The variants by rows, the fastest first.
pub static VARIANTS: &[Variant<u32>] = &[
    Variant {
        name: "workgroup",
        source: &WORKGROUP,
        needs: |caps| !caps.is_cpu(),
        fits: |_| true,
        grid: |rows| linear_grid(u64::from(*rows), 1),
    },
    Variant {
        name: "portable",
        source: &PORTABLE,
        needs: |_| true,
        fits: |_| true,
        grid: |rows| linear_grid(u64::from(*rows), 64),
    },
];

/// Record layer norm of x [B, H, W, C] over C.
pub fn layer_norm(g: &mut Graph, x: Tensor, norm: &Norm) -> Tensor {
    assert_eq!(norm.gamma.dims[3], x.channels(), "layer_norm: gamma for {:?}", x.dims);
    let rows = x.rows();
    let variant = choose(g, "layer_norm", VARIANTS, &rows);
    let (gamma, beta) = (norm.gamma.bind(g), norm.beta.bind(g));
    let out = g.activation("layer norm", x.dims);
    assert_eq!(out.dtype, x.dtype, "layer_norm: input and output types");
    g.push(Node {
        op: "layer_norm",
        variant: variant.name,
        kernel: Kernel { source: variant.source, libs: vec![], head: vec![("elem4", vec4_of(x.dtype))] },
        reads: vec![x, gamma, beta],
        writes: vec![out],
        dims: vec![rows, x.channels() / 4, norm.eps.to_bits()],
        step: false,
        grid: (variant.grid)(&rows),
        flops: 7 * x.len(),
    });
    out
}
