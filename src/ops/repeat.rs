//! repeat: the images of a batch several times over, where from here on they differ.

use super::{source, vec4_of};
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static PORTABLE: Source = source!("repeat/portable.wgsl", "lib/linear.wgsl");

/// Record x [B, H, W, C] repeated `times` along the batch: [times · B, H, W, C], in the graph's element type, which is x's.
/// Once is x itself.
pub fn repeat(g: &mut Graph, x: Tensor, times: u32) -> Tensor {
    if times == 1 {
        return x;
    }
    let [b, h, w, c] = x.dims;
    let out = g.activation("repeated", [b * times, h, w, c]);
    assert_eq!(out.dtype, x.dtype, "repeat: input and output types");
    g.push(Node {
        op: "repeat",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![("elem4", vec4_of(x.dtype))] },
        reads: vec![x],
        writes: vec![out],
        dims: vec![(out.len() / 4) as u32, (x.len() / 4) as u32],
        step: false,
        grid: linear_grid(out.len() / 4, 64),
        flops: 0,
    });
    out
}
