//! Samplers as functions of (denoise, x, sigmas, noise), in the style of k-diffusion, over a recording.
//!
//! A sampler runs once, on the host, before the device computes anything: it sees latents as names, and what it asks for
//! becomes a flat list of [`Command`]s that the pipeline replays. All sigmas are known, so all coefficients are.

mod ddim;
mod dpmpp_2m;
mod euler;
mod euler_ancestral;
mod heun;

use crate::error::{Error, Result};
use crate::gpu::plan::{Lifetime, Plan, plan};

/// A latent [B, h, w, 4] of the recording; each is written once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latent(pub usize);

/// One thing that the device does.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// out = denoised(x, sigma): the model with its guidance.
    Denoise {
        /// Written.
        out: Latent,
        /// Read.
        x: Latent,
        /// Noise level of x.
        sigma: f64,
    },
    /// out = Σ coefficient · latent, up to four.
    Lincomb {
        /// Written.
        out: Latent,
        /// Coefficients and latents.
        terms: Vec<(f64, Latent)>,
    },
    /// out = unit normals, the generator's next.
    Noise {
        /// Written.
        out: Latent,
    },
}

/// A sampler's recording: steps of commands.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// The commands of each step.
    pub steps: Vec<Vec<Command>>,
    /// The last latent.
    pub result: Option<Latent>,
    current: Vec<Command>,
    latents: usize,
}

impl Recording {
    /// Record `sampler` from `x` = unit noise · start scale over `sigmas` (descending, the last usually 0).
    pub fn new(sampler: &Sampler, sigmas: &[f64]) -> Recording {
        let mut recording = Recording::default();
        let x = recording.latent();
        let result = (sampler.run)(&mut recording, x, sigmas);
        recording.result = Some(result);
        assert!(recording.current.is_empty(), "{}: commands after the last end_step", sampler.name);
        recording
    }

    /// The start latent.
    pub const START: Latent = Latent(0);

    fn latent(&mut self) -> Latent {
        self.latents += 1;
        Latent(self.latents - 1)
    }

    /// The model's denoised picture at x with noise level sigma.
    pub fn denoise(&mut self, x: Latent, sigma: f64) -> Latent {
        let out = self.latent();
        self.current.push(Command::Denoise { out, x, sigma });
        out
    }

    /// Σ coefficient · latent.
    pub fn lincomb(&mut self, terms: &[(f64, Latent)]) -> Latent {
        let out = self.latent();
        self.current.push(Command::Lincomb { out, terms: terms.to_vec() });
        out
    }

    /// Unit normals.
    pub fn noise(&mut self) -> Latent {
        let out = self.latent();
        self.current.push(Command::Noise { out });
        out
    }

    /// What follows is the next step (progress counts these; the device may be cancelled between them).
    pub fn end_step(&mut self) {
        self.steps.push(std::mem::take(&mut self.current));
    }

    /// Model calls of the whole recording, as sigmas in order.
    pub fn calls(&self) -> Vec<f64> {
        let sigma = |command: &Command| match command {
            Command::Denoise { sigma, .. } => Some(*sigma),
            _ => None,
        };
        self.steps.iter().flatten().filter_map(sigma).collect()
    }

    /// Which buffer holds each latent; all are of one size, here 1. Noise is written by the host before its step begins,
    /// so it lives from there.
    pub fn plan(&self) -> Plan {
        let mut lives: Vec<Lifetime> = vec![Lifetime { bytes: 1, first: 0, last: 0 }; self.latents];
        let mut at = 0;
        let mut touch = |latent: Latent, at: usize, first: Option<usize>| {
            let life = &mut lives[latent.0];
            life.first = first.unwrap_or(life.first);
            life.last = life.last.max(at);
        };
        for step in &self.steps {
            let start = at;
            for command in step {
                match command {
                    Command::Denoise { out, x, .. } => {
                        touch(*x, at, None);
                        touch(*out, at, Some(at));
                    }
                    Command::Lincomb { out, terms } => {
                        terms.iter().for_each(|(_, x)| touch(*x, at, None));
                        touch(*out, at, Some(at));
                    }
                    Command::Noise { out } => touch(*out, at, Some(start)),
                }
                at += 1;
            }
        }
        if let Some(result) = self.result {
            touch(result, at, None);
        }
        plan(&lives)
    }
}

/// A row of the table: every face lists it.
pub struct Sampler {
    /// ComfyUI's name.
    pub name: &'static str,
    /// A1111's name, for the picture's `parameters`.
    pub label: &'static str,
    /// What it is, in a line.
    pub summary: &'static str,
    /// The algorithm: from x through sigmas to the last latent.
    pub run: fn(&mut Recording, Latent, &[f64]) -> Latent,
}

/// All samplers.
pub const SAMPLERS: &[Sampler] = &[
    Sampler { name: "euler", label: "Euler", summary: "Euler (Karras et al. 2022), first order", run: euler::sample },
    Sampler {
        name: "euler_ancestral",
        label: "Euler a",
        summary: "Euler with fresh noise at every step",
        run: euler_ancestral::sample,
    },
    Sampler {
        name: "heun",
        label: "Heun",
        summary: "Heun (Karras et al. 2022), second order, two model calls a step",
        run: heun::sample,
    },
    Sampler {
        name: "dpmpp_2m",
        label: "DPM++ 2M",
        summary: "DPM-Solver++(2M) (Lu et al. 2022), second order, one call a step",
        run: dpmpp_2m::sample,
    },
    Sampler { name: "ddim", label: "DDIM", summary: "DDIM (Song et al. 2020), deterministic", run: ddim::sample },
];

/// The sampler of that name.
///
/// # Errors
/// [`Error::Invalid`] with the list.
pub fn sampler(name: &str) -> Result<&'static Sampler> {
    SAMPLERS.iter().find(|sampler| sampler.name == name).ok_or_else(|| {
        let names: Vec<&str> = SAMPLERS.iter().map(|sampler| sampler.name).collect();
        Error::invalid("sampler", format!("one of [{}]", names.join(", ")), name)
    })
}
