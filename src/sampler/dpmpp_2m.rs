//! DPM-Solver++(2M): Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
//! algorithm 2, in t = −ln σ (k-diffusion's `sample_dpmpp_2m`).

use super::{Latent, Recording};

/// x = (σ'/σ) x − (e^{−h} − 1) D̃, D̃ extrapolated from the last two denoised.
pub fn sample(r: &mut Recording, mut x: Latent, sigmas: &[f64]) -> Latent {
    let mut last: Option<(f64, Latent)> = None;
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let denoised = r.denoise(x, sigma);
        let h = sigma.ln() - next.ln();
        let gain = -(-h).exp_m1();
        x = match last {
            Some((h_last, old)) if next > 0.0 => {
                let extra = h / (2.0 * h_last);
                r.lincomb(&[(next / sigma, x), (gain * (1.0 + extra), denoised), (-gain * extra, old)])
            }
            _ => r.lincomb(&[(next / sigma, x), (gain, denoised)]),
        };
        last = Some((h, denoised));
        r.end_step();
    }
    x
}
