//! Prompts to what the UNet is conditioned on: chunks through the text encoders, weights applied, encoders joined.

use crate::denoiser::Step;
use crate::error::{Error, Result};
use crate::gpu::profile::Profile;
use crate::gpu::{DType, Gpu, Graph};
use crate::model::clip::{Clip, Read, Row};
use crate::pipeline::submit_once;
use crate::text::{Chunk, Embeddings, Style, Token, Tokenizer, chunks};

/// What prompts became.
#[derive(Clone, Debug, PartialEq)]
pub struct Conditioning {
    /// Prompts.
    pub prompts: usize,
    /// Tokens of each, a multiple of 77.
    pub tokens: usize,
    /// Width of the context, all encoders together.
    pub width: usize,
    /// [prompts, tokens, width]
    pub hidden: Vec<f32>,
    /// The pooled text of each prompt, [prompts, pooled]: the last encoder's, projected where it has a projection.
    pub pooled: Vec<f32>,
}

/// A text encoder, and how the model reads it.
pub struct Encoder<'a> {
    /// The network.
    pub clip: &'a Clip,
    /// Text to ids.
    pub tokenizer: &'a Tokenizer,
    /// Which states are read.
    pub read: Read,
}

/// Chunks of the prompts for one encoder.
///
/// # Errors
/// Of the prompts: a bad weight, an unknown embedding, too many chunks.
pub fn chunked(
    tokenizer: &Tokenizer,
    embeddings: &Embeddings,
    prompts: &[&str],
    style: Style,
) -> Result<Vec<Vec<Chunk>>> {
    prompts.iter().map(|prompt| chunks(tokenizer, embeddings, prompt, style)).collect()
}

/// Run the prompts through all encoders.
///
/// # Errors
/// Of the prompt (a bad weight, an unknown embedding), of the files, of the device.
pub async fn encode(
    gpu: &Gpu,
    encoders: &[Encoder<'_>],
    embeddings: &Embeddings,
    prompts: &[&str],
    style: Style,
    mut profile: Option<&mut Profile>,
) -> Result<Conditioning> {
    let mut joined: Vec<Vec<Vec<f32>>> = vec![Vec::new(); prompts.len()];
    let mut pooled = Vec::new();
    for encoder in encoders {
        let chunks = chunked(encoder.tokenizer, embeddings, prompts, style)?;
        let run = encode_one(gpu, encoder, &chunks, style, profile.as_deref_mut()).await?;
        // The last encoder's is the pooled text.
        pooled = run.pooled;
        for (all, hidden) in joined.iter_mut().zip(run.hidden) {
            all.push(hidden);
        }
    }
    let widths: Vec<usize> = encoders.iter().map(|e| e.clip.config.hidden_size).collect();
    let width = widths.iter().sum();
    let contexts: Vec<Vec<f32>> = joined.iter().map(|parts| side_by_side(parts, &widths)).collect::<Result<_>>()?;
    let tokens = common_length(contexts.iter().map(|context| context.len() / width));
    let hidden = contexts.iter().flat_map(|context| context.repeat(tokens * width / context.len())).collect();
    Ok(Conditioning { prompts: prompts.len(), tokens, width, hidden, pooled })
}

/// The length to which repeating brings all of these.
pub(crate) fn common_length(lengths: impl Iterator<Item = usize>) -> usize {
    lengths.fold(1, |all, n| all / gcd(all, n) * n)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// [tokens, width] of each encoder to [tokens, Σ width]; an encoder with fewer chunks (an embedding may have fewer vectors for
/// it) is cut to the shortest, as ComfyUI does.
fn side_by_side(parts: &[Vec<f32>], widths: &[usize]) -> Result<Vec<f32>> {
    let tokens = parts.iter().zip(widths).map(|(part, width)| part.len() / width).min().unwrap_or(0);
    let mut out = Vec::with_capacity(tokens * widths.iter().sum::<usize>());
    for token in 0..tokens {
        for (part, &width) in parts.iter().zip(widths) {
            out.extend_from_slice(&part[token * width..][..width]);
        }
    }
    Ok(out)
}

/// What one encoder makes of the prompts.
struct Encoded {
    /// Of each prompt [chunks · 77, D].
    hidden: Vec<Vec<f32>>,
    /// Of all prompts, each from its first chunk.
    pooled: Vec<f32>,
}

async fn encode_one(
    gpu: &Gpu,
    encoder: &Encoder<'_>,
    prompts: &[Vec<Chunk>],
    style: Style,
    profile: Option<&mut Profile>,
) -> Result<Encoded> {
    let Encoder { clip, tokenizer, read } = encoder;
    let layers = clip.config.num_hidden_layers;
    if read.skip > layers {
        let expected = format!("at most {layers}, as many as the text encoder has layers");
        return Err(Error::invalid("clip-skip", expected, read.skip));
    }
    let (d, length) = (clip.config.hidden_size, clip.config.max_position_embeddings);
    let weighted = prompts.iter().flatten().flat_map(|chunk| &chunk.tokens).any(|(_, weight)| *weight != 1.0);
    // ComfyUI weighs against the empty prompt.
    let empty = match weighted && style == Style::Comfy {
        true => chunks(tokenizer, &Embeddings::none(), "", style)?,
        false => vec![],
    };
    let all: Vec<&Chunk> = prompts.iter().flatten().chain(&empty).collect();
    let mut rows = Vec::with_capacity(all.len() * length);
    for (token, _) in all.iter().flat_map(|chunk| &chunk.tokens) {
        rows.push(match token {
            Token::Id(id) => Row::Id(*id),
            Token::Embedding { embedding, row } => match embedding.for_encoder(d)?.nth(*row) {
                Some(vector) => Row::Vector(vector),
                None => {
                    return Err(Error::invalid(embedding.name(), format!("more than {row} vectors"), embedding.rows()));
                }
            },
        });
    }
    let (hidden, last) = run(gpu, clip, *read, clip.embed(rows)?, all.len(), profile).await?;

    let chunk_size = length * d;
    let empty_states = (!empty.is_empty()).then(|| hidden[hidden.len() - chunk_size..].to_vec());
    let mut encoded = Encoded { hidden: Vec::new(), pooled: Vec::new() };
    let mut at = 0;
    for prompt in prompts {
        let mut states = hidden[at * chunk_size..(at + prompt.len()) * chunk_size].to_vec();
        let position = end_of(&prompt[0], tokenizer.end());
        let pooled_from = last.as_ref().unwrap_or(&hidden);
        let pooled = &pooled_from[at * chunk_size + position * d..][..d];
        encoded.pooled.extend(if last.is_some() { clip.project(pooled)? } else { pooled.to_vec() });
        for (chunk, states) in prompt.iter().zip(states.chunks_exact_mut(chunk_size)) {
            weigh(chunk, states, d, empty_states.as_deref());
        }
        encoded.hidden.push(states);
        at += prompt.len();
    }
    Ok(encoded)
}

/// Embeddings of `count` chunks to (the states that are read, the last normed ones), [count, 77, D].
async fn run(
    gpu: &Gpu,
    clip: &Clip,
    read: Read,
    embedded: Vec<f32>,
    count: usize,
    profile: Option<&mut Profile>,
) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
    let dims = [count as u32, 1, clip.config.max_position_embeddings as u32, clip.config.hidden_size as u32];
    let embeddings = gpu.upload("embeddings", &embedded).await?;
    let mut g = Graph::new(gpu, DType::F32);
    let x = g.bind("embeddings", &embeddings, dims, DType::F32);
    let (hidden, last) = clip.forward(&mut g, x, read);
    let out = gpu.storage("hidden states", hidden.bytes()).await?;
    g.keep(hidden, &out);
    let last = match last.filter(|last| *last != hidden) {
        None => None,
        Some(last) => {
            let buffer = gpu.storage("last states", last.bytes()).await?;
            g.keep(last, &buffer);
            Some(buffer)
        }
    };
    submit_once(gpu, g, &Step::default(), profile).await?;
    let len = embedded.len();
    let hidden: Vec<f32> = out.read(len).await?;
    let last = match (last, read.last) {
        (Some(buffer), _) => Some(buffer.read(len).await?),
        (None, true) => Some(hidden.clone()),
        (None, false) => None,
    };
    Ok((hidden, last))
}

/// Where a chunk's text ends.
fn end_of(chunk: &Chunk, end: u32) -> usize {
    chunk.tokens.iter().position(|(token, _)| *token == Token::Id(end)).unwrap_or(chunk.tokens.len() - 1)
}

/// Apply the weights of a chunk to its states [77, D]: away from the empty prompt's (ComfyUI), or by scaling, then restoring
/// the chunk's mean (A1111).
fn weigh(chunk: &Chunk, states: &mut [f32], d: usize, empty: Option<&[f32]>) {
    if chunk.tokens.iter().all(|(_, weight)| *weight == 1.0) {
        return;
    }
    let mean = |states: &[f32]| states.iter().map(|&v| f64::from(v)).sum::<f64>() / states.len() as f64;
    let before = mean(states);
    for (at, ((_, weight), token)) in chunk.tokens.iter().zip(states.chunks_exact_mut(d)).enumerate() {
        for (i, value) in token.iter_mut().enumerate() {
            *value = match empty {
                Some(empty) if *weight != 1.0 => (*value - empty[at * d + i]) * weight + empty[at * d + i],
                Some(_) => *value,
                None => *value * weight,
            };
        }
    }
    let after = mean(states);
    if empty.is_none() && after != 0.0 {
        let scale = (before / after) as f32;
        states.iter_mut().for_each(|value| *value *= scale);
    }
}
