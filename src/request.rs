//! What a user asks for, and what comes back.

use crate::error::{Error, Result};
use crate::gpu::run::Profile;
use crate::image::Image;
use crate::sampler::sampler;
use crate::schedule::scheduler;

/// In which numbers the UNet computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f16 on GPUs that have it, else f32.
    #[default]
    Auto,
    /// f32 activations.
    F32,
    /// f16 activations, f32 accumulation.
    F16,
}

/// What to make. Names and ranges are those of the command line; the defaults too.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Request {
    /// What to see.
    pub prompt: String,
    /// What not to see.
    pub negative_prompt: String,
    /// Seed of the noise; the same picture as in ComfyUI, whose generator is PyTorch's on the CPU.
    pub seed: u64,
    /// Steps of the sampler.
    pub steps: u32,
    /// Scale of classifier-free guidance.
    pub cfg: f32,
    /// A name of [`crate::sampler::SAMPLERS`].
    pub sampler: String,
    /// A name of [`crate::schedule::SCHEDULERS`].
    pub scheduler: String,
    /// Pixels, a multiple of 8; the model's own if `None`.
    pub width: Option<u32>,
    /// Pixels, a multiple of 8; the model's own if `None`.
    pub height: Option<u32>,
    /// Pictures.
    pub batch: u32,
    /// Scale of self-attention guidance; 0 switches it off.
    pub sag_scale: f32,
    /// Its blur, in latent pixels; 0 does not blur.
    pub sag_blur_sigma: f32,
    /// Attention mass above which a place is blurred; the mean is 1.
    pub sag_threshold: f32,
    /// Unit normals [B, 4, h, w] in place of the seed's.
    #[serde(skip)]
    pub latents: Option<Vec<f32>>,
    /// Measure the device time of every op (slower).
    #[serde(skip)]
    pub profile: bool,
}

impl Default for Request {
    fn default() -> Self {
        Request {
            prompt: String::new(),
            negative_prompt: String::new(),
            seed: 0,
            steps: 20,
            cfg: 7.0,
            sampler: "euler".into(),
            scheduler: "normal".into(),
            width: None,
            height: None,
            batch: 1,
            sag_scale: 0.75,
            sag_blur_sigma: 3.0,
            sag_threshold: 1.0,
            latents: None,
            profile: false,
        }
    }
}

impl Request {
    /// Every number finite and in its range.
    ///
    /// # Errors
    /// [`Error::Invalid`] with name, range and what was found.
    pub fn check(&self) -> Result<()> {
        let within = |what: &str, value: f32, low: f32, high: f32| match value >= low && value <= high {
            true => Ok(()),
            false => Err(Error::invalid(what, format!("a number from {low} to {high}"), value)),
        };
        within("cfg", self.cfg, 0.0, 1000.0)?;
        within("sag-scale", self.sag_scale, -100.0, 100.0)?;
        within("sag-blur-sigma", self.sag_blur_sigma, 0.0, 1e4)?;
        within("sag-threshold", self.sag_threshold, 0.0, 1e6)?;
        if !(1..=10_000).contains(&self.steps) {
            return Err(Error::invalid("steps", "a whole number from 1 to 10000", self.steps));
        }
        if !(1..=1024).contains(&self.batch) {
            return Err(Error::invalid("batch", "a whole number from 1 to 1024", self.batch));
        }
        for (what, size) in [("width", self.width), ("height", self.height)] {
            if let Some(size) = size.filter(|size| !size.is_multiple_of(8) || !(40..=16_384).contains(size)) {
                return Err(Error::invalid(what, "a multiple of 8 from 40 to 16384", size));
            }
        }
        sampler(&self.sampler)?;
        scheduler(&self.scheduler)?;
        Ok(())
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Text encoded, kernels compiled; the loop begins.
    Start {
        /// Steps to come.
        steps: usize,
    },
    /// That many steps are done.
    Step {
        /// Steps done.
        done: usize,
        /// Of so many.
        steps: usize,
    },
    /// That many pictures are decoded.
    Decoded {
        /// Pictures done.
        done: u32,
        /// Of so many.
        batch: u32,
    },
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Timings {
    /// Tokens, text model, keys and values of the cross-attentions.
    pub text: f64,
    /// Planning, compiling and allocating for the loop.
    pub prepare: f64,
    /// All steps.
    pub sample: f64,
    /// Latents to pictures.
    pub decode: f64,
    /// All of it, without loading the model.
    pub total: f64,
}

/// Bytes of device memory.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Memory {
    /// The model's parameters.
    pub weights: u64,
    /// The peak that the planner foresaw before it allocated.
    pub planned_peak: u64,
    /// The peak of live buffers.
    pub peak: u64,
    /// What the driver's allocator held in the middle of the loop, where the backend tells.
    pub allocator: Option<u64>,
}

/// Pictures, and what was found on the way.
pub struct Generated {
    /// The request as it was run: sizes filled in.
    pub request: Request,
    /// One for each of the batch.
    pub images: Vec<Image>,
    /// Final latents [B, 4, h, w] in the UNet's scale.
    pub latents: Vec<f32>,
    /// [B, 4, h, w] of `latents`.
    pub shape: [usize; 4],
    /// SAG's masks of every model call, [calls][B · h · w] of 0 and 1; empty without SAG.
    pub masks: Vec<Vec<f32>>,
    /// Sigmas of the schedule.
    pub sigmas: Vec<f32>,
    /// What the user should know: a truncated prompt.
    pub warnings: Vec<String>,
    /// Milliseconds.
    pub timings: Timings,
    /// Bytes.
    pub memory: Memory,
    /// Device time by op, if asked for.
    pub profile: Option<Profile>,
}
