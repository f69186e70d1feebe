//! The command line: names, defaults, and what becomes of a wrong one.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use scumble::{Error, LoadOptions, Pipeline, Request, Result};

use crate::options::{DeviceArgs, InitArgs, ModelArgs, SizeArgs, TextArgs, numbers, whole};

/// Stable Diffusion with Self-Attention Guidance (SAG) on any Vulkan, Metal or DX12 GPU.
#[derive(Parser)]
#[command(name = "scumble", version, after_help = "`scumble PROMPT` is short for `scumble generate PROMPT`.")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Make a picture of a prompt
    Generate(Box<GenerateArgs>),
    /// One picture of three: without SAG, with SAG, and where SAG acted
    Compare(Box<GenerateArgs>),
    /// Adapters, capabilities, kernel variants; with -m a model's parts
    Info(InfoArgs),
    /// Run one part on given tensors, to hold it against PyTorch
    Probe(ProbeArgs),
    /// Throughput of kernels, steps and pictures, and the share of the device's measured limits
    Bench(Box<BenchArgs>),
}

/// Options of generate and compare.
#[derive(clap::Args, Clone)]
pub struct GenerateArgs {
    /// What to see (may be empty)
    #[arg(value_name = "PROMPT")]
    prompt: String,
    /// What not to see
    #[arg(short, long = "negative", default_value = "", value_name = "NEGATIVE", hide_default_value = true)]
    negative: String,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    init: InitArgs,
    #[command(flatten)]
    sizes: SizeArgs,
    /// Cut the picture into tiles of so many pixels for the VAE [default: only where it does not fit whole]
    #[arg(long, allow_hyphen_values = true, value_name = "PIXELS")]
    vae_tile: Option<i64>,
    /// Hold one part of the model on the device at a time: slower, in less memory
    #[arg(long)]
    lowmem: bool,
    /// The picture's file; with a batch, NAME-1.png and so on [default: a new scumble-SEED.png]
    #[arg(short, long, value_name = "OUT.png")]
    pub out: Option<PathBuf>,
    /// Seed of the noise, as in ComfyUI [default: a random one, printed]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    seed: Option<String>,
    /// Steps of the sampler
    #[arg(long, default_value_t = 20, allow_hyphen_values = true, value_name = "N")]
    steps: i64,
    /// Scale of classifier-free guidance
    #[arg(long, default_value_t = 7.0, allow_hyphen_values = true, value_name = "X")]
    cfg: f32,
    /// The sampler: euler, euler_ancestral, heun, dpmpp_2m, ddim
    #[arg(long, default_value = "euler", value_name = "NAME")]
    sampler: String,
    /// The scheduler: normal, karras, exponential, simple, ddim_uniform
    #[arg(long, default_value = "normal", value_name = "NAME")]
    scheduler: String,
    /// Pixels, a multiple of 8 [default: the model's own]
    #[arg(long, allow_hyphen_values = true, value_name = "W")]
    width: Option<i64>,
    /// Pixels, a multiple of 8 [default: the model's own]
    #[arg(long, allow_hyphen_values = true, value_name = "H")]
    height: Option<i64>,
    /// Pictures at once
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    batch: Option<i64>,
    /// Scale of self-attention guidance; 0 is off
    #[arg(long, default_value_t = 0.75, allow_hyphen_values = true, value_name = "X")]
    sag_scale: f32,
    /// SAG's blur, in latent pixels
    #[arg(long, default_value_t = 3.0, allow_hyphen_values = true, value_name = "X")]
    sag_blur_sigma: f32,
    /// Attention mass above which SAG blurs; the mean is 1
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_name = "X")]
    sag_threshold: f32,
    /// Without self-attention guidance
    #[arg(long)]
    pub no_sag: bool,
    /// Start from this unit-variance noise, key `latents` [B, 4, h, w], in place of the seed's
    #[arg(long, value_name = "X.safetensors")]
    latents_in: Option<PathBuf>,
    /// Write the final latents, key `latents` [B, 4, h, w] in the UNet's scale
    #[arg(long, value_name = "Y.safetensors")]
    pub latents_out: Option<PathBuf>,
    /// Write SAG's masks into this folder: a picture of each model call, their sum, and masks.safetensors
    #[arg(long, value_name = "DIR")]
    pub mask_out: Option<PathBuf>,
    /// Print one JSON object: files, request, milliseconds, bytes
    #[arg(long)]
    pub json: bool,
    /// Measure and print the device time of every op (slower)
    #[arg(long)]
    pub profile: bool,
    /// Measure first which kernels are fastest for this model and size here, and keep the result (once, up to a minute)
    #[arg(long)]
    pub autotune: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl GenerateArgs {
    /// The request that these options make.
    pub fn request(&self) -> Result<Request> {
        let mut request = Request {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative.clone(),
            seed: self.seed()?,
            steps: whole("steps", self.steps, "a whole number from 1 to 10000")?,
            cfg: self.cfg,
            sampler: self.sampler.clone(),
            scheduler: self.scheduler.clone(),
            width: self.width.map(|w| whole("width", w, "a multiple of 8 from 40 to 16384")).transpose()?,
            height: self.height.map(|h| whole("height", h, "a multiple of 8 from 40 to 16384")).transpose()?,
            batch: whole("batch", self.batch.unwrap_or(1), "a whole number from 1 to 1024")?,
            sag_scale: if self.no_sag { 0.0 } else { self.sag_scale },
            sag_blur_sigma: self.sag_blur_sigma,
            sag_threshold: self.sag_threshold,
            denoise: self.init.denoise,
            clip_skip: self.text.skip()?,
            prompt_style: self.text.style()?,
            original_size: self.sizes.original_size.as_deref().map(|t| numbers("original-size", t, 'x')).transpose()?,
            crop: numbers("crop", &self.sizes.crop, ',')?,
            target_size: self.sizes.target_size.as_deref().map(|t| numbers("target-size", t, 'x')).transpose()?,
            vae_tile: self.vae_tile.map(|n| whole("vae-tile", n, "a multiple of 8 from 64 to 16384")).transpose()?,
            init: None,
            latents: None,
            profile: self.profile,
            autotune: self.autotune,
        };
        if let Some(path) = &self.latents_in {
            self.take_latents(path, &mut request)?;
        }
        if let Some(path) = &self.init.init {
            let size = [request.width, request.height];
            let init = crate::pictures::init(path, self.init.mask.as_deref(), self.init.mask_feather, size)?;
            (request.width, request.height) = (Some(init.image.width), Some(init.image.height));
            request.init = Some(init);
        }
        request.check()?;
        Ok(request)
    }

    /// Start noise from a file; batch and sizes are its own, unless they were given and disagree.
    fn take_latents(&self, path: &std::path::Path, request: &mut Request) -> Result<()> {
        let tensor = crate::tensors::Tensors::open(path)?.take("latents")?;
        let [b, 4, h, w] = tensor.shape[..] else {
            return Err(Error::invalid("latents", "[B, 4, h, w]", format!("{:?}", tensor.shape)));
        };
        let given = [("batch", self.batch, b), ("width", self.width, w * 8), ("height", self.height, h * 8)];
        for (what, asked, found) in given {
            if asked.is_some_and(|asked| asked != found as i64) {
                return Err(Error::invalid(what, format!("{found}, as {} has", path.display()), asked.unwrap_or(0)));
            }
        }
        if let Some(bad) = tensor.data.iter().find(|value| !value.is_finite()) {
            return Err(Error::invalid("latents", "finite numbers", bad));
        }
        request.batch = b as u32;
        (request.width, request.height) = (Some(w as u32 * 8), Some(h as u32 * 8));
        request.latents = Some(tensor.data);
        Ok(())
    }

    /// The seed: given, or one that nobody chose.
    fn seed(&self) -> Result<u64> {
        let expected = "a whole number from 0 to 18446744073709551615, or -1 for a random one";
        match self.seed.as_deref() {
            // std's hasher is seeded by the system: 32 bits of it, since the generator reads no more.
            None | Some("-1") => {
                use std::hash::{BuildHasher, Hasher};
                let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
                Ok(random & 0xffff_ffff)
            }
            Some(text) => text.parse().map_err(|_| Error::invalid("seed", expected, text)),
        }
    }

    /// Device and model of these options, and the milliseconds that the model took.
    pub fn load(&self) -> Result<(Pipeline, f64)> {
        let gpu = self.device.open()?;
        let since = std::time::Instant::now();
        let model = self.model.open()?;
        let options = LoadOptions { precision: self.device.precision()?, lowmem: self.lowmem };
        let mut pipeline = pollster::block_on(Pipeline::load(&gpu, model, options))?;
        pipeline.embeddings = self.text.embeddings(&self.model);
        Ok((pipeline, since.elapsed().as_secs_f64() * 1e3))
    }
}

/// Options of info.
#[derive(clap::Args)]
pub struct InfoArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Options of bench.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Every heavy op at every shape of SD 1.5, SDXL and the VAE, checked, then timed
    #[arg(long)]
    pub kernels: bool,
    /// Denoising steps: one pass, CFG, CFG and SAG, for each batch size
    #[arg(long)]
    pub step: bool,
    /// Pictures: prompt to pixels [default without any of the three: all of them]
    #[arg(long)]
    pub image: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Pixels, a multiple of 8 [default: the model's own]
    #[arg(long, allow_hyphen_values = true, value_name = "W")]
    pub width: Option<i64>,
    /// Pixels, a multiple of 8 [default: the model's own]
    #[arg(long, allow_hyphen_values = true, value_name = "H")]
    pub height: Option<i64>,
    /// Batch sizes of --step, with commas [default: 1,2,4,8]; the first is that of --kernels [default: the network's own]
    #[arg(long, value_delimiter = ',', allow_hyphen_values = true, value_name = "N,..")]
    pub batch: Vec<i64>,
    /// Steps of a picture
    #[arg(long, default_value_t = 20, allow_hyphen_values = true, value_name = "N")]
    pub steps: i64,
    /// Pictures after the first
    #[arg(long, default_value_t = 5, allow_hyphen_values = true, value_name = "N")]
    pub repeats: i64,
    /// Shapes of --kernels: sd15, sdxl, vae [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAME,..")]
    pub shapes: Vec<String>,
    /// Only ops of --kernels whose name holds this, like `conv 3x3` or `attention`
    #[arg(long, default_value = "", value_name = "TEXT", hide_default_value = true)]
    pub filter: String,
    /// Time for the samples of one op
    #[arg(long, default_value_t = 0.2, allow_hyphen_values = true, value_name = "X")]
    pub seconds: f64,
    /// Before --step and --image, measure which kernels are fastest for this model and size here, and keep the result
    #[arg(long)]
    pub autotune: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Options of probe.
#[derive(clap::Args)]
pub struct ProbeArgs {
    /// The part.
    #[command(subcommand)]
    pub part: Part,
}

/// Tensor files of a probe.
#[derive(clap::Args)]
pub struct InOut {
    /// Tensors to read
    #[arg(long = "in", value_name = "A.safetensors")]
    pub input: PathBuf,
    /// Tensors to write
    #[arg(long = "out", value_name = "B.safetensors")]
    pub output: PathBuf,
}

/// A part to probe.
#[derive(Subcommand)]
pub enum Part {
    /// Token ids of a prompt, as JSON
    Tokens {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        text: TextArgs,
        /// The prompt
        #[arg(long)]
        prompt: String,
    },
    /// hidden_states and pooled of a prompt
    Clip {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        text: TextArgs,
        /// The prompt
        #[arg(long)]
        prompt: String,
        /// Tensors to write
        #[arg(long = "out", value_name = "B.safetensors")]
        output: PathBuf,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// sample of sample, timestep, encoder_hidden_states
    Unet {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        files: InOut,
        /// Also `mass`: the mid block's attention mass per key
        #[arg(long)]
        sag_map: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// sample (picture) of sample (latents, unscaled)
    VaeDecode {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        files: InOut,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// mean and logvar of sample (picture)
    VaeEncode {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        files: InOut,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// sigmas and timesteps, as JSON
    Schedule {
        #[command(flatten)]
        model: ModelArgs,
        /// The scheduler
        #[arg(long, default_value = "normal")]
        scheduler: String,
        /// Steps
        #[arg(long, default_value_t = 20, allow_hyphen_values = true)]
        steps: i64,
        /// The last part of a longer schedule
        #[arg(long, default_value_t = 1.0, allow_hyphen_values = true)]
        denoise: f32,
    },
    /// noise of a seed
    Noise {
        #[command(flatten)]
        model: ModelArgs,
        /// The seed
        #[arg(long)]
        seed: u64,
        /// The shape: 1,4,64,64
        #[arg(long, value_delimiter = ',', required = true)]
        shape: Vec<usize>,
        /// Tensors to write
        #[arg(long = "out", value_name = "B.safetensors")]
        output: PathBuf,
    },
    /// degraded and mask of denoised and mass
    Degrade {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        files: InOut,
        /// The mid block's grid: H,W
        #[arg(long, value_delimiter = ',', num_args = 1, required = true, value_name = "H,W")]
        mid: Vec<u32>,
        /// Blur, in latent pixels
        #[arg(long, default_value_t = 3.0, allow_hyphen_values = true)]
        blur_sigma: f32,
        /// Attention mass above which it blurs
        #[arg(long, default_value_t = 1.0, allow_hyphen_values = true)]
        threshold: f32,
        #[command(flatten)]
        device: DeviceArgs,
    },
}

/// `scumble PROMPT …` is `scumble generate PROMPT …`.
pub fn with_default_command(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const KNOWN: &[&str] =
        &["generate", "compare", "info", "probe", "bench", "help", "-h", "--help", "-V", "--version"];
    let mut args: Vec<OsString> = args.collect();
    if args.get(1).is_some_and(|first| !KNOWN.iter().any(|known| first == known)) {
        args.insert(1, "generate".into());
    }
    args
}

/// Help as clap prints it; a mistake as one line.
pub fn report(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
    }
    let text = error.to_string();
    let message = text.split("\n\nUsage").next().unwrap_or(&text);
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    eprintln!("{line}; see `scumble --help`");
    ExitCode::from(2)
}
