//! What a user asks for, and what comes back.

use crate::error::{Error, Result};
use crate::gpu::profile::Profile;
use crate::image::Image;
use crate::inpaint::Init;
use crate::model::config::SIZES;
use crate::sampler::sampler;
use crate::schedule::scheduler;
use crate::text::Style;

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
    /// How far back a picture to start from is noised: 1 wholly, 0.5 half of the way; every one of `steps` is made.
    pub denoise: f32,
    /// Which layer of the text encoders is read, counted from the last: 1 the last; the model's own if `None`.
    pub clip_skip: Option<u32>,
    /// Whose prompts these are: what weights mean.
    pub prompt_style: Style,
    /// SDXL: the size, [width, height], that the training picture had before it was scaled; the picture's if `None`.
    pub original_size: Option<[u32; 2]>,
    /// SDXL: what was cut from it, [left, top].
    pub crop: [u32; 2],
    /// SDXL: the size, [width, height], that it was brought to; the picture's if `None`.
    pub target_size: Option<[u32; 2]>,
    /// Side of the VAE's tiles in pixels; if `None`, the picture is cut only where it does not fit whole.
    pub vae_tile: Option<u32>,
    /// A picture to start from.
    #[serde(skip)]
    pub init: Option<Init>,
    /// Unit normals [B, 4, h, w] in place of the seed's.
    #[serde(skip)]
    pub latents: Option<Vec<f32>>,
    /// Measure the device time of every op (slower).
    #[serde(skip)]
    pub profile: bool,
    /// Measure first which kernels are fastest for this model and size here, where that is not known yet.
    #[serde(skip)]
    pub autotune: bool,
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
            denoise: 1.0,
            clip_skip: None,
            prompt_style: Style::Comfy,
            original_size: None,
            crop: [0, 0],
            target_size: None,
            vae_tile: None,
            init: None,
            latents: None,
            profile: false,
            autotune: false,
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
        if !(self.denoise > 0.0 && self.denoise <= 1.0) {
            return Err(Error::invalid("denoise", "a number above 0, at most 1", self.denoise));
        }
        if self.denoise < 1.0 && self.init.is_none() {
            return Err(Error::invalid("denoise", "1 without a picture to start from (--init)", self.denoise));
        }
        if let Some(skip) = self.clip_skip.filter(|skip| !(1..=12).contains(skip)) {
            return Err(Error::invalid("clip-skip", "a whole number from 1 (the last layer) to 12", skip));
        }
        if let Some(tile) = self.vae_tile.filter(|tile| !tile.is_multiple_of(8) || !(64..=16_384).contains(tile)) {
            return Err(Error::invalid("vae-tile", "a multiple of 8 from 64 to 16384", tile));
        }
        for (what, size) in
            [("original-size", self.original_size), ("target-size", self.target_size), ("crop", Some(self.crop))]
        {
            if let Some([w, h]) = size.filter(|size| size.iter().any(|&n| n > 65_536)) {
                return Err(Error::invalid(what, "numbers up to 65536", format!("{w}x{h}")));
            }
        }
        sampler(&self.sampler)?;
        scheduler(&self.scheduler)?;
        Ok(())
    }

    /// SDXL's six sizes: original height and width, cut from the top and from the left, target height and width.
    pub fn sizes(&self) -> [u32; SIZES] {
        let own = [self.width.unwrap_or(0), self.height.unwrap_or(0)];
        let ([w, h], [target_w, target_h]) = (self.original_size.unwrap_or(own), self.target_size.unwrap_or(own));
        [h, w, self.crop[1], self.crop[0], target_h, target_w]
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// That many trials of the kernels are done.
    Tuned {
        /// Trials done.
        done: usize,
        /// Of so many.
        trials: usize,
    },
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
    /// A picture to start from, to latents.
    pub encode: f64,
    /// Planning, compiling and allocating for the loop; measuring kernels, where that was asked for.
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
    /// The model's parameters, as far as they stay on the device.
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
