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
    /// Ascending.
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
}

impl Schedule {
    /// The table of `num` sigmas: σ = √((1 − ᾱ)/ᾱ), ᾱ = Π (1 − β).
    pub fn new(kind: BetaSchedule, beta_start: f64, beta_end: f64, num: usize) -> Schedule {
        let ramp = |a: f64, b: f64, i: usize| a + (b - a) * i as f64 / (num - 1) as f64;
        let beta = |i: usize| match kind {
            BetaSchedule::ScaledLinear => ramp(beta_start.sqrt(), beta_end.sqrt(), i).powi(2),
            BetaSchedule::Linear => ramp(beta_start, beta_end, i),
        };
        let mut product = 1.0;
        let exact: Vec<f64> = (0..num)
            .map(|i| {
                product *= 1.0 - beta(i);
                ((1.0 - product) / product).sqrt()
            })
            .collect();
        Schedule {
            sigmas: exact.iter().map(|&s| s as f32).collect(),
            log_sigmas: exact.iter().map(|s| s.ln() as f32).collect(),
        }
    }

    /// The smallest level.
    pub fn sigma_min(&self) -> f32 {
        self.sigmas[0]
    }

    /// The largest level.
    pub fn sigma_max(&self) -> f32 {
        self.sigmas[self.sigmas.len() - 1]
    }

    /// The timestep of the nearest trained level, nearest in log σ.
    pub fn timestep(&self, sigma: f32) -> f32 {
        let log = sigma.ln();
        let distance = |i: &usize| (log - self.log_sigmas[*i]).abs();
        (0..self.sigmas.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0) as f32
    }

    /// The level at a fractional timestep, log σ interpolated.
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
    /// Sigmas of a number of steps, descending, the last 0.
    pub sigmas: fn(&Schedule, usize) -> Vec<f32>,
}

/// All schedulers.
pub const SCHEDULERS: &[Scheduler] = &[
    Scheduler { name: "normal", label: "Normal", summary: "evenly spaced timesteps, from the last to the first", sigmas: normal },
    Scheduler { name: "karras", label: "Karras", summary: "Karras et al. 2022: evenly spaced in σ^(1/7)", sigmas: karras },
    Scheduler { name: "exponential", label: "Exponential", summary: "evenly spaced in log σ", sigmas: exponential },
    Scheduler { name: "simple", label: "Simple", summary: "every n-th trained level, from the last", sigmas: simple },
    Scheduler { name: "ddim_uniform", label: "DDIM", summary: "every n-th trained level, from the second: DDIM's", sigmas: ddim_uniform },
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

/// The sigmas of a run. `denoise` below 1 takes the last `steps` of a longer schedule (image to image).
///
/// # Errors
/// [`Error::Invalid`] for steps or denoise out of range.
pub fn sigmas(schedule: &Schedule, scheduler: &Scheduler, steps: usize, denoise: f32) -> Result<Vec<f32>> {
    if !(1..=10_000).contains(&steps) {
        return Err(Error::invalid("steps", "a whole number from 1 to 10000", steps));
    }
    if !(denoise > 0.0 && denoise <= 1.0) {
        return Err(Error::invalid("denoise", "a number above 0, at most 1", denoise));
    }
    if denoise > 0.9999 {
        return Ok((scheduler.sigmas)(schedule, steps));
    }
    let all = (scheduler.sigmas)(schedule, (steps as f64 / f64::from(denoise)) as usize);
    Ok(all[all.len().saturating_sub(steps + 1)..].to_vec())
}

/// n numbers from a to b as torch.linspace gives them in f32: from both ends to the middle.
fn linspace(a: f32, b: f32, n: usize) -> Vec<f32> {
    if n == 1 {
        return vec![a];
    }
    let step = (b - a) / (n - 1) as f32;
    (0..n).map(|i| if i < n / 2 { a + step * i as f32 } else { b - step * (n - 1 - i) as f32 }).collect()
}

fn normal(s: &Schedule, steps: usize) -> Vec<f32> {
    let (start, end) = (s.timestep(s.sigma_max()), s.timestep(s.sigma_min()));
    // A model whose last level is 0 already needs no zero behind it.
    let ends_in_zero = s.sigma(end).abs() <= 1e-5;
    let timesteps = linspace(start, end, steps + usize::from(ends_in_zero));
    let mut sigmas: Vec<f32> = timesteps.into_iter().map(|t| s.sigma(t)).collect();
    if !ends_in_zero {
        sigmas.push(0.0);
    }
    sigmas
}

/// Karras et al. 2022, equation 5, ρ = 7.
fn karras(s: &Schedule, steps: usize) -> Vec<f32> {
    let root = |sigma: f32| f64::from(sigma).powf(1.0 / 7.0);
    let (low, high) = (root(s.sigma_min()), root(s.sigma_max()));
    let ramp = |i: usize| if steps == 1 { 0.0 } else { i as f64 / (steps - 1) as f64 };
    let mut sigmas: Vec<f32> = (0..steps).map(|i| (high + ramp(i) * (low - high)).powi(7) as f32).collect();
    sigmas.push(0.0);
    sigmas
}

fn exponential(s: &Schedule, steps: usize) -> Vec<f32> {
    let (low, high) = (f64::from(s.sigma_min()).ln(), f64::from(s.sigma_max()).ln());
    let ramp = |i: usize| if steps == 1 { 0.0 } else { i as f64 / (steps - 1) as f64 };
    let mut sigmas: Vec<f32> = (0..steps).map(|i| (high + ramp(i) * (low - high)).exp() as f32).collect();
    sigmas.push(0.0);
    sigmas
}

fn simple(s: &Schedule, steps: usize) -> Vec<f32> {
    let stride = s.sigmas.len() as f64 / steps as f64;
    let last = s.sigmas.len() - 1;
    let mut sigmas: Vec<f32> = (0..steps).map(|i| s.sigmas[last - ((i as f64 * stride) as usize).min(last)]).collect();
    sigmas.push(0.0);
    sigmas
}

fn ddim_uniform(s: &Schedule, steps: usize) -> Vec<f32> {
    let stride = (s.sigmas.len() / steps).max(1);
    let mut sigmas: Vec<f32> = s.sigmas.iter().skip(1).step_by(stride).copied().collect();
    if s.sigmas[1].abs() > 1e-5 {
        sigmas.insert(0, 0.0);
    }
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

/// denoised = c_skip x + c_out output; the network sees c_in x.
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
