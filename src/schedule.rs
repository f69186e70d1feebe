//! The noise schedule: betas to sigmas, sigmas to timesteps, and the schedulers that choose the sigmas of a run.
//!
//! Sigmas are the noise levels of x = x0 + σ ε. Semantics and names are ComfyUI's (its discrete model sampling).

use crate::error::{Error, Result};

/// How the betas grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaSchedule {
    /// Linear in √β: Stable Diffusion's.
    ScaledLinear,
    /// Linear in β.
    Linear,
}

/// The discrete noise levels that a model was trained on.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// [T], ascending: T training timesteps.
    sigmas: Vec<f32>,
    /// [T], of the f64 sigmas: not the logarithms of the rounded ones.
    log_sigmas: Vec<f32>,
}

impl Schedule {
    /// The table of `num` sigmas: σ = √((1 − ᾱ)/ᾱ), ᾱ = Π (1 − β) (Ho et al. 2020), from the config's
    /// 0 < `beta_start` <= `beta_end` < 1 and 2 or more `num_train_timesteps`.
    pub fn new(kind: BetaSchedule, beta_start: f64, beta_end: f64, num: usize) -> Schedule {
        let ordered = 0.0 < beta_start && beta_start <= beta_end && beta_end < 1.0;
        assert!(ordered && num >= 2, "schedule of {num} betas from {beta_start} to {beta_end}");
        let ramp = |a: f64, b: f64, i: usize| a + (b - a) * i as f64 / (num - 1) as f64;
        let beta = |i: usize| match kind {
            BetaSchedule::ScaledLinear => ramp(beta_start.sqrt(), beta_end.sqrt(), i).powi(2),
            BetaSchedule::Linear => ramp(beta_start, beta_end, i),
        };
        let mut product = 1.0;
        let level = |i: usize| {
            product *= 1.0 - beta(i);
            ((1.0 - product) / product).sqrt()
        };
        Self::of(&(0..num).map(level).collect::<Vec<f64>>())
    }

    fn of(exact: &[f64]) -> Schedule {
        Schedule {
            sigmas: exact.iter().map(|&s| s as f32).collect(),
            log_sigmas: exact.iter().map(|s| s.ln() as f32).collect(),
        }
    }

    /// The same levels stretched so that the last has (almost) no signal (Lin et al. 2023, "Common Diffusion Noise Schedules
    /// and Sample Steps are Flawed"); the last ᾱ as ComfyUI chooses it, since a sigma cannot be infinite.
    pub fn zero_snr(&self) -> Schedule {
        const LAST: f64 = 4.897_345_189_085_343_5e-8;
        let roots: Vec<f64> = self.sigmas.iter().map(|&s| 1.0 / f64::from(s).hypot(1.0)).collect();
        let (first, last) = (roots[0], roots[roots.len() - 1]);
        let stretched = |root: &f64| {
            let signal = ((root - last) * first / (first - last)).powi(2);
            let signal = if signal == 0.0 { LAST } else { signal };
            ((1.0 - signal) / signal).sqrt()
        };
        Self::of(&roots.iter().map(stretched).collect::<Vec<f64>>())
    }

    /// The smallest level.
    pub fn sigma_min(&self) -> f32 {
        self.sigmas[0]
    }

    /// The largest level.
    pub fn sigma_max(&self) -> f32 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// The timestep, 0 to T − 1, of the trained level nearest in log σ; 0 for σ = 0.
    pub fn timestep(&self, sigma: f32) -> f32 {
        let log = sigma.ln();
        let distance = |i: &usize| (log - self.log_sigmas[*i]).abs();
        (0..self.sigmas.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0) as f32
    }

    /// The level at a fractional timestep, log σ interpolated; beyond 0 and T − 1, the nearest end.
    pub fn sigma(&self, timestep: f32) -> f32 {
        let t = timestep.clamp(0.0, (self.sigmas.len() - 1) as f32);
        let (low, high) = (t.floor(), t.ceil());
        let w = t - low;
        ((1.0 - w) * self.log_sigmas[low as usize] + w * self.log_sigmas[high as usize]).exp()
    }

    /// What unit noise is multiplied by for the first latent: √(1 + σ²) at the highest level, where a trained model expects
    /// the picture's own variance too; σ below it.
    pub fn start_scale(&self, sigma: f32) -> f32 {
        if sigma >= self.sigma_max() * (1.0 - 1e-5) { (1.0 + sigma * sigma).sqrt() } else { sigma }
    }
}

/// A row of the table: every face lists it.
pub struct Scheduler {
    /// ComfyUI's name.
    pub name: &'static str,
    /// A1111's name, for the picture's `parameters`.
    pub label: &'static str,
    /// What it is, in a line.
    pub summary: &'static str,
    /// Sigmas of a number of steps, 1 or more: descending, the last 0. Mostly steps + 1, but see `ddim_uniform`.
    pub sigmas: fn(&Schedule, usize) -> Vec<f32>,
}

/// All schedulers.
pub const SCHEDULERS: &[Scheduler] = &[
    Scheduler {
        name: "normal",
        label: "Normal",
        summary: "evenly spaced timesteps, from the last to the first",
        sigmas: normal,
    },
    Scheduler {
        name: "karras",
        label: "Karras",
        summary: "Karras et al. 2022: evenly spaced in σ^(1/7)",
        sigmas: karras,
    },
    Scheduler { name: "exponential", label: "Exponential", summary: "evenly spaced in log σ", sigmas: exponential },
    Scheduler { name: "simple", label: "Simple", summary: "every n-th trained level, from the last", sigmas: simple },
    Scheduler {
        name: "ddim_uniform",
        label: "DDIM",
        summary: "every n-th trained level, from the second: DDIM's",
        sigmas: ddim_uniform,
    },
];

/// The scheduler of that name.
///
/// # Errors
/// [`Error::Invalid`] with the list.
pub fn scheduler(name: &str) -> Result<&'static Scheduler> {
    SCHEDULERS.iter().find(|scheduler| scheduler.name == name).ok_or_else(|| {
        let names: Vec<&str> = SCHEDULERS.iter().map(|scheduler| scheduler.name).collect();
        Error::invalid("scheduler", format!("one of [{}]", names.join(", ")), name)
    })
}

/// The most steps of the schedule that a small `denoise` takes the end of.
const LONGEST: f64 = 1e6;

/// The sigmas of a run: descending, the last 0, one step between each two. `denoise` below 1 takes the last `steps` of a longer
/// schedule, as ComfyUI does (image to image).
///
/// # Errors
/// [`Error::Invalid`] for steps outside 1 to 10000, denoise outside (0, 1], or one so small that it asks for a schedule of more
/// than a million steps.
pub fn sigmas(schedule: &Schedule, scheduler: &Scheduler, steps: usize, denoise: f32) -> Result<Vec<f32>> {
    if !(1..=10_000).contains(&steps) {
        return Err(Error::invalid("steps", "a whole number from 1 to 10000", steps));
    }
    if !(denoise > 0.0 && denoise <= 1.0) {
        return Err(Error::invalid("denoise", "a number above 0, at most 1", denoise));
    }
    // ComfyUI divides by the decimal number that was typed: 6 / 0.6 is 10, but the f32 nearest 0.6 gives 9.9999996.
    let decimal: f64 = denoise.to_string().parse().unwrap_or(f64::from(denoise));
    if decimal > 0.9999 {
        return Ok((scheduler.sigmas)(schedule, steps));
    }
    let long = steps as f64 / decimal;
    if long > LONGEST {
        return Err(Error::invalid(
            "denoise",
            format!("at least {} with {steps} steps", steps as f64 / LONGEST),
            denoise,
        ));
    }
    let all = (scheduler.sigmas)(schedule, long as usize);
    Ok(all[all.len().saturating_sub(steps + 1)..].to_vec())
}

/// n numbers from a to b, bit for bit torch.linspace's f32: counted from both ends to the middle, rounded once.
fn linspace(a: f32, b: f32, n: usize) -> Vec<f32> {
    if n == 1 {
        return vec![a];
    }
    let step = (b - a) / (n - 1) as f32;
    let back = |i: usize| (n - 1 - i) as f32;
    (0..n).map(|i| if i < n / 2 { step.mul_add(i as f32, a) } else { (-step).mul_add(back(i), b) }).collect()
}

/// A level so small that ComfyUI takes it for 0, and appends none.
fn is_zero(sigma: f32) -> bool {
    sigma <= 1e-5
}

/// The levels, and the 0 behind them.
fn then_zero(levels: impl Iterator<Item = f32>) -> Vec<f32> {
    levels.chain([0.0]).collect()
}

/// Evenly spaced timesteps from the last to the first.
fn normal(s: &Schedule, steps: usize) -> Vec<f32> {
    let (start, end) = (s.timestep(s.sigma_max()), s.timestep(s.sigma_min()));
    if is_zero(s.sigma(end)) {
        return linspace(start, end, steps + 1).into_iter().map(|t| s.sigma(t)).collect();
    }
    then_zero(linspace(start, end, steps).into_iter().map(|t| s.sigma(t)))
}

/// Karras et al. 2022, equation 5: evenly spaced in σ^(1/ρ), ρ = 7. The roots are f32, as in ComfyUI: their rounding is seen in
/// the seventh power.
fn karras(s: &Schedule, steps: usize) -> Vec<f32> {
    let root = |sigma: f32| f64::from(sigma).powf(1.0 / 7.0);
    let (low, high) = (root(s.sigma_min()), root(s.sigma_max()));
    let level = |t: f32| f64::from(high as f32 + t * (low - high) as f32).powi(7) as f32;
    then_zero(linspace(0.0, 1.0, steps).into_iter().map(level))
}

/// Evenly spaced in log σ.
fn exponential(s: &Schedule, steps: usize) -> Vec<f32> {
    let log = |sigma: f32| f64::from(sigma).ln() as f32;
    then_zero(linspace(log(s.sigma_max()), log(s.sigma_min()), steps).into_iter().map(f32::exp))
}

/// Every n-th trained level from the last, n = T / steps and fractional.
fn simple(s: &Schedule, steps: usize) -> Vec<f32> {
    let stride = s.sigmas.len() as f64 / steps as f64;
    let last = s.sigmas.len() - 1;
    then_zero((0..steps).map(|i| s.sigmas[last - ((i as f64 * stride) as usize).min(last)]))
}

/// Every n-th trained level from the second, n = T / steps rounded down. As in ComfyUI, that is more than steps + 1 sigmas where
/// steps does not divide T, and never more than T.
fn ddim_uniform(s: &Schedule, steps: usize) -> Vec<f32> {
    let ends_in_zero = is_zero(s.sigmas[1]);
    let stride = (s.sigmas.len() / (steps + usize::from(ends_in_zero))).max(1);
    let zero = if ends_in_zero { None } else { Some(0.0) };
    let mut sigmas: Vec<f32> = zero.into_iter().chain(s.sigmas.iter().skip(1).step_by(stride).copied()).collect();
    sigmas.reverse();
    sigmas
}

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise ε.
    Epsilon,
    /// The velocity v (Salimans & Ho 2022).
    V,
}

/// denoised = c_skip x + c_out output; the network sees c_in x (Karras et al. 2022, equation 7, with σ_data = 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalings {
    /// Scale of the network's input.
    pub c_in: f32,
    /// Share of x.
    pub c_skip: f32,
    /// Share of the output.
    pub c_out: f32,
}

impl Prediction {
    /// The scalings at a noise level.
    pub fn scalings(self, sigma: f32) -> Scalings {
        let s = f64::from(sigma);
        let root = (s * s + 1.0).sqrt();
        let (c_skip, c_out) = match self {
            Prediction::Epsilon => (1.0, -s),
            Prediction::V => (1.0 / (s * s + 1.0), -s / root),
        };
        Scalings { c_in: (1.0 / root) as f32, c_skip: c_skip as f32, c_out: c_out as f32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stable_diffusion() -> Schedule {
        Schedule::new(BetaSchedule::ScaledLinear, 0.00085, 0.012, 1000)
    }

    fn close(a: f32, b: f32, limit: f32) -> bool {
        (a - b).abs() <= limit * b.abs()
    }

    /// ComfyUI's sigmas and timesteps, by tools/reference.
    #[test]
    fn schedules_equal_comfyuis() {
        #[derive(serde::Deserialize)]
        struct Case {
            scheduler: String,
            steps: usize,
            denoise: f32,
            sigmas: Vec<f32>,
            timesteps: Vec<f32>,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/schedules.json");
        let text = std::fs::read_to_string(path).expect(path);
        let cases: Vec<Case> = serde_json::from_str(&text).expect("schedules.json");
        for row in SCHEDULERS {
            assert!(cases.iter().any(|case| case.scheduler == row.name), "no golden for {}", row.name);
        }
        let schedule = stable_diffusion();
        for Case { scheduler: name, steps, denoise, sigmas: expected, timesteps } in cases {
            let label = format!("{name}, {steps} steps, denoise {denoise}");
            let found = sigmas(&schedule, scheduler(&name).expect("in the table"), steps, denoise).expect("in range");
            assert_eq!(found.len(), expected.len(), "{label}");
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(close(*found, *expected, 1e-6), "{label}: sigma {i} is {found}, expected {expected}");
            }
            for (sigma, expected) in expected.iter().zip(&timesteps) {
                assert_eq!(schedule.timestep(*sigma), *expected, "{label}: timestep of {sigma}");
            }
        }
    }

    #[test]
    fn every_schedule_falls_from_the_highest_level_to_zero() {
        let schedule = stable_diffusion();
        for row in SCHEDULERS {
            for steps in [1, 2, 3, 7, 20, 999, 1000] {
                let sigmas = sigmas(&schedule, row, steps, 1.0).expect("in range");
                let label = format!("{}, {steps} steps: {sigmas:?}", row.name);
                assert!(sigmas.is_sorted_by(|a, b| a > b), "{label}");
                assert_eq!(sigmas.last(), Some(&0.0), "{label}");
                assert!(row.name == "ddim_uniform" || close(sigmas[0], schedule.sigma_max(), 1e-6), "{label}");
                assert!(row.name == "ddim_uniform" || sigmas.len() == steps + 1, "{label}");
            }
        }
    }

    #[test]
    fn denoise_is_the_decimal_number_that_was_typed() {
        let (schedule, karras) = (stable_diffusion(), scheduler("karras").expect("in the table"));
        // 6 / 0.6 = 10 steps, of which the last 6 are taken.
        let all = sigmas(&schedule, karras, 10, 1.0).expect("in range");
        assert_eq!(sigmas(&schedule, karras, 6, 0.6).expect("in range"), all[4..]);
        assert_eq!(sigmas(&schedule, karras, 10, 0.99995).expect("in range"), all);
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let (schedule, karras) = (stable_diffusion(), scheduler("karras").expect("in the table"));
        for (steps, denoise, word) in [
            (0, 1.0, "steps"),
            (10_001, 1.0, "steps"),
            (20, 0.0, "denoise"),
            (20, -0.5, "denoise"),
            (20, 1.5, "denoise"),
            (20, f32::NAN, "denoise"),
            (20, 1e-38, "denoise"),
        ] {
            let error = sigmas(&schedule, karras, steps, denoise).expect_err("out of range").to_string();
            assert!(error.starts_with(word), "{steps} steps, denoise {denoise}: {error}");
        }
        let error = scheduler("karas").err().expect("no such scheduler").to_string();
        assert_eq!(
            error,
            "scheduler: expected one of [normal, karras, exponential, simple, ddim_uniform], found karas"
        );
    }

    #[test]
    fn levels_and_timesteps_are_inverse() {
        let schedule = stable_diffusion();
        assert!(close(schedule.sigma_min(), 0.029_167_16, 1e-7) && close(schedule.sigma_max(), 14.614_641, 1e-7));
        for t in 0..1000 {
            assert_eq!(schedule.timestep(schedule.sigma(t as f32)), t as f32);
        }
        let between = (schedule.sigma(500.0) * schedule.sigma(501.0)).sqrt();
        assert!(close(schedule.sigma(500.5), between, 1e-6));
        assert_eq!((schedule.sigma(-3.0), schedule.sigma(2e3)), (schedule.sigma(0.0), schedule.sigma(999.0)));
        assert_eq!((schedule.timestep(0.0), schedule.timestep(1e9)), (0.0, 999.0));
    }

    #[test]
    fn the_first_latent_has_the_pictures_variance_only_at_the_highest_level() {
        let schedule = stable_diffusion();
        let max = schedule.sigma_max();
        assert!(close(schedule.start_scale(max), (1.0 + max * max).sqrt(), 1e-7));
        assert!(close(schedule.start_scale(schedule.sigma(999.0)), (1.0 + max * max).sqrt(), 1e-6));
        assert_eq!(schedule.start_scale(10.0), 10.0);
    }

    /// With the exact output of either kind, denoised is the picture: x = x0 + σ ε, v = (ε − σ x0) / √(σ² + 1).
    #[test]
    fn scalings_recover_the_picture() {
        let (x0, noise) = (0.7_f64, -1.3_f64);
        for sigma in [0.03_f64, 0.5, 1.0, 14.6] {
            let x = x0 + sigma * noise;
            let v = (noise - sigma * x0) / (sigma * sigma + 1.0).sqrt();
            for (kind, output) in [(Prediction::Epsilon, noise), (Prediction::V, v)] {
                let s = kind.scalings(sigma as f32);
                let denoised = f64::from(s.c_skip) * x + f64::from(s.c_out) * output;
                assert!((denoised - x0).abs() < 1e-5, "{kind:?} at {sigma}: {denoised}");
                assert!((f64::from(s.c_in).powi(-2) - sigma * sigma - 1.0).abs() < 1e-4 * (1.0 + sigma * sigma));
            }
        }
    }
}
