//! Prompt to picture, top to bottom: text, noise, the sampler's loop, decode. Nothing else.

use std::ops::ControlFlow;

use web_time::Instant;

use crate::denoiser::{Scales, Step, steps};
use crate::error::{Error, Result};
use crate::gpu::run::{Profile, Steps};
use crate::gpu::{Buffer, DType, Gpu, Graph, Program};
use crate::guidance::{Passes, Surroundings, denoise};
use crate::image::Image;
use crate::model::clip::Clip;
use crate::model::config::{ClipConfig, NoiseConfig, UNetConfig, VaeConfig};
use crate::model::unet::UNet;
use crate::model::vae::Decoder;
use crate::noise::Generator;
use crate::ops::degrade::{RADIUS, mask_stride};
use crate::ops::lincomb::{MAX_TERMS, lincomb};
use crate::ops::pack::pack;
use crate::sampler::{Command, Latent, Recording, sampler};
use crate::schedule::{BetaSchedule, Prediction, Schedule, scheduler, sigmas};
use crate::text::Tokenizer;
use crate::weights::{Files, Loader};

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

/// A loaded model on a device.
pub struct Pipeline {
    gpu: Gpu,
    tokenizer: Tokenizer,
    clip: Clip,
    unet: UNet,
    decoder: Decoder,
    vae_config: VaeConfig,
    schedule: Schedule,
    prediction: Prediction,
    dtype: DType,
    weights: u64,
}

/// Names that diffusers gives a part's weights.
pub(crate) fn part(folder: &str) -> [String; 2] {
    let stem = if folder == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
    [format!("{folder}/{stem}.safetensors"), format!("{folder}/{stem}.fp16.safetensors")]
}

pub(crate) fn open_part(files: &Files, folder: &str) -> Result<crate::weights::Weights> {
    let names = part(folder);
    files.weights(&[&names[0], &names[1]])
}

pub(crate) fn load_tokenizer(files: &Files) -> Result<Tokenizer> {
    #[derive(serde::Deserialize)]
    struct Map {
        #[serde(default)]
        pad_token: serde_json::Value,
    }
    // As transformers: the map decides, the config where there is no map.
    let said = ["tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json"];
    let map = match said.into_iter().find(|name| files.has(name)) {
        Some(name) => files.json::<Map>(name)?,
        None => Map { pad_token: serde_json::Value::Null },
    };
    let pad = map.pad_token.as_str().or_else(|| map.pad_token.get("content")?.as_str()).unwrap_or("<|endoftext|>");
    let (vocab, merges) = (files.text("tokenizer/vocab.json")?, files.text("tokenizer/merges.txt")?);
    Tokenizer::new(&files.path("tokenizer"), &vocab, &merges, 77, pad)
}

pub(crate) fn load_schedule(files: &Files) -> Result<(Schedule, Prediction)> {
    let name = "scheduler/scheduler_config.json";
    let config = NoiseConfig::parse(&files.path(name), &files.text(name)?)?;
    let betas = if config.beta_schedule == "linear" { BetaSchedule::Linear } else { BetaSchedule::ScaledLinear };
    let prediction = if config.prediction_type == "v_prediction" { Prediction::V } else { Prediction::Epsilon };
    Ok((Schedule::new(betas, config.beta_start, config.beta_end, config.num_train_timesteps), prediction))
}

/// The element type of the UNet's activations.
///
/// # Errors
/// [`Error::Invalid`] for f16 on a device without it.
pub(crate) fn activation_type(gpu: &Gpu, precision: Precision) -> Result<DType> {
    match precision {
        Precision::F32 => Ok(DType::F32),
        Precision::Auto if gpu.caps().f16 && !gpu.caps().is_cpu() => Ok(DType::F16),
        Precision::Auto => Ok(DType::F32),
        Precision::F16 if gpu.caps().f16 => Ok(DType::F16),
        Precision::F16 => Err(Error::invalid("precision", format!("f32: {} has no f16", gpu.caps().name), "f16")),
    }
}

pub(crate) async fn load_unet(gpu: &Gpu, files: &Files, dtype: DType) -> Result<UNet> {
    let config = UNetConfig::parse(&files.path("unet/config.json"), &files.text("unet/config.json")?)?;
    let weights = open_part(files, "unet")?;
    UNet::load(&mut Loader::new(gpu, &weights, dtype), config).await
}

pub(crate) async fn load_clip(gpu: &Gpu, files: &Files) -> Result<Clip> {
    let path = "text_encoder/config.json";
    let config = ClipConfig::parse(&files.path(path), &files.text(path)?)?;
    Clip::load(gpu, open_part(files, "text_encoder")?, config).await
}

pub(crate) fn vae_config(files: &Files) -> Result<VaeConfig> {
    VaeConfig::parse(&files.path("vae/config.json"), &files.text("vae/config.json")?)
}

impl Pipeline {
    /// Load a model onto a device.
    ///
    /// # Errors
    /// Of the files (which one, what is wrong, what to do), or of the device.
    pub async fn load(gpu: &Gpu, files: &Files, precision: Precision) -> Result<Pipeline> {
        let dtype = activation_type(gpu, precision)?;
        let before = gpu.memory_in_use().0;
        let tokenizer = load_tokenizer(files)?;
        let (schedule, prediction) = load_schedule(files)?;
        let clip = load_clip(gpu, files).await?;
        let unet = load_unet(gpu, files, dtype).await?;
        let vae_config = vae_config(files)?;
        if unet.config.cross_dim != clip.config.hidden_size {
            let expected = format!("{}, the text encoder's width", clip.config.hidden_size);
            return Err(Error::Unsupported {
                path: files.path("unet/config.json"),
                what: "cross_attention_dim".into(),
                expected,
                found: unet.config.cross_dim.to_string(),
            });
        }
        if unet.config.in_channels != 4 || unet.config.out_channels != 4 || vae_config.factor() != 8 {
            return Err(Error::Unsupported {
                path: files.path("unet/config.json"),
                what: "a picture".into(),
                expected: "4 latent channels and a VAE of factor 8".into(),
                found: format!("{} channels, factor {}", unet.config.in_channels, vae_config.factor()),
            });
        }
        let weights = open_part(files, "vae")?;
        // f32: SDXL's decoder overflows f16, and a black picture is a bug.
        let decoder = Decoder::load(&mut Loader::new(gpu, &weights, DType::F32), &vae_config).await?;
        gpu.flush().await?;
        let weights = gpu.memory_in_use().0 - before;
        Ok(Pipeline {
            gpu: gpu.clone(),
            tokenizer,
            clip,
            unet,
            decoder,
            vae_config,
            schedule,
            prediction,
            dtype,
            weights,
        })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The element type of the UNet's activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Make pictures. `observe` hears of progress, between steps, and may break to cancel.
    ///
    /// # Errors
    /// [`Error::Invalid`] before anything runs; [`Error::DoesNotFit`] before anything is allocated; [`Error::Cancelled`];
    /// [`Error::DeviceLost`].
    pub async fn generate(
        &self,
        request: &Request,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let begin = Instant::now();
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        request.check()?;
        let own = self.unet.config.sample_size as u32 * 8;
        let (width, height) = (request.width.unwrap_or(own), request.height.unwrap_or(own));
        let request = Request { width: Some(width), height: Some(height), ..request.clone() };
        let job = self.job(&request)?;
        let forecast = self.forecast(&job)?;
        self.gpu.reset_peak();
        let mut profile = request.profile.then(Profile::default);

        // text → context
        let mut warnings = Vec::new();
        let ids = self.tokens(&request, job.passes, &mut warnings);
        let context = self.context(&ids, job.passes, profile.as_mut()).await?;
        let mut timings = Timings { text: ms(begin), ..Default::default() };

        // seed → x
        let since = Instant::now();
        let mut generator = Generator::new(request.seed);
        let numel = job.shape.iter().product();
        let drawn = generator.randn(numel);
        let unit = match &request.latents {
            None => drawn,
            Some(given) if given.len() == numel => given.clone(),
            Some(given) => {
                return Err(Error::invalid("latents", format!("{:?}, {numel} numbers", job.shape), given.len()));
            }
        };
        let mut sampling = Sampling::new(self, &job, context).await?;
        sampling.start(&unit, job.shape, self.schedule.start_scale(job.sigmas[0]));
        timings.prepare = ms(since);

        // the loop
        let since = Instant::now();
        sampling.run(&job, &mut generator, profile.as_mut(), observe).await?;
        let latents = sampling.latents(&job).await?;
        let masks = sampling.masks(&job).await?;
        timings.sample = ms(since);
        let allocator = self.gpu.allocator_bytes();
        drop(sampling);

        // latents → pictures
        let since = Instant::now();
        let images = self.decode(&latents, &job, profile.as_mut(), observe).await?;
        timings.decode = ms(since);
        timings.total = ms(begin);
        let memory =
            Memory { weights: self.weights, planned_peak: forecast, peak: self.gpu.memory_in_use().1, allocator };
        let (shape, sigmas) = (job.shape, job.sigmas);
        Ok(Generated {
            request,
            images,
            latents: to_nchw(&latents, shape),
            shape,
            masks,
            sigmas,
            warnings,
            timings,
            memory,
            profile,
        })
    }
}

/// A request turned into numbers.
struct Job {
    shape: [usize; 4],
    passes: Passes,
    sigmas: Vec<f32>,
    recording: Recording,
    calls: Vec<Step>,
    timesteps: Vec<f32>,
}

impl Job {
    fn dims(&self) -> [u32; 4] {
        let [b, c, h, w] = self.shape.map(|n| n as u32);
        [b, h, w, c]
    }

    fn mask_floats(&self) -> usize {
        let [b, h, w, _] = self.dims();
        self.calls.len() * (b * mask_stride(h, w)) as usize
    }
}

impl Pipeline {
    fn job(&self, request: &Request) -> Result<Job> {
        let size = |pixels: Option<u32>| pixels.unwrap_or(8) as usize / 8;
        let shape = [request.batch as usize, 4, size(request.height), size(request.width)];
        assert!(
            shape[2].min(shape[3]) > RADIUS as usize,
            "request.check allows no latent that cannot be blurred: {shape:?}"
        );
        let sigmas = sigmas(&self.schedule, scheduler(&request.scheduler)?, request.steps as usize, 1.0)?;
        let exact: Vec<f64> = sigmas.iter().map(|&sigma| f64::from(sigma)).collect();
        let recording = Recording::new(sampler(&request.sampler)?, &exact);
        let scales = Scales {
            cfg: request.cfg,
            sag_scale: request.sag_scale,
            sag_blur_sigma: request.sag_blur_sigma,
            sag_threshold: request.sag_threshold,
        };
        let (calls, timesteps) = steps(&self.schedule, self.prediction, &recording.calls(), &scales);
        Ok(Job { shape, passes: Passes::of(request.cfg, request.sag_scale), sigmas, recording, calls, timesteps })
    }

    /// Record everything without a byte allocated: does it fit, and what will the peak be?
    fn forecast(&self, job: &Job) -> Result<u64> {
        let gpu = &self.gpu;
        let alignment = gpu.caps().uniform_alignment;
        let what = || format!("a picture of {}x{} (batch {})", job.shape[3] * 8, job.shape[2] * 8, job.shape[0]);
        let mut g = Graph::new(gpu, self.dtype);
        let (x, out) = (g.argument("x", job.dims(), DType::F32), g.argument("denoised", job.dims(), DType::F32));
        let floats =
            |g: &mut Graph, n: usize| g.argument("floats", [1, 1, 1, n.next_multiple_of(4) as u32], DType::F32);
        let timesteps = floats(&mut g, job.timesteps.len());
        let mask = job.passes.sag.then(|| floats(&mut g, job.mask_floats()));
        let kv = self.context_shapes(job.passes);
        let context: Vec<_> = kv.iter().map(|&dims| g.argument("context", dims, self.dtype)).collect();
        denoise(&mut g, &self.unet, job.passes, x, &Surroundings { timesteps, context: &context, mask }, out);
        gpu.check_graph(&what(), &g)?;
        let bytes = |n: u64| n.max(16).next_multiple_of(16);
        let context: u64 =
            kv.iter().map(|dims| bytes(dims.iter().map(|&d| u64::from(d)).product::<u64>() * self.dtype.bytes())).sum();
        let latent = bytes(job.shape.iter().product::<usize>() as u64 * 4);
        let latents = job.recording.plan().slots.len() as u64 * latent;
        let mask = if job.passes.sag { bytes(job.mask_floats() as u64 * 4) } else { 0 };
        let scalars = bytes(job.timesteps.len() as u64 * 4) + (job.calls.len() + lincombs(&job.recording)) as u64 * 256;
        let lincomb_dims = arities(&job.recording).len() as u64 * 16;
        let sample = g.planned_bytes(alignment) + context + latents + mask + scalars + lincomb_dims;

        let mut g = Graph::new(gpu, DType::F32);
        let [_, h, w, c] = job.dims();
        let z = g.argument("latent", [1, h, w, c], DType::F32);
        let z = pack(&mut g, z, 1);
        let picture = self.decoder.forward(&mut g, z);
        g.keep_argument(picture);
        gpu.check_graph(&what(), &g)?;
        let pixels = bytes(picture.bytes());
        let decode = g.planned_bytes(alignment) + 2 * pixels + bytes(latent / job.shape[0] as u64) + 256;
        let stage = sample.max(decode);
        gpu.check_memory(&what(), stage)?;
        Ok(gpu.memory_in_use().0 + stage)
    }

    fn tokens(&self, request: &Request, passes: Passes, warnings: &mut Vec<String>) -> Vec<u32> {
        let mut ids = Vec::new();
        let prompts = [("negative prompt", &request.negative_prompt), ("prompt", &request.prompt)];
        for (what, prompt) in &prompts[usize::from(!passes.uncond)..] {
            let tokens = self.tokenizer.encode(prompt);
            if tokens.truncated > 0 {
                let kept = tokens.ids.len() - 2;
                warnings.push(format!(
                    "the {what} has {} tokens, the text model reads {kept}: the last {} were left out",
                    kept + tokens.truncated,
                    tokens.truncated
                ));
            }
            ids.extend(tokens.ids);
        }
        ids
    }

    /// Dims of the keys and values of every cross-attention.
    fn context_shapes(&self, passes: Passes) -> Vec<[u32; 4]> {
        let tokens = self.clip.config.max_position_embeddings as u32;
        self.unet.context_widths().map(|width| [passes.prompts(), 1, tokens, width]).collect()
    }

    /// Prompts to the keys and values of every cross-attention, in buffers that outlive the loop.
    async fn context(&self, ids: &[u32], passes: Passes, profile: Option<&mut Profile>) -> Result<Vec<Buffer>> {
        let gpu = &self.gpu;
        let config = &self.clip.config;
        let dims = [passes.prompts(), 1, config.max_position_embeddings as u32, config.hidden_size as u32];
        let embeddings = gpu.upload("embeddings", &self.clip.embed(ids)?).await?;
        let mut g = Graph::new(gpu, DType::F32);
        let x = g.bind("embeddings", &embeddings, dims, DType::F32);
        let hidden = self.clip.forward(&mut g, x);
        g.dtype = self.dtype;
        let mut buffers = Vec::new();
        for kv in self.unet.context(&mut g, hidden) {
            let buffer = gpu.storage("context", kv.bytes()).await?;
            g.keep(kv, &buffer);
            buffers.push(buffer);
        }
        run_once(gpu, g, &Step::default(), profile).await?;
        Ok(buffers)
    }

    async fn decode(
        &self,
        latents: &[f32],
        job: &Job,
        mut profile: Option<&mut Profile>,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Vec<Image>> {
        let gpu = &self.gpu;
        let [batch, h, w, c] = job.dims();
        let z = gpu.storage("latent", u64::from(h * w * c) * 4).await?;
        let mut g = Graph::new(gpu, DType::F32);
        let bound = g.bind("latent", &z, [1, h, w, c], DType::F32);
        let packed = pack(&mut g, bound, 1);
        let picture = self.decoder.forward(&mut g, packed);
        let pixels = gpu.storage("picture", picture.bytes()).await?;
        g.keep(picture, &pixels);
        let program = Program::new(gpu, g).await?;
        let scalars = gpu.steps(&[Step { c_in: 1.0 / self.vae_config.scaling_factor, ..Default::default() }]).await?;
        let mut images = Vec::new();
        for (i, latent) in latents.chunks_exact((h * w * c) as usize).enumerate() {
            z.write(latent);
            let mut step = gpu.record(profile.is_some());
            step.run(&program, &[], &scalars, 0);
            step.submit(profile.as_deref_mut()).await?;
            let data: Vec<f32> = pixels.read(picture.len() as usize).await?;
            images.push(Image::from_nhwc(&data, picture.width(), picture.height(), 4)?);
            if observe(Progress::Decoded { done: i as u32 + 1, batch }).is_break() {
                return Err(Error::Cancelled);
            }
        }
        Ok(images)
    }
}

/// Plan, run and drop a graph.
pub(crate) async fn run_once(gpu: &Gpu, g: Graph, scalars: &Step, profile: Option<&mut Profile>) -> Result<()> {
    let program = Program::new(gpu, g).await?;
    let scalars = gpu.steps(&[*scalars]).await?;
    let mut step = gpu.record(profile.is_some());
    step.run(&program, &[], &scalars, 0);
    step.submit(profile).await?;
    gpu.wait().await
}

/// Numbers of terms that the recording's linear combinations have, each once.
fn arities(recording: &Recording) -> Vec<usize> {
    let terms = |command: &Command| match command {
        Command::Lincomb { terms, .. } => Some(terms.len()),
        _ => None,
    };
    let mut all: Vec<usize> = recording.steps.iter().flatten().filter_map(terms).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn lincombs(recording: &Recording) -> usize {
    recording.steps.iter().flatten().filter(|command| matches!(command, Command::Lincomb { .. })).count()
}

/// The sampler's loop on the device: programs, latents, scalars.
struct Sampling {
    gpu: Gpu,
    latents: Vec<Buffer>,
    slot_of: Vec<usize>,
    denoise: Program,
    lincombs: Vec<(usize, Program)>,
    scalars: Steps,
    coefficients: Steps,
    mask: Option<Buffer>,
    _timesteps: Buffer,
}

impl Sampling {
    async fn new(p: &Pipeline, job: &Job, context: Vec<Buffer>) -> Result<Sampling> {
        let gpu = &p.gpu;
        let dims = job.dims();
        let bytes = job.shape.iter().product::<usize>() as u64 * 4;
        let plan = job.recording.plan();
        let mut latents = Vec::new();
        for _ in &plan.slots {
            latents.push(gpu.storage("latent", bytes).await?);
        }
        let timesteps = gpu.upload("timesteps", &job.timesteps).await?;
        let mask = match job.passes.sag {
            true => Some(gpu.storage("masks", job.mask_floats() as u64 * 4).await?),
            false => None,
        };

        let mut g = Graph::new(gpu, p.dtype);
        let (x, denoised) = (g.argument("x", dims, DType::F32), g.argument("denoised", dims, DType::F32));
        let bound = Surroundings {
            timesteps: g.bind("timesteps", &timesteps, [1, 1, 1, (timesteps.bytes() / 4) as u32], DType::F32),
            mask: mask.as_ref().map(|mask| g.bind("masks", mask, [1, 1, 1, (mask.bytes() / 4) as u32], DType::F32)),
            context: &(p.context_shapes(job.passes).iter().zip(&context))
                .map(|(&dims, buffer)| g.bind("context", buffer, dims, p.dtype))
                .collect::<Vec<_>>(),
        };
        denoise(&mut g, &p.unet, job.passes, x, &bound, denoised);
        let denoise = Program::new(gpu, g).await?;

        let mut lincombs = Vec::new();
        for terms in arities(&job.recording) {
            let mut g = Graph::new(gpu, DType::F32);
            let out = g.argument("out", dims, DType::F32);
            let inputs: Vec<_> = (0..terms).map(|_| g.argument("term", dims, DType::F32)).collect();
            lincomb(&mut g, out, &inputs);
            lincombs.push((terms, Program::new(gpu, g).await?));
        }
        let coefficients: Vec<[f32; MAX_TERMS]> =
            job.recording.steps.iter().flatten().filter_map(coefficients).collect();
        Ok(Sampling {
            gpu: gpu.clone(),
            latents,
            slot_of: plan.slot_of,
            denoise,
            lincombs,
            scalars: gpu.steps(&job.calls).await?,
            coefficients: gpu.steps(&coefficients).await?,
            mask,
            _timesteps: timesteps,
        })
    }

    fn buffer(&self, latent: Latent) -> Buffer {
        self.latents[self.slot_of[latent.0]].clone()
    }

    /// x = unit noise · scale.
    fn start(&self, unit: &[f32], shape: [usize; 4], scale: f32) {
        self.buffer(Recording::START).write(&to_nhwc(unit, shape).iter().map(|n| n * scale).collect::<Vec<f32>>());
    }

    /// Replay the recording: one submit a step, at most two steps in flight.
    async fn run(
        &mut self,
        job: &Job,
        generator: &mut Generator,
        mut profile: Option<&mut Profile>,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let steps = job.recording.steps.len();
        let mut stop = observe(Progress::Start { steps }).is_break();
        let (mut call, mut combination) = (0, 0);
        let mut in_flight = None;
        for (i, commands) in job.recording.steps.iter().enumerate() {
            if stop {
                break;
            }
            for command in commands {
                self.prepare(command, job, generator).await?;
            }
            let mut step = self.gpu.record(profile.is_some());
            for command in commands {
                match command {
                    Command::Noise { .. } => {}
                    Command::Denoise { out, x, .. } => {
                        step.run(&self.denoise, &[&self.buffer(*x), &self.buffer(*out)], &self.scalars, call);
                        call += 1;
                    }
                    Command::Lincomb { out, terms } => {
                        let buffers = self.operands(*out, terms);
                        let arguments: Vec<&Buffer> = buffers.iter().collect();
                        step.run(self.lincomb(terms.len()), &arguments, &self.coefficients, combination);
                        combination += 1;
                    }
                }
            }
            step.submit(profile.as_deref_mut()).await?;
            let ticket = self.gpu.ticket();
            if let Some(before) = in_flight.replace(ticket) {
                before.await?;
                stop = observe(Progress::Step { done: i, steps }).is_break();
            }
        }
        if let Some(last) = in_flight {
            last.await?;
            stop = stop || observe(Progress::Step { done: steps, steps }).is_break();
        }
        if stop { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Bind groups for a command's latents; noise from the host.
    async fn prepare(&mut self, command: &Command, job: &Job, generator: &mut Generator) -> Result<()> {
        match command {
            Command::Noise { out } => {
                let unit = generator.randn(job.shape.iter().product());
                self.buffer(*out).write(&to_nhwc(&unit, job.shape));
            }
            Command::Denoise { out, x, .. } => {
                let (x, out) = (self.buffer(*x), self.buffer(*out));
                self.denoise.prepare(&[&x, &out]).await?;
            }
            Command::Lincomb { out, terms } => {
                let buffers = self.operands(*out, terms);
                let arguments: Vec<&Buffer> = buffers.iter().collect();
                for (arity, program) in &mut self.lincombs {
                    if *arity == terms.len() {
                        program.prepare(&arguments).await?;
                    }
                }
            }
        }
        Ok(())
    }

    fn operands(&self, out: Latent, terms: &[(f64, Latent)]) -> Vec<Buffer> {
        std::iter::once(out).chain(terms.iter().map(|(_, latent)| *latent)).map(|latent| self.buffer(latent)).collect()
    }

    fn lincomb(&self, terms: usize) -> &Program {
        match self.lincombs.iter().find(|(arity, _)| *arity == terms) {
            Some((_, program)) => program,
            None => unreachable!("a program for every number of terms, also {terms}"),
        }
    }

    /// The final latents [B, h, w, 4].
    async fn latents(&self, job: &Job) -> Result<Vec<f32>> {
        let result = job.recording.result.unwrap_or(Recording::START);
        let latents: Vec<f32> = self.buffer(result).read(job.shape.iter().product()).await?;
        if latents.iter().all(|value| value.is_finite()) {
            return Ok(latents);
        }
        Err(Error::Device {
            device: self.gpu.caps().name.clone(),
            what: "the sampler".into(),
            reason: "the latents are not finite; try --precision f32, a lower cfg or another sampler".into(),
        })
    }

    /// The masks of all calls, [calls][B · h · w].
    async fn masks(&self, job: &Job) -> Result<Vec<Vec<f32>>> {
        let Some(mask) = &self.mask else { return Ok(Vec::new()) };
        let [b, h, w, _] = job.dims();
        let (stride, area) = (mask_stride(h, w) as usize, (h * w) as usize);
        let all: Vec<f32> = mask.read(job.mask_floats()).await?;
        let images = |call: &[f32]| call.chunks_exact(stride).flat_map(|image| image[..area].to_vec()).collect();
        Ok(all.chunks_exact(b as usize * stride).map(images).collect())
    }
}

fn coefficients(command: &Command) -> Option<[f32; MAX_TERMS]> {
    let Command::Lincomb { terms, .. } = command else { return None };
    Some(std::array::from_fn(|i| terms.get(i).map_or(0.0, |(c, _)| *c as f32)))
}

/// [B, C, H, W] → [B, H, W, C].
pub(crate) fn to_nhwc(data: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    let mut out = Vec::with_capacity(data.len());
    for image in 0..b {
        for pixel in 0..h * w {
            out.extend((0..c).map(|channel| data[(image * c + channel) * h * w + pixel]));
        }
    }
    out
}

/// [B, H, W, C] → [B, C, H, W], `shape` given as the latter.
pub(crate) fn to_nchw(data: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    let mut out = Vec::with_capacity(data.len());
    for image in data.chunks_exact(c * h * w).take(b) {
        for channel in 0..c {
            out.extend(image.iter().skip(channel).step_by(c));
        }
    }
    out
}
