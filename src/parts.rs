//! The parts of a model folder: where each is, and how it becomes a network on the device.

use crate::error::{Error, Result};
use crate::gpu::{DType, Gpu};
use crate::model::clip::Clip;
use crate::model::config::{ClipConfig, NoiseConfig, UNetConfig, VaeConfig};
use crate::model::unet::UNet;
use crate::request::Precision;
use crate::schedule::{BetaSchedule, Prediction, Schedule};
use crate::text::Tokenizer;
use crate::weights::{Files, Loader, Weights};

/// Names that diffusers gives a part's weights.
fn part(folder: &str) -> [String; 2] {
    let stem = if folder == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
    [format!("{folder}/{stem}.safetensors"), format!("{folder}/{stem}.fp16.safetensors")]
}

pub(crate) fn open_part(files: &Files, folder: &str) -> Result<Weights> {
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
