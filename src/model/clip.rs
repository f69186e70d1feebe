//! CLIPTextModel: token ids to the context that the UNet attends to.
//!
//! P prompts, S = 77 tokens, D width.

use std::sync::Arc;

use super::config::ClipConfig;
use crate::error::{Error, Result};
use crate::gpu::{Graph, Tensor};
use crate::loader::Loader;
use crate::ops::attention::{Attention, attention};
use crate::ops::layer_norm::layer_norm;
use crate::ops::matmul::matmul;
use crate::ops::{Activation, Epilogue, Linear, Norm};
use crate::weights::Weights;

/// The text model. The embedding tables stay in the file: a prompt needs 77 of their rows, which the host gathers.
pub struct Clip {
    /// What it is in numbers.
    pub config: ClipConfig,
    weights: Arc<Weights>,
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

/// Which states of the text model are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Of which layer, counted from the last: 1 is the last.
    pub skip: usize,
    /// With the final norm applied?
    pub normed: bool,
    /// The last layer's too, with the final norm: what is pooled.
    pub last: bool,
}

impl Read {
    /// The last layer's, normed.
    pub const LAST: Read = Read { skip: 1, normed: true, last: false };
}

/// A token of a prompt: a row of the table, or a vector in its place.
#[derive(Clone, Copy, Debug)]
pub enum Row<'a> {
    /// By its id.
    Id(u32),
    /// [D]
    Vector(&'a [f32]),
}

impl Clip {
    /// Load by transformers' names without their prefix `text_model.`: the loader's weights and `weights` are the same.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn load(l: &mut Loader<'_>, weights: &Arc<Weights>, config: ClipConfig) -> Result<Clip> {
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let name = format!("encoder.layers.{i}");
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
        let final_norm = l.norm("final_layer_norm", d, eps).await?;
        // Checked now, used at every prompt.
        for (kind, rows) in [("token", config.vocab_size), ("position", config.max_position_embeddings)] {
            weights.entry(&format!("embeddings.{kind}_embedding.weight"), &[rows, d])?;
        }
        l.finish().await?;
        Ok(Clip { config, weights: weights.clone(), layers, final_norm })
    }

    /// Token plus position embeddings of `rows` (P · 77 of them), [P, 1, 77, D] row by row.
    ///
    /// # Errors
    /// [`Error::Invalid`] if an id is not in the vocabulary: tokenizer and text model do not belong together.
    pub fn embed<'r>(&self, rows: impl IntoIterator<Item = Row<'r>>) -> Result<Vec<f32>> {
        let ClipConfig { vocab_size, hidden_size: d, max_position_embeddings: length, .. } = self.config;
        let table = |kind: &str, rows: usize, row: usize| {
            self.weights.row(&format!("embeddings.{kind}_embedding.weight"), &[rows, d], row)
        };
        let mut out = Vec::new();
        for (at, row) in rows.into_iter().enumerate() {
            let token = match row {
                Row::Id(id) if id as usize >= vocab_size => {
                    return Err(Error::invalid("token id", format!("one of the text model's {vocab_size}"), id));
                }
                Row::Id(id) => table("token", vocab_size, id as usize)?,
                Row::Vector(vector) => vector.to_vec(),
            };
            let position = table("position", length, at % length)?;
            out.extend(token.iter().zip(&position).map(|(t, p)| t + p));
        }
        Ok(out)
    }

    /// Embeddings [P, 1, 77, D] → the states that `read` asks for, [P, 1, 77, D], and the last layer's if asked for.
    pub fn forward(&self, g: &mut Graph, embeddings: Tensor, read: Read) -> (Tensor, Option<Tensor>) {
        let act = if self.config.hidden_act == "gelu" { Activation::Gelu } else { Activation::QuickGelu };
        let heads = self.config.num_attention_heads as u32;
        // Layers beyond the one that is read are run only for what is pooled.
        let wanted = self.layers.len() + 1 - read.skip.clamp(1, self.layers.len());
        let run = if read.last { self.layers.len() } else { wanted };
        let mut x = embeddings;
        let mut hidden = x;
        for (i, layer) in self.layers.iter().take(run).enumerate() {
            let h = layer_norm(g, x, &layer.norm1);
            let qkv = matmul(g, h, &layer.qkv, Epilogue::default());
            let h = attention(g, &Attention { causal: true, ..Attention::fused(qkv, heads) });
            x = matmul(g, h, &layer.out, Epilogue::add(x));

            let h = layer_norm(g, x, &layer.norm2);
            let h = matmul(g, h, &layer.fc1, Epilogue::act(act));
            x = matmul(g, h, &layer.fc2, Epilogue::add(x));
            if i + 1 == wanted {
                hidden = x;
            }
        }
        let last = read.last.then(|| layer_norm(g, x, &self.final_norm));
        let hidden = match (read.normed, last) {
            (true, Some(last)) if wanted == run => last,
            (true, _) => layer_norm(g, hidden, &self.final_norm),
            (false, _) => hidden,
        };
        (hidden, last)
    }

    /// The token whose state is the pooled one: the first end of text. Configs of the first CLIP say 2 and mean the highest id.
    pub fn pooled_position(&self, ids: &[u32]) -> usize {
        let end = match self.config.eos_token_id {
            2 => ids.iter().copied().max().unwrap_or(0),
            id => id,
        };
        ids.iter().position(|&id| id == end).unwrap_or(ids.len() - 1)
    }

    /// A pooled state [D] times the projection [D', D] of models that have one.
    ///
    /// # Errors
    /// Of the file.
    pub fn project(&self, pooled: &[f32]) -> Result<Vec<f32>> {
        let name = "text_projection.weight";
        let Some(&[rows, width]) = self.weights.shape(name) else { return Ok(pooled.to_vec()) };
        if width != pooled.len() {
            return Err(Error::MisshapenTensor {
                path: self.weights.path().to_owned(),
                name: name.into(),
                expected: vec![rows, pooled.len()],
                found: vec![rows, width],
            });
        }
        let matrix = self.weights.finite(name, &[rows, width])?;
        let dot = |row: &[f32]| row.iter().zip(pooled).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
        Ok(matrix.chunks_exact(width).map(dot).collect())
    }
}
