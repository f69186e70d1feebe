//! Options that several commands share: device, model, text, the picture to start from, SDXL's sizes.

use std::path::PathBuf;

use scumble::files::Files;
use scumble::gpu::{Gpu, GpuOptions};
use scumble::text::{Embeddings, Style};
use scumble::{Checkpoint, Error, Precision, Result, Source};

/// Which device, and how to run on it.
#[derive(clap::Args, Clone)]
pub struct DeviceArgs {
    /// The adapter: its index in `scumble info`, or a part of its name
    #[arg(long, value_name = "NAME|INDEX")]
    device: Option<String>,
    /// Numbers that the UNet computes in: auto (f16 on GPUs that have it), f32, f16
    #[arg(long, default_value = "auto", value_name = "KIND")]
    precision: String,
    /// Force a kernel variant, to bisect a fault: conv2d=portable
    #[arg(long, value_name = "OP=NAME")]
    variant: Vec<String>,
    /// Build kernels with all of wgpu's runtime checks, to find a fault (slower)
    #[arg(long)]
    checked: bool,
    /// Where compiled kernels and what --autotune found are kept [default: the system's cache folder]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Keep nothing, and read nothing that was kept
    #[arg(long, conflicts_with = "cache_dir")]
    no_cache: bool,
}

impl DeviceArgs {
    /// Open the device.
    pub fn open(&self) -> Result<Gpu> {
        let pair = |text: &String| match text.split_once('=') {
            Some((op, name)) => Ok((op.to_owned(), name.to_owned())),
            None => Err(Error::invalid("--variant", "OP=NAME", text)),
        };
        let variants = self.variant.iter().map(pair).collect::<Result<_>>()?;
        let own = || dirs::cache_dir().map(|dir| dir.join("scumble"));
        let cache = if self.no_cache { None } else { self.cache_dir.clone().or_else(own) };
        pollster::block_on(Gpu::open(&GpuOptions {
            device: self.device.clone(),
            cache,
            checked: self.checked,
            variants,
        }))
    }

    /// `--precision`.
    pub fn precision(&self) -> Result<Precision> {
        match self.precision.as_str() {
            "auto" => Ok(Precision::Auto),
            "f32" => Ok(Precision::F32),
            "f16" => Ok(Precision::F16),
            other => Err(Error::invalid("--precision", "one of [auto, f32, f16]", other)),
        }
    }
}

/// Which model.
#[derive(clap::Args, Clone)]
pub struct ModelArgs {
    /// A .safetensors file or a diffusers folder; the embedded model if left out
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// A VAE in place of the model's
    #[arg(long, value_name = "FILE")]
    vae: Option<PathBuf>,
    /// A text encoder in place of the model's (twice for SDXL)
    #[arg(long, value_name = "FILE")]
    clip: Vec<PathBuf>,
    /// A LoRA and its strength; may be given several times
    #[arg(long, value_name = "FILE[:STRENGTH]")]
    lora: Vec<String>,
}

impl ModelArgs {
    /// Its files.
    pub fn open(&self) -> Result<Checkpoint> {
        let files = match &self.model {
            Some(path) => Files::open(path)?,
            None => Files::Embedded(scumble_model::FILES),
        };
        let loras = self.lora.iter().map(|text| lora(text)).collect();
        Checkpoint::open(&Source { files, vae: self.vae.clone(), clip: self.clip.clone(), loras })
    }

    /// Its name, for the picture's parameters.
    pub fn name(&self) -> String {
        let stem =
            self.model.as_ref().and_then(|path| path.file_stem()).map(|stem| stem.to_string_lossy().into_owned());
        stem.unwrap_or_else(|| "embedded".into())
    }

    /// Its LoRAs, as A1111 names them in a picture's parameters.
    pub fn loras(&self) -> Vec<(String, f32)> {
        let named = |text: &String| {
            let (path, strength) = lora(text);
            (path.file_stem().unwrap_or_default().to_string_lossy().into_owned(), strength)
        };
        self.lora.iter().map(named).collect()
    }
}

/// FILE or FILE:STRENGTH; a colon before anything but a number is part of the name.
fn lora(text: &str) -> (PathBuf, f32) {
    let split = text.rsplit_once(':').and_then(|(path, strength)| Some((path, strength.parse::<f32>().ok()?)));
    match split {
        Some((path, strength)) => (path.into(), strength),
        None => (text.into(), 1.0),
    }
}

/// How prompts are read.
#[derive(clap::Args, Clone)]
pub struct TextArgs {
    /// What weights like (word:1.2) mean: comfy, a1111
    #[arg(long, default_value = "comfy", value_name = "STYLE")]
    prompt_style: String,
    /// Which layer of the text encoder is read, counted from the last: 1, 2, .. [default: the model's own]
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    clip_skip: Option<i64>,
    /// Where `embedding:NAME` finds textual inversions [default: the folder `embeddings` beside the model]
    #[arg(long, value_name = "DIR")]
    embeddings: Option<PathBuf>,
}

impl TextArgs {
    /// `--prompt-style`.
    pub fn style(&self) -> Result<Style> {
        self.prompt_style.parse()
    }

    /// `--clip-skip`.
    pub fn skip(&self) -> Result<Option<u32>> {
        self.clip_skip.map(|skip| whole("clip-skip", skip, "a whole number from 1 (the last layer) to 12")).transpose()
    }

    /// `--embeddings`.
    pub fn embeddings(&self, model: &ModelArgs) -> Embeddings {
        let beside = || Some(model.model.as_ref()?.parent()?.join("embeddings"));
        match self.embeddings.clone().or_else(beside) {
            Some(folder) => Embeddings::folder(folder),
            None => Embeddings::none(),
        }
    }
}

/// The picture to start from.
#[derive(clap::Args, Clone)]
pub struct InitArgs {
    /// Start from this picture (PNG, JPEG, WebP, BMP)
    #[arg(long, value_name = "IMAGE")]
    pub init: Option<PathBuf>,
    /// How far back it is noised: 1 wholly, 0.5 half of the way
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true, value_name = "X")]
    pub denoise: f32,
    /// Repaint it only where this picture is white
    #[arg(long, value_name = "IMAGE", requires = "init")]
    pub mask: Option<PathBuf>,
    /// Blur the mask by so many pixels
    #[arg(long, default_value_t = 4.0, allow_hyphen_values = true, value_name = "X")]
    pub mask_feather: f32,
}

/// SDXL's conditioning on sizes.
#[derive(clap::Args, Clone)]
pub struct SizeArgs {
    /// SDXL: the size that a training picture had before it was scaled [default: the picture's]
    #[arg(long, value_name = "WxH")]
    pub original_size: Option<String>,
    /// SDXL: what was cut from it, left and top
    #[arg(long, value_name = "X,Y", default_value = "0,0", hide_default_value = true)]
    pub crop: String,
    /// SDXL: the size that it was brought to [default: the picture's]
    #[arg(long, value_name = "WxH")]
    pub target_size: Option<String>,
}

/// Two whole numbers.
pub fn numbers(what: &str, text: &str, between: char) -> Result<[u32; 2]> {
    let pair = text.split_once(between).and_then(|(a, b)| Some([a.trim().parse().ok()?, b.trim().parse().ok()?]));
    pair.ok_or_else(|| Error::invalid(what, format!("two whole numbers: 1024{between}1024"), text))
}

/// A number that must be whole and not negative.
pub fn whole(what: &str, value: i64, expected: &str) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::invalid(what, expected, value))
}
