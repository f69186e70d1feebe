//! levels: the VAE's picture as the bytes that images have, so that the host reads a quarter and converts nothing.

use super::source;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static PORTABLE: Source = source!("levels/portable.wgsl", "lib/linear.wgsl");

/// Record the pixels of x [1, H, W, 4] f32 in -1 .. 1, the fourth channel of no use: [1, 1, H · W / 4, 4], each of whose numbers is no number but the word of a pixel, its
/// red, green and blue in levels of 255 from the lowest byte on. The highest is 0, or 1 where one of the three was not finite. H · W is a multiple of 4.
pub fn levels(g: &mut Graph, x: Tensor) -> Tensor {
    let [b, h, w, c] = x.dims;
    assert!(b == 1 && c == 4 && (h * w).is_multiple_of(4) && x.dtype == DType::F32, "levels: {x:?}");
    let fours = h * w / 4;
    let out = g.activation_f32("levels", [1, 1, fours, 4]);
    g.push(Node {
        op: "levels",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![] },
        reads: vec![x],
        writes: vec![out],
        dims: vec![fours],
        step: false,
        grid: linear_grid(u64::from(fours), 64),
        flops: 4 * x.len(),
    });
    out
}
