//! DDIM with η = 0: Song et al. 2020, "Denoising Diffusion Implicit Models", equation 12. In coordinates where x = x0 + σ ε
//! it is x' = D + σ' ε, as ComfyUI's `ddim` computes it.

use super::{Latent, Recording};

/// x = D + σ' (x − D)/σ
pub fn sample(r: &mut Recording, mut x: Latent, sigmas: &[f64]) -> Latent {
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = r.denoise(x, sigma);
        let eps = next / sigma;
        x = r.lincomb(&[(1.0 - eps, denoised), (eps, x)]);
        r.end_step();
    }
    x
}
