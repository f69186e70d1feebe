//! The autoencoder's config.

use std::path::Path;

use serde::Deserialize;

use super::{groups, parse, refuse, unsupported, yes};
use crate::error::Result;

/// Levels of an autoencoder that are still believed: real ones have four.
const MAX_LEVELS: usize = 16;

/// diffusers' AutoencoderKL config.json.
#[derive(Clone, Debug, Deserialize)]
pub struct VaeConfig {
    /// Channels of the picture.
    #[serde(default = "three")]
    pub in_channels: usize,
    /// Channels of the decoded picture.
    #[serde(default = "three")]
    pub out_channels: usize,
    /// Channels of the latents.
    #[serde(default = "four")]
    pub latent_channels: usize,
    /// Channels by level, outermost (full size) first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks a level in the encoder (one more in the decoder).
    #[serde(default = "one")]
    pub layers_per_block: usize,
    /// Groups of every group norm.
    #[serde(default = "groups")]
    pub norm_num_groups: usize,
    /// Latents are multiplied by this for the UNet.
    #[serde(default = "scaling")]
    pub scaling_factor: f32,
    /// A 1x1 convolution after the encoder?
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    /// A 1x1 convolution before the decoder?
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    #[serde(flatten)]
    pub(crate) rest: serde_json::Map<String, serde_json::Value>,
}

fn one() -> usize {
    1
}

fn three() -> usize {
    3
}

fn four() -> usize {
    4
}

fn scaling() -> f32 {
    0.18215
}

impl VaeConfig {
    /// Parse the JSON of an AutoencoderKL.
    ///
    /// # Errors
    /// As [`UNetConfig::parse`].
    pub fn parse(path: &Path, json: &str) -> Result<VaeConfig> {
        use serde_json::json;
        let config: VaeConfig = parse(path, json)?;
        let null = serde_json::Value::Null;
        let neutral = [
            ("act_fn", json!("silu")),
            ("mid_block_add_attention", json!(true)),
            ("latents_mean", null.clone()),
            ("latents_std", null.clone()),
            ("shift_factor", null),
        ];
        refuse(path, &config.rest, &neutral)?;
        for kind in ["down_block_types", "up_block_types"] {
            let Some(serde_json::Value::Array(list)) = config.rest.get(kind) else { continue };
            let fine = if kind.starts_with("down") { "DownEncoderBlock2D" } else { "UpDecoderBlock2D" };
            if let Some(other) = list.iter().find(|found| **found != json!(fine)) {
                return Err(unsupported(path, kind, fine, other));
            }
        }
        config.check(path)?;
        Ok(config)
    }

    /// An autoencoder of these levels, with everything else as Stable Diffusion has it.
    pub(crate) fn of_levels(block_out_channels: Vec<usize>, layers_per_block: usize, latent_channels: usize) -> Self {
        VaeConfig {
            in_channels: 3,
            out_channels: 3,
            latent_channels,
            block_out_channels,
            layers_per_block,
            norm_num_groups: 32,
            scaling_factor: scaling(),
            use_quant_conv: true,
            use_post_quant_conv: true,
            rest: serde_json::Map::new(),
        }
    }

    /// Can it be run?
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let config = self;
        let groups = config.norm_num_groups;
        for &channels in &config.block_out_channels {
            if channels == 0 || groups == 0 || !channels.is_multiple_of(4) || !channels.is_multiple_of(groups) {
                return Err(unsupported(
                    path,
                    "block_out_channels",
                    format!("multiples of 4 and of {groups}"),
                    channels,
                ));
            }
        }
        if config.block_out_channels.len() > MAX_LEVELS {
            let found = config.block_out_channels.len();
            return Err(unsupported(path, "block_out_channels", format!("at most {MAX_LEVELS} levels"), found));
        }
        if config.block_out_channels.is_empty() || config.latent_channels != 4 {
            return Err(unsupported(path, "latent_channels", "4, and at least one level", config.latent_channels));
        }
        if !(config.scaling_factor.is_finite() && config.scaling_factor > 0.0) {
            return Err(unsupported(path, "scaling_factor", "a positive number", config.scaling_factor));
        }
        Ok(())
    }

    /// Pixels of a latent's side.
    pub fn factor(&self) -> u32 {
        1 << (self.block_out_channels.len() - 1)
    }
}
