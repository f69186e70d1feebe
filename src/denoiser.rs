//! The denoiser: noise levels to what the network is asked and how its answer is read, as scalars of each model call.
//!
//! Latents are x = x0 + σ ε ("variance exploding", Karras et al. 2022). denoised = c_skip x + c_out output, and the network
//! sees c_in x at the timestep of σ.

use crate::ops::degrade::blur_weights;
use crate::schedule::{Prediction, Schedule};

/// The scalars of one model call, as `kernels/lib/step.wgsl` declares them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Step {
    /// Which call of the run.
    pub call: u32,
    /// The network sees c_in x.
    pub c_in: f32,
    /// denoised = c_skip x + c_out output.
    pub c_skip: f32,
    /// See `c_skip`.
    pub c_out: f32,
    /// The noise level.
    pub sigma: f32,
    /// Scale of classifier-free guidance.
    pub cfg: f32,
    /// Scale of self-attention guidance.
    pub sag_scale: f32,
    /// Attention mass above which a token is blurred.
    pub threshold: f32,
    /// Gaussian weights from the centre outwards.
    pub blur: [f32; 5],
}

/// Guidance of a model call.
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// Classifier-free guidance.
    pub cfg: f32,
    /// Self-attention guidance.
    pub sag_scale: f32,
    /// Its blur, in latent pixels.
    pub sag_blur_sigma: f32,
    /// Its mask's threshold; the mean mass is 1.
    pub sag_threshold: f32,
}

/// The scalars and the timesteps of the model calls at `sigmas`.
pub fn steps(schedule: &Schedule, prediction: Prediction, sigmas: &[f64], scales: &Scales) -> (Vec<Step>, Vec<f32>) {
    let blur = blur_weights(scales.sag_blur_sigma);
    let step = |(call, &sigma): (usize, &f64)| {
        let s = prediction.scalings(sigma as f32);
        Step {
            call: call as u32,
            c_in: s.c_in,
            c_skip: s.c_skip,
            c_out: s.c_out,
            sigma: sigma as f32,
            cfg: scales.cfg,
            sag_scale: scales.sag_scale,
            threshold: scales.sag_threshold,
            blur,
        }
    };
    let timesteps = sigmas.iter().map(|&sigma| schedule.timestep(sigma as f32)).collect();
    (sigmas.iter().enumerate().map(step).collect(), timesteps)
}
