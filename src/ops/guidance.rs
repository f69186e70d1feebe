//! guidance: the network's outputs to `denoised`, with classifier-free and self-attention guidance, in one dispatch.

use super::source;
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("guidance/portable.wgsl", "lib/linear.wgsl", "lib/step.wgsl");

/// What self-attention guidance adds.
#[derive(Clone, Copy)]
pub struct Degraded {
    /// Uncond's denoised with its mask blurred, [B, h, w, 4].
    pub degraded: Tensor,
    /// `degraded` with x's noise, [B, h, w, 4].
    pub renoised: Tensor,
    /// The network at `renoised`, uncond, [B, h, w, 4].
    pub again: Tensor,
}

/// Record `denoised` [B, h, w, 4] of x [B, h, w, 4] and the network's outputs [n B, h, w, 4]: uncond then cond (n = 2), or
/// cond alone (n = 1).
pub fn guidance(g: &mut Graph, x: Tensor, outputs: Tensor, sag: Option<Degraded>, denoised: Tensor) {
    let uncond = outputs.batch() == 2 * x.batch();
    assert!(uncond || outputs.batch() == x.batch(), "guidance: x {:?}, outputs {:?}", x.dims, outputs.dims);
    assert!(x.channels() == 4 && outputs.channels() == 4, "guidance: latents of four channels");
    let d = sag.unwrap_or(Degraded { degraded: x, renoised: x, again: x });
    g.push(Node {
        op: "guidance",
        variant: "portable",
        kernel: Kernel {
            source: &PORTABLE,
            libs: vec![],
            head: vec![("UNCOND", Value::Bool(uncond)), ("SAG", Value::Bool(sag.is_some()))],
        },
        reads: vec![x, outputs, d.degraded, d.renoised, d.again],
        writes: vec![denoised],
        dims: vec![x.rows()],
        step: true,
        grid: linear_grid(u64::from(x.rows()), 64),
        flops: 12 * x.len(),
    });
}
