//! Euler's method on the probability-flow ODE: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
//! Generative Models", algorithm 2 without churn (k-diffusion's `sample_euler`).

use super::{Latent, Recording};

/// x += (x − D)/σ · (σ' − σ)
pub fn sample(r: &mut Recording, mut x: Latent, sigmas: &[f64]) -> Latent {
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = r.denoise(x, sigma);
        x = r.lincomb(&[(next / sigma, x), (1.0 - next / sigma, denoised)]);
        r.end_step();
    }
    x
}
