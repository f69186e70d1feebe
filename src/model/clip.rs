//! CLIPTextModel: token ids to the context that the UNet attends to.
//!
//! P prompts, S = 77 tokens, D width.

use super::config::ClipConfig;
use crate::error::{Error, Result};
use crate::gpu::{Graph, Tensor};
use crate::ops::attention::{Attention, attention};
use crate::ops::layer_norm::layer_norm;
use crate::ops::matmul::matmul;
use crate::ops::{Activation, Epilogue, Linear, Norm};
use crate::weights::{Loader, Weights};

/// The text model. The embedding tables stay in the file: a prompt needs 77 of their rows, which the host gathers.
pub struct Clip {
    /// What it is in numbers.
    pub config: ClipConfig,
    weights: Weights,
    prefix: &'static str,
    layers: Vec<Layer>,
    final_norm: Norm,
}

struct Layer {
    norm1: Norm,
    qkv: Linear,
    out: Linear,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
}

/// What the tensors are called: newer transformers leave the prefix out.
pub fn prefix(weights: &Weights) -> &'static str {
    if weights.has("embeddings.token_embedding.weight") { "" } else { "text_model." }
}

impl Clip {
    /// Load by transformers' names.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn load(gpu: &crate::gpu::Gpu, weights: Weights, config: ClipConfig) -> Result<Clip> {
        // f32 activations: 1 % of a picture's work decides what is in it.
        let mut l = Loader::new(gpu, &weights, crate::gpu::DType::F32);
        let prefix = prefix(&weights);
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let name = format!("{prefix}encoder.layers.{i}");
            let qkv = ["q", "k", "v"].map(|w| format!("{name}.self_attn.{w}_proj"));
            layers.push(Layer {
                norm1: l.norm(&format!("{name}.layer_norm1"), d, eps).await?,
                qkv: l.fused(&qkv, d, &[d; 3], true).await?,
                out: l.linear(&format!("{name}.self_attn.out_proj"), d, d, true).await?,
                norm2: l.norm(&format!("{name}.layer_norm2"), d, eps).await?,
                fc1: l.linear(&format!("{name}.mlp.fc1"), d, config.intermediate_size, true).await?,
                fc2: l.linear(&format!("{name}.mlp.fc2"), config.intermediate_size, d, true).await?,
            });
        }
        let final_norm = l.norm(&format!("{prefix}final_layer_norm"), d, eps).await?;
        // Checked now, used at every prompt.
        let tables = [("token", config.vocab_size), ("position", config.max_position_embeddings)];
        for (kind, rows) in tables {
            weights.row(&format!("{prefix}embeddings.{kind}_embedding.weight"), &[rows, d], 0)?;
        }
        Ok(Clip { config, weights, prefix, layers, final_norm })
    }

    /// Token plus position embeddings of `ids` (P · 77 of them), [P, 1, 77, D] row by row.
    ///
    /// # Errors
    /// [`Error::Invalid`] if an id is not in the vocabulary: tokenizer and text model do not belong together.
    pub fn embed(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let ClipConfig { vocab_size, hidden_size: d, max_position_embeddings: length, .. } = self.config;
        let mut out = Vec::with_capacity(ids.len() * d);
        for (at, &id) in ids.iter().enumerate() {
            if id as usize >= vocab_size {
                return Err(Error::invalid("token id", format!("one of the text model's {vocab_size}"), id));
            }
            let token = format!("{}embeddings.token_embedding.weight", self.prefix);
            let position = format!("{}embeddings.position_embedding.weight", self.prefix);
            let token = self.weights.row(&token, &[vocab_size, d], id as usize)?;
            let position = self.weights.row(&position, &[length, d], at % length)?;
            out.extend(token.iter().zip(&position).map(|(t, p)| t + p));
        }
        Ok(out)
    }

    /// Embeddings [P, 1, 77, D] → hidden states after the last norm, [P, 1, 77, D].
    pub fn forward(&self, g: &mut Graph, embeddings: Tensor) -> Tensor {
        let act = if self.config.hidden_act == "gelu" { Activation::Gelu } else { Activation::QuickGelu };
        let heads = self.config.num_attention_heads as u32;
        let mut x = embeddings;
        for layer in &self.layers {
            let h = layer_norm(g, x, &layer.norm1);
            let qkv = matmul(g, h, &layer.qkv, Epilogue::default());
            let h = attention(g, &Attention { causal: true, ..Attention::fused(qkv, heads) });
            x = matmul(g, h, &layer.out, Epilogue::add(x));

            let h = layer_norm(g, x, &layer.norm2);
            let h = matmul(g, h, &layer.fc1, Epilogue::act(act));
            x = matmul(g, h, &layer.fc2, Epilogue::add(x));
        }
        layer_norm(g, x, &self.final_norm)
    }

    /// The token whose state is the pooled one: the first end of text. Configs of the first CLIP say 2 and mean the highest id.
    pub fn pooled_position(&self, ids: &[u32]) -> usize {
        let end = match self.config.eos_token_id {
            2 => ids.iter().copied().max().unwrap_or(0),
            id => id,
        };
        ids.iter().position(|&id| id == end).unwrap_or(ids.len() - 1)
    }
}
