//! blend: masked latents, so that what is not repainted stays the given picture at the step's noise level.

use super::source;
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("blend/portable.wgsl", "lib/linear.wgsl", "lib/step.wgsl");

/// What is kept where the mask is 0.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// [1, 1, 1, h · w rounded up to 4] f32: 1 where the picture is repainted.
    pub mask: Tensor,
    /// The picture's latents [1, h, w, 4] f32.
    pub picture: Tensor,
    /// The start noise [B, h, w, 4] f32.
    pub noise: Tensor,
}

/// Record out = mask · a + (1 − mask)(picture + σ · noise) for a, out [B, h, w, 4] f32; `noisy`: σ is the step's, else 0.
pub fn blend(g: &mut Graph, a: Tensor, kept: &Kept, noisy: bool, out: Tensor) {
    let area = a.tokens();
    assert!(
        a.channels() == 4 && a.dims == out.dims && kept.noise.dims == a.dims,
        "blend: {:?} to {:?}",
        a.dims,
        out.dims
    );
    assert!(kept.picture.dims[1..] == a.dims[1..] && kept.mask.len() >= u64::from(area), "blend: {kept:?}");
    g.push(Node {
        op: "blend",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![("NOISE", Value::Bool(noisy))] },
        reads: vec![a, kept.mask, kept.picture, kept.noise],
        writes: vec![out],
        dims: vec![a.rows(), area],
        step: true,
        grid: linear_grid(u64::from(a.rows()), 64),
        flops: 5 * a.len(),
    });
}
