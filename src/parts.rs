//! The networks of a model on a device: planned (sizes alone), resident, or loaded for as long as they are needed.

use std::ops::Deref;

use crate::checkpoint::{Checkpoint, TextPart};
use crate::error::{Error, Result};
use crate::gpu::{DType, Gpu};
use crate::loader::Loader;
use crate::model::clip::Clip;
use crate::model::unet::UNet;
use crate::model::vae::{Decoder, Encoder};
use crate::request::Precision;

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

/// Load, or only plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Sizes and shapes.
    Plan,
    /// Onto the device.
    Load,
}

impl Mode {
    fn loader<'a>(self, gpu: &'a Gpu, weights: &'a crate::weights::Weights, act: DType) -> Loader<'a> {
        match self {
            Mode::Plan => Loader::plan(gpu, weights, act),
            Mode::Load => Loader::new(gpu, weights, act),
        }
    }
}

/// Bytes of a part on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PartBytes {
    /// Its parameters.
    pub weights: u64,
    /// Beside them, while they are loaded.
    pub loading: u64,
}

impl PartBytes {
    fn of(l: &Loader<'_>) -> PartBytes {
        PartBytes { weights: l.bytes(), loading: l.transient_bytes() }
    }
}

/// A text encoder. f32 activations: 1 % of a picture's work decides what is in it.
pub(crate) async fn load_clip(gpu: &Gpu, text: &TextPart, mode: Mode) -> Result<(Clip, PartBytes)> {
    let part = &text.part;
    let mut l = mode.loader(gpu, &part.weights, DType::F32).with(&part.patches);
    let clip = Clip::load(&mut l, &part.weights, part.config.clone()).await?;
    Ok((clip, PartBytes::of(&l)))
}

/// The UNet with activations of `dtype`.
pub(crate) async fn load_unet(gpu: &Gpu, c: &Checkpoint, dtype: DType, mode: Mode) -> Result<(UNet, PartBytes)> {
    let mut l = mode.loader(gpu, &c.unet.weights, dtype).with(&c.unet.patches);
    let unet = UNet::load(&mut l, c.unet.config.clone()).await?;
    Ok((unet, PartBytes::of(&l)))
}

/// The decoder. f32 activations: SDXL's overflows f16, and a black picture is a bug. Beside a UNet in f16, matrix units multiply
/// them in f16, normalised or scaled down, and sum in f32.
pub(crate) async fn load_decoder(gpu: &Gpu, c: &Checkpoint, dtype: DType, mode: Mode) -> Result<(Decoder, PartBytes)> {
    let part = c.vae()?;
    let operands = if gpu.caps().coop().is_some() { dtype } else { DType::F32 };
    let mut l = mode.loader(gpu, &part.weights, operands);
    let decoder = Decoder::load(&mut l, &part.config).await?;
    Ok((decoder, PartBytes::of(&l)))
}

/// The encoder; files of pruned models may lack it.
pub(crate) async fn load_encoder(gpu: &Gpu, c: &Checkpoint, mode: Mode) -> Result<(Encoder, PartBytes)> {
    let part = c.vae()?;
    let mut l = mode.loader(gpu, &part.weights, DType::F32);
    let encoder = Encoder::load(&mut l, &part.config).await?;
    Ok((encoder, PartBytes::of(&l)))
}

/// What every picture needs.
pub(crate) struct Networks {
    pub clips: Vec<Clip>,
    pub unet: UNet,
    pub decoder: Decoder,
}

/// Bytes of the parts of a model on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ModelBytes {
    /// All text encoders.
    pub text: PartBytes,
    /// The UNet.
    pub unet: PartBytes,
    /// The VAE's decoder.
    pub decoder: PartBytes,
}

impl ModelBytes {
    /// All parameters.
    pub fn weights(&self) -> u64 {
        self.text.weights + self.unet.weights + self.decoder.weights
    }
}

impl Networks {
    /// All parts, one after the other.
    pub async fn make(gpu: &Gpu, c: &Checkpoint, dtype: DType, mode: Mode) -> Result<(Networks, ModelBytes)> {
        let mut bytes = ModelBytes::default();
        let mut clips = Vec::new();
        for text in c.texts()? {
            let (clip, of) = load_clip(gpu, text, mode).await?;
            bytes.text.weights += of.weights;
            bytes.text.loading = bytes.text.loading.max(of.loading);
            clips.push(clip);
        }
        let (unet, of) = load_unet(gpu, c, dtype, mode).await?;
        bytes.unet = of;
        let (decoder, of) = load_decoder(gpu, c, dtype, mode).await?;
        bytes.decoder = of;
        Ok((Networks { clips, unet, decoder }, bytes))
    }
}

/// A network that stays, or one that is dropped when it has served.
pub(crate) enum Lent<'a, T> {
    Resident(&'a T),
    Loaded(Box<T>),
}

impl<T> Deref for Lent<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Lent::Resident(network) => network,
            Lent::Loaded(network) => network,
        }
    }
}
