//! take: the rows of this call out of the rows of all calls, which were computed before the loop.

use super::source;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static PORTABLE: Source = source!("take/portable.wgsl", "lib/linear.wgsl", "lib/step.wgsl");

/// Record [1, 1, R, C] of this call out of `all` [R, 1, calls, C], f32.
pub fn take(g: &mut Graph, all: Tensor) -> Tensor {
    let [rows, _, calls, channels] = all.dims;
    assert_eq!(all.dtype, DType::F32, "take: rows in f32");
    let out = g.activation_f32("rows of a call", [1, 1, rows, channels]);
    g.push(Node {
        op: "take",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![] },
        reads: vec![all],
        writes: vec![out],
        dims: vec![rows, calls, channels / 4],
        step: true,
        grid: linear_grid(out.len() / 4, 64),
        flops: 0,
    });
    out
}
