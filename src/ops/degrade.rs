//! degrade: SAG's degraded input (mask, upsample, blur, mix, re-noise) in one dispatch.

use super::source;
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static PORTABLE: Source = source!("degrade/portable.wgsl", "lib/linear.wgsl", "lib/step.wgsl");

/// The blur's radius: 9x9 taps, as in every implementation of SAG for Stable Diffusion.
pub const RADIUS: u32 = 4;

/// Weights of the 1-D Gaussian from the centre outwards, normalised so that all nine sum to 1. Sigma 0 is the identity.
pub fn blur_weights(sigma: f32) -> [f32; 5] {
    if sigma == 0.0 {
        return [1.0, 0.0, 0.0, 0.0, 0.0];
    }
    let weight = |t: usize| (-0.5 * (t as f64 / f64::from(sigma)).powi(2)).exp();
    let sum = (1..5).map(|t| 2.0 * weight(t)).sum::<f64>() + 1.0;
    std::array::from_fn(|t| (weight(t) / sum) as f32)
}

/// Floats of one image in the mask: h · w rounded up to 4.
pub fn mask_stride(h: u32, w: u32) -> u32 {
    (h * w).next_multiple_of(4)
}

/// Record the degraded pair of x [B, h, w, 4]: (degraded, renoised), and write the mask of this call into `mask`
/// [calls, B, 1, mask_stride]. `outputs` [.., h, w, 4] is the network at x, uncond first; `mass` holds B · mid_h · mid_w floats.
pub fn degrade(
    g: &mut Graph,
    x: Tensor,
    outputs: Tensor,
    mass: Tensor,
    mid: [u32; 2],
    mask: Tensor,
) -> (Tensor, Tensor) {
    let [b, h, w, c] = x.dims;
    assert_eq!(c, 4, "degrade: latents of four channels");
    assert!(h > RADIUS && w > RADIUS, "degrade: {h}x{w} is too small to reflect {RADIUS} pixels");
    assert!(mass.len() >= u64::from(b * mid[0] * mid[1]), "degrade: mass {:?} for {b} x {mid:?}", mass.dims);
    let degraded = g.activation_f32("degraded", x.dims);
    let renoised = g.activation_f32("renoised", x.dims);
    let scales = [mid[0] as f32 / h as f32, mid[1] as f32 / w as f32].map(f32::to_bits);
    g.push(Node {
        op: "degrade",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![] },
        reads: vec![x, outputs, mass],
        writes: vec![degraded, renoised, mask],
        dims: [&[b, h, w, mid[0], mid[1]][..], &scales, &[mask_stride(h, w)]].concat(),
        step: true,
        grid: linear_grid(u64::from(x.rows()), 64),
        flops: x.len() * 81 * 4,
    });
    (degraded, renoised)
}
