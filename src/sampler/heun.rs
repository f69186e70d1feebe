//! Heun's method: Karras et al. 2022, algorithm 2 without churn (k-diffusion's `sample_heun`). Two model calls a step, one
//! in the last.

use super::{Latent, Recording};

/// x += (d + d')/2 · (σ' − σ), d' the slope where Euler's step would land.
pub fn sample(r: &mut Recording, mut x: Latent, sigmas: &[f64]) -> Latent {
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = r.denoise(x, sigma);
        let euler = r.lincomb(&[(next / sigma, x), (1.0 - next / sigma, denoised)]);
        x = if next == 0.0 {
            euler
        } else {
            let again = r.denoise(euler, next);
            let half = (next - sigma) / 2.0;
            r.lincomb(&[
                (1.0 + half / sigma, x),
                (-half / sigma, denoised),
                (half / next, euler),
                (-half / next, again),
            ])
        };
        r.end_step();
    }
    x
}
