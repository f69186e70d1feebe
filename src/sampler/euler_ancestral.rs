//! Euler's method with fresh noise at every step (k-diffusion's `sample_euler_ancestral`, η = 1).

use super::{Latent, Recording};

/// Down to where adding σ_up of noise ends at σ': σ_down² + σ_up² = σ'².
pub fn sample(r: &mut Recording, mut x: Latent, sigmas: &[f64]) -> Latent {
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = r.denoise(x, sigma);
        let up = (next * next * (sigma * sigma - next * next) / (sigma * sigma)).max(0.0).sqrt().min(next);
        let down = (next * next - up * up).max(0.0).sqrt();
        let mut terms = vec![(down / sigma, x), (1.0 - down / sigma, denoised)];
        if next > 0.0 {
            terms.push((up, r.noise()));
        }
        x = r.lincomb(&terms);
        r.end_step();
    }
    x
}
