//! narrow: f32 activations scaled down to f16, once, for a product on matrix units that would do so at each of its taps.

use super::{source, vec4_of};
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static PORTABLE: Source = source!("narrow/portable.wgsl", "lib/linear.wgsl");

/// Record x [B, H, W, C] f32 as f16, 1 / 64 of it, cut off where even that is too large.
pub fn narrow(g: &mut Graph, x: Tensor) -> Tensor {
    assert_eq!((x.dtype, g.operands), (DType::F32, DType::F16), "narrow: {:?} for products of f16", x.dims);
    let out = g.operand("narrowed", x.dims);
    let fours = (x.len() / 4) as u32;
    let threads = fours.div_ceil(4);
    g.push(Node {
        op: "narrow",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![("half4", vec4_of(out.dtype))] },
        reads: vec![x],
        writes: vec![out],
        dims: vec![fours, threads],
        step: false,
        grid: linear_grid(u64::from(threads), 64),
        flops: x.len(),
    });
    out
}
