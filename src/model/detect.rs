//! What a single file's weights say about its networks: the counterpart of the configs in a diffusers folder.

use std::path::Path;

use super::config::{AddedConfig, ClipConfig, Level, NoiseConfig, SIZES, UNetConfig, VaeConfig, unsupported};
use crate::error::{Error, Result};
use crate::weights::Weights;

/// The number of `prefix`0, `prefix`1, … for which `there` says yes.
fn count(there: impl Fn(usize) -> bool) -> usize {
    (0..).find(|&i| !there(i)).unwrap_or(0)
}

/// The first dimension of a tensor's shape, and the second.
fn pair(weights: &Weights, name: &str) -> Option<(usize, usize)> {
    match weights.shape(name) {
        Some([n, c, ..]) => Some((*n, *c)),
        _ => None,
    }
}

/// What kind of file this is, if not a Stable Diffusion model: (a key's part, what it is).
const OTHERS: &[(&str, &str)] = &[
    ("double_blocks.0.", "a Flux model"),
    ("joint_blocks.0.", "a Stable Diffusion 3 model"),
    ("down_blocks.0.0.0.", "a Stable Cascade model"),
    ("control_model.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    ("lora_unet_", "a LoRA (name it with --lora)"),
    ("lora_te", "a LoRA (name it with --lora)"),
    (".lora_A.", "a LoRA (name it with --lora)"),
    (".lora_down.", "a LoRA (name it with --lora)"),
    ("_lora.down.", "a LoRA (name it with --lora)"),
    ("emb_params", "a textual inversion (put it into the --embeddings folder)"),
    ("down_blocks.0.resnets.0.norm1.weight", "one part of a diffusers folder (give the folder)"),
    ("model_ema.", "a model's moving average alone (EMA), without its weights"),
    ("token_embedding.weight", "a text encoder (name it with --clip)"),
    ("decoder.conv_in.weight", "a VAE (name it with --vae)"),
];

/// The prefix of a single file's UNet.
///
/// # Errors
/// [`Error::Unsupported`] with the key that decided, if there is none.
pub(crate) fn unet_prefix(weights: &Weights) -> Result<String> {
    let first = "input_blocks.0.0.weight";
    let mut prefixes: Vec<&str> = weights.names().filter_map(|name| name.strip_suffix(first)).collect();
    // The moving average of a training's file has no dots in its names, so it is never among these.
    prefixes.sort_by_key(|prefix| (*prefix != "model.diffusion_model.", prefix.len()));
    if let Some(prefix) = prefixes.first() {
        return Ok((*prefix).to_owned());
    }
    let mut names: Vec<&str> = weights.names().collect();
    names.sort_unstable();
    let expected = format!("a Stable Diffusion model (a key that ends in {first})");
    for (part, kind) in OTHERS {
        if let Some(key) = names.iter().find(|name| name.contains(part)) {
            return Err(unsupported(weights.path(), "this file", expected, format!("{kind}, by its key {key}")));
        }
    }
    let found = match names.first() {
        Some(name) => format!("{} other keys, the first {name}", names.len()),
        None => "no tensor at all".into(),
    };
    Err(unsupported(weights.path(), "this file", expected, found))
}

/// A transformer's blocks at `name`, if there is one.
fn depth(w: &Weights, name: &str) -> Option<usize> {
    let blocks = count(|k| w.has(&format!("{name}.transformer_blocks.{k}.norm1.weight")));
    (blocks > 0).then_some(blocks)
}

impl UNetConfig {
    /// The config of a UNet in the original layout, its prefix removed; `pooled` is the width of the pooled text, where known.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the key that decided; [`Error::MissingTensor`].
    pub(crate) fn of_weights(w: &Weights, pooled: Option<usize>) -> Result<UNetConfig> {
        let path = w.path();
        let missing = |name: &str, expected: &[usize]| Error::MissingTensor {
            path: path.to_owned(),
            name: name.into(),
            expected: expected.to_vec(),
        };
        let (mut channels, in_channels) =
            pair(w, "input_blocks.0.0.weight").ok_or_else(|| missing("input_blocks.0.0.weight", &[320, 4, 3, 3]))?;
        if channels == 384 {
            return Err(unsupported(
                path,
                "the SDXL refiner",
                "a base model, which makes whole pictures by itself",
                "384 channels in input_blocks.0.0.weight",
            ));
        }
        if in_channels != 4 && in_channels != 9 {
            let found = format!("{in_channels} in input_blocks.0.0.weight");
            return Err(unsupported(path, "its input", "4 channels, or 9 of an inpainting model", found));
        }
        let mut levels: Vec<Level> = Vec::new();
        let mut level = Level { channels, layers: 0, down_depth: None, up_depth: None, heads: 0 };
        for i in 1.. {
            let block = format!("input_blocks.{i}");
            if let Some((out, _)) = pair(w, &format!("{block}.0.out_layers.3.weight")) {
                channels = out;
                level.channels = out;
                level.layers += 1;
                level.down_depth = depth(w, &format!("{block}.1"));
            } else {
                levels.push(level.clone());
                if !w.has(&format!("{block}.0.op.weight")) {
                    break;
                }
                level = Level { layers: 0, down_depth: None, ..level };
            }
        }
        if w.has("input_blocks.1.1.qkv.weight") || w.has("middle_block.1.qkv.weight") {
            return Err(unsupported(
                path,
                "this UNet",
                "transformers",
                "attention without text, middle_block.1.qkv.weight",
            ));
        }
        let mut block = 0;
        for level in levels.iter_mut().rev() {
            level.up_depth = depth(w, &format!("output_blocks.{block}.1"));
            block += level.layers + 1;
        }
        let mid = "middle_block.1";
        let mid_depth =
            depth(w, mid).ok_or_else(|| missing("middle_block.1.transformer_blocks.0.norm1.weight", &[channels]))?;
        let to_k = format!("{mid}.transformer_blocks.0.attn2.to_k.weight");
        let (_, cross_dim) = pair(w, &to_k).ok_or_else(|| missing(&to_k, &[channels, 768]))?;
        // Models with matrices around their transformers (SD 2.x, SDXL) have heads of 64 channels, those with 1x1
        // convolutions (SD 1.x) eight heads everywhere: https://github.com/Stability-AI/stablediffusion, configs.
        let linear = w.shape(&format!("{mid}.proj_in.weight")).is_some_and(|shape| shape.len() == 2);
        for level in &mut levels {
            level.heads = if linear { (level.channels / 64).max(1) } else { 8 };
        }
        let added = match pair(w, "label_emb.0.0.weight") {
            None => None,
            Some((_, input)) => Some(added(path, input, pooled, levels.len())?),
        };
        let out_channels = pair(w, "out.2.weight").map_or(4, |(n, _)| n);
        let config = UNetConfig {
            in_channels,
            out_channels,
            levels,
            mid_depth,
            cross_dim,
            groups: 32,
            eps: 1e-5,
            cos_first: true,
            freq_shift: 0.0,
            sample_size: if added.is_some() { 128 } else { 64 },
            added,
        };
        config.check(path)?;
        Ok(config)
    }
}

/// SDXL's added embedding, from how many numbers it takes.
fn added(path: &Path, input: usize, pooled: Option<usize>, levels: usize) -> Result<AddedConfig> {
    let time_dim = match pooled {
        Some(pooled) if input > pooled && (input - pooled).is_multiple_of(SIZES) => (input - pooled) / SIZES,
        // Without its text encoder: SDXL's 2816 are 1280 and six times 256; toy models have 2 : 6.
        _ if input > SIZES * 256 => 256,
        _ => input / 8,
    };
    if levels != 3 || input <= SIZES * time_dim {
        let found = format!("one that takes {input} numbers, label_emb.0.0.weight");
        return Err(unsupported(path, "its class embedding", "none, or SDXL's of a pooled text and six sizes", found));
    }
    Ok(AddedConfig { input, time_dim })
}

impl VaeConfig {
    /// The config of an autoencoder by its canonical names.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::MissingTensor`].
    pub(crate) fn of_weights(w: &Weights, scaling_factor: f32) -> Result<VaeConfig> {
        let resnet = |i: usize, j: usize| format!("decoder.up_blocks.{i}.resnets.{j}.conv1.weight");
        let levels = count(|i| w.has(&resnet(i, 0)));
        let layers = count(|j| w.has(&resnet(0, j)));
        let z = pair(w, "decoder.conv_in.weight").map(|(_, z)| z);
        let (Some(z), true, true) = (z, levels > 0, layers > 1) else {
            return Err(Error::MissingTensor {
                path: w.path().to_owned(),
                name: resnet(0, 1),
                expected: vec![512, 512, 3, 3],
            });
        };
        let channels = (0..levels).rev().filter_map(|i| pair(w, &resnet(i, 0)).map(|(n, _)| n)).collect();
        let config = VaeConfig {
            use_quant_conv: w.has("quant_conv.weight"),
            use_post_quant_conv: w.has("post_quant_conv.weight"),
            scaling_factor,
            ..VaeConfig::of_levels(channels, layers - 1, z)
        };
        config.check(w.path())?;
        Ok(config)
    }
}

impl ClipConfig {
    /// The config of a text encoder by its canonical names; `open_clip` if the file had OpenCLIP's.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::MissingTensor`].
    pub(crate) fn of_weights(w: &Weights, open_clip: bool) -> Result<ClipConfig> {
        let missing = |name: &str| Error::MissingTensor {
            path: w.path().to_owned(),
            name: name.into(),
            expected: vec![49_408, 768],
        };
        let get = |name: &str| pair(w, name).ok_or_else(|| missing(name));
        let (vocab_size, hidden_size) = get("embeddings.token_embedding.weight")?;
        let (positions, _) = get("embeddings.position_embedding.weight")?;
        let (intermediate_size, _) = get("encoder.layers.0.mlp.fc1.weight")?;
        let config = ClipConfig {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers: count(|i| w.has(&format!("encoder.layers.{i}.mlp.fc1.weight"))),
            // 64 channels a head in every published encoder; the weights do not tell. Toy models below 256 channels have 4 heads.
            num_attention_heads: if hidden_size >= 256 { hidden_size / 64 } else { 4 },
            max_position_embeddings: positions,
            // OpenAI's model (768 wide) was trained with the approximation, LAION's with the real thing.
            hidden_act: if open_clip || hidden_size > 768 { "gelu" } else { "quick_gelu" }.into(),
            layer_norm_eps: 1e-5,
            eos_token_id: 49_407,
        };
        config.check(w.path())?;
        Ok(config)
    }
}

impl NoiseConfig {
    /// What a single file says about its training: all families share the betas.
    ///
    /// `keys` are the markers in the file; `unet` has canonical names.
    ///
    /// # Errors
    /// Of the file.
    pub(crate) fn of_weights(file: &Weights, unet: &Weights, config: &UNetConfig) -> Result<(NoiseConfig, String)> {
        let marked = |key: &str| file.names().find(|name| name == &key || name.ends_with(&format!(".{key}")));
        let mut noise = NoiseConfig { rescale_betas_zero_snr: marked("ztsnr").is_some(), ..NoiseConfig::default() };
        if let Some(key) = marked("v_pred") {
            noise.prediction_type = "v_prediction".into();
            return Ok((noise, format!("key {key}")));
        }
        // SD 2.x at 768 predicts velocity and says so nowhere, but its last cross-attention's norm has grown apart from that of
        // the base model; ComfyUI tells them apart by the same number.
        let name = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias";
        let two = config.added.is_none() && config.cross_dim == 1024 && config.in_channels == 4;
        if let (true, Some(&[n])) = (two, unet.shape(name)) {
            let bias = unet.finite(name, &[n])?;
            let mean = bias.iter().sum::<f32>() / n as f32;
            let deviation = (bias.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n as f32).sqrt();
            let is_v = deviation > 0.09;
            if is_v {
                noise.prediction_type = "v_prediction".into();
            }
            let side = if is_v { "above" } else { "not above" };
            return Ok((noise, format!("standard deviation {deviation:.3} of {name}, {side} 0.09")));
        }
        Ok((noise, "no key v_pred".into()))
    }
}
