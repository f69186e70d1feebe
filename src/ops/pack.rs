//! pack: the network's input, c_in · x in its element type, repeated for uncond and cond.

use super::{source, vec4_of};
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static PORTABLE: Source = source!("pack/portable.wgsl", "lib/linear.wgsl", "lib/step.wgsl");

/// Record out = c_in x, x [B, h, w, C] repeated `times` along the batch: [times · B, h, w, C]. c_in is the step's.
pub fn pack(g: &mut Graph, x: Tensor, times: u32) -> Tensor {
    let [b, h, w, c] = x.dims;
    let out = g.activation("network input", [b * times, h, w, c]);
    g.push(Node {
        op: "pack",
        variant: "portable",
        kernel: Kernel {
            source: &PORTABLE,
            libs: vec![],
            head: vec![("elem4", vec4_of(x.dtype)), ("out4", vec4_of(out.dtype))],
        },
        reads: vec![x],
        writes: vec![out],
        dims: vec![(out.len() / 4) as u32, (x.len() / 4) as u32],
        step: true,
        grid: linear_grid(out.len() / 4, 64),
        flops: out.len(),
    });
    out
}
