//! The text encoder's config.

use std::path::Path;

use serde::Deserialize;

use super::{eps, parse, unsupported};
use crate::error::Result;

/// Widths of a text encoder that are still believed; a table without rows can claim any.
const MAX_WIDTH: usize = 1 << 20;

/// transformers' CLIPTextModel config.json.
#[derive(Clone, Debug, Deserialize)]
pub struct ClipConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Tokens of a prompt, 77.
    #[serde(default = "positions")]
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    #[serde(default = "quick_gelu")]
    pub hidden_act: String,
    /// Epsilon of the layer norms.
    #[serde(default = "eps")]
    pub layer_norm_eps: f32,
    /// The token whose state is the pooled one.
    #[serde(default = "eos")]
    pub eos_token_id: u32,
}

fn positions() -> usize {
    77
}

fn quick_gelu() -> String {
    "quick_gelu".into()
}

fn eos() -> u32 {
    49_407
}

impl ClipConfig {
    /// Parse the JSON of a CLIPTextModel.
    ///
    /// # Errors
    /// As [`UNetConfig::parse`].
    pub fn parse(path: &Path, json: &str) -> Result<ClipConfig> {
        let config: ClipConfig = parse(path, json)?;
        config.check(path)?;
        Ok(config)
    }

    /// Can it be run?
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        let config = self;
        let (width, heads) = (config.hidden_size, config.num_attention_heads);
        let heads_fit = heads > 0 && width.is_multiple_of(heads.saturating_mul(4));
        if !heads_fit || !(1..=MAX_WIDTH).contains(&width) || !config.intermediate_size.is_multiple_of(4) {
            return Err(unsupported(path, "hidden_size", format!("heads ({heads}) of a multiple of 4"), width));
        }
        if !["quick_gelu", "gelu"].contains(&config.hidden_act.as_str()) {
            return Err(unsupported(path, "hidden_act", "quick_gelu or gelu", &config.hidden_act));
        }
        if config.num_hidden_layers == 0 || config.max_position_embeddings != 77 {
            let found = format!("{} layers of {}", config.num_hidden_layers, config.max_position_embeddings);
            return Err(unsupported(path, "max_position_embeddings", "at least one layer of 77", found));
        }
        Ok(())
    }
}
