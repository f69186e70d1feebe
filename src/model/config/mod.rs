//! What a model folder says about its networks. The only place that knows kinds of models; the networks see numbers.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};

mod clip;
mod noise;
mod vae;

pub use clip::ClipConfig;
pub use noise::NoiseConfig;
pub use vae::VaeConfig;

/// One value for all levels, or one each.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum PerLevel<T> {
    /// The same everywhere.
    One(T),
    /// By level, outermost first.
    Each(Vec<T>),
}

impl<T: Clone> PerLevel<T> {
    fn expand(&self, levels: usize) -> Vec<T> {
        match self {
            PerLevel::One(value) => vec![value.clone(); levels],
            PerLevel::Each(values) => values.clone(),
        }
    }
}

/// diffusers' UNet2DConditionModel config.json, the fields that decide what runs.
#[derive(Clone, Debug, Deserialize)]
struct RawUNet {
    in_channels: usize,
    out_channels: usize,
    block_out_channels: Vec<usize>,
    layers_per_block: PerLevel<usize>,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    cross_attention_dim: PerLevel<usize>,
    attention_head_dim: PerLevel<usize>,
    #[serde(default)]
    num_attention_heads: Option<PerLevel<usize>>,
    #[serde(default)]
    transformer_layers_per_block: Option<PerLevel<usize>>,
    #[serde(default)]
    use_linear_projection: bool,
    #[serde(default = "groups")]
    norm_num_groups: usize,
    #[serde(default = "eps")]
    norm_eps: f32,
    #[serde(default = "yes")]
    flip_sin_to_cos: bool,
    #[serde(default)]
    freq_shift: f32,
    #[serde(default)]
    sample_size: Option<usize>,
    #[serde(default)]
    addition_embed_type: Option<String>,
    #[serde(default)]
    addition_time_embed_dim: Option<usize>,
    #[serde(default)]
    projection_class_embeddings_input_dim: Option<usize>,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

fn groups() -> usize {
    32
}

fn eps() -> f32 {
    1e-5
}

fn yes() -> bool {
    true
}

/// One level of the UNet.
#[derive(Clone, Debug)]
pub struct Level {
    /// Channels.
    pub channels: usize,
    /// Residual blocks on the way down (one more on the way up).
    pub layers: usize,
    /// Transformer blocks in each transformer on the way down; none: no attention.
    pub down_depth: Option<usize>,
    /// The same on the way up.
    pub up_depth: Option<usize>,
    /// Heads.
    pub heads: usize,
}

/// The UNet in numbers.
#[derive(Clone, Debug)]
pub struct UNetConfig {
    /// Channels of the sample: 4, or 9 for inpaint models.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Levels, outermost first.
    pub levels: Vec<Level>,
    /// Transformer blocks in the mid block.
    pub mid_depth: usize,
    /// Width of the text context.
    pub cross_dim: usize,
    /// Groups of every group norm.
    pub groups: usize,
    /// Epsilon of the residual blocks' group norms.
    pub eps: f32,
    /// Time embedding: cosines first.
    pub cos_first: bool,
    /// Time embedding: shift of the frequencies.
    pub freq_shift: f32,
    /// The latent side that the model was trained for.
    pub sample_size: usize,
    /// What is added to the time embedding.
    pub added: Option<AddedConfig>,
}

/// SDXL's `text_time` embedding in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddedConfig {
    /// Numbers of a row: the pooled text's, then six times `time_dim`.
    pub input: usize,
    /// Sinusoids of each of the six sizes.
    pub time_dim: usize,
}

/// The sizes that SDXL is told: original height and width, crop from the top and from the left, target height and width.
pub const SIZES: usize = 6;

impl AddedConfig {
    /// Width of the pooled text.
    pub fn pooled(&self) -> usize {
        self.input - SIZES * self.time_dim
    }
}

/// A config that asks for what we do not run.
pub(crate) fn unsupported(path: &Path, what: &str, expected: impl Into<String>, found: impl ToString) -> Error {
    Error::Unsupported { path: path.to_owned(), what: what.into(), expected: expected.into(), found: found.to_string() }
}

/// Refuse keys that would change the computation; their neutral values are fine.
fn refuse(
    path: &Path,
    rest: &serde_json::Map<String, serde_json::Value>,
    neutral: &[(&str, serde_json::Value)],
) -> Result<()> {
    for (key, fine) in neutral {
        match rest.get(*key) {
            None | Some(serde_json::Value::Null) => {}
            Some(found) if found == fine => {}
            Some(found) => return Err(unsupported(path, key, fine.to_string(), found)),
        }
    }
    Ok(())
}

impl UNetConfig {
    /// Parse the JSON of a UNet2DConditionModel.
    ///
    /// # Errors
    /// [`Error::File`] if a field is missing, [`Error::Unsupported`] if it asks for what we do not run.
    pub fn parse(path: &Path, json: &str) -> Result<UNetConfig> {
        use serde_json::json;
        let raw: RawUNet = parse(path, json)?;
        let null = serde_json::Value::Null;
        refuse(
            path,
            &raw.rest,
            &[
                ("act_fn", json!("silu")),
                ("attention_type", json!("default")),
                ("center_input_sample", json!(false)),
                ("class_embed_type", null.clone()),
                ("conv_in_kernel", json!(3)),
                ("conv_out_kernel", json!(3)),
                ("cross_attention_norm", null.clone()),
                ("downsample_padding", json!(1)),
                ("dual_cross_attention", json!(false)),
                ("encoder_hid_dim", null.clone()),
                ("mid_block_only_cross_attention", null.clone()),
                ("mid_block_scale_factor", json!(1)),
                ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
                ("only_cross_attention", json!(false)),
                ("resnet_out_scale_factor", json!(1.0)),
                ("resnet_skip_time_act", json!(false)),
                ("resnet_time_scale_shift", json!("default")),
                ("reverse_transformer_layers_per_block", null.clone()),
                ("time_cond_proj_dim", null.clone()),
                ("time_embedding_act_fn", null.clone()),
                ("time_embedding_dim", null.clone()),
                ("time_embedding_type", json!("positional")),
                ("timestep_post_act", null),
            ],
        )?;
        let n = raw.block_out_channels.len();
        let layers = raw.layers_per_block.expand(n);
        // diffusers' attention_head_dim counts heads; a config that has both names means the newer one.
        let heads = raw.num_attention_heads.as_ref().unwrap_or(&raw.attention_head_dim).expand(n);
        let depths = raw.transformer_layers_per_block.unwrap_or(PerLevel::One(1)).expand(n);
        for (what, len) in [
            ("layers_per_block", layers.len()),
            ("attention_head_dim", heads.len()),
            ("transformer_layers_per_block", depths.len()),
            ("down_block_types", raw.down_block_types.len()),
            ("up_block_types", raw.up_block_types.len()),
        ] {
            if len != n || n == 0 {
                return Err(unsupported(path, what, format!("one entry for each of {n} levels"), len));
            }
        }
        let PerLevel::One(cross_dim) = raw.cross_attention_dim else {
            return Err(unsupported(path, "cross_attention_dim", "one number", "a list"));
        };
        let mut levels = Vec::new();
        for i in 0..n {
            let attention = |kind: &str, with: &str, without: &str| match kind {
                kind if kind == with => Ok(Some(depths[i])),
                kind if kind == without => Ok(None),
                kind => Err(unsupported(path, "block type", format!("{with} or {without}"), kind)),
            };
            levels.push(Level {
                channels: raw.block_out_channels[i],
                layers: layers[i],
                down_depth: attention(&raw.down_block_types[i], "CrossAttnDownBlock2D", "DownBlock2D")?,
                up_depth: attention(&raw.up_block_types[n - 1 - i], "CrossAttnUpBlock2D", "UpBlock2D")?,
                heads: heads[i],
            });
        }
        let added = match (raw.addition_embed_type.as_deref(), raw.projection_class_embeddings_input_dim) {
            (None, _) => None,
            (Some("text_time"), Some(input)) => {
                let time_dim = raw.addition_time_embed_dim.unwrap_or(256);
                Some(AddedConfig { input, time_dim })
            }
            (Some(other), _) => return Err(unsupported(path, "addition_embed_type", "text_time, or none", other)),
        };
        let config = UNetConfig {
            in_channels: raw.in_channels,
            out_channels: raw.out_channels,
            mid_depth: depths[n - 1],
            levels,
            cross_dim,
            groups: raw.norm_num_groups,
            eps: raw.norm_eps,
            cos_first: raw.flip_sin_to_cos,
            freq_shift: raw.freq_shift,
            sample_size: raw.sample_size.unwrap_or(64),
            added,
        };
        config.check(path)?;
        // Linear or convolutional projections have the same arithmetic; the loader takes both shapes of weights.
        let _ = raw.use_linear_projection;
        Ok(config)
    }

    /// Can it be run?
    pub(crate) fn check(&self, path: &Path) -> Result<()> {
        if let Some(AddedConfig { input, time_dim }) = self.added
            && (time_dim == 0 || !time_dim.is_multiple_of(4) || input <= SIZES * time_dim || !input.is_multiple_of(4))
        {
            let expected = format!("more than {SIZES} times addition_time_embed_dim ({time_dim}), multiples of 4");
            return Err(unsupported(path, "projection_class_embeddings_input_dim", expected, input));
        }
        if !(1..=4096).contains(&self.sample_size) {
            return Err(unsupported(path, "sample_size", "1 to 4096", self.sample_size));
        }
        if !self.cross_dim.is_multiple_of(4) {
            return Err(unsupported(path, "cross_attention_dim", "a multiple of 4", self.cross_dim));
        }
        for level in &self.levels {
            let Level { channels, heads, .. } = *level;
            if channels == 0 || self.groups == 0 || !channels.is_multiple_of(4) || !channels.is_multiple_of(self.groups)
            {
                let expected = format!("multiples of 4 and of norm_num_groups ({})", self.groups);
                return Err(unsupported(path, "block_out_channels", expected, channels));
            }
            let attends = level.down_depth.is_some() || level.up_depth.is_some();
            if attends && (heads == 0 || !channels.is_multiple_of(4 * heads)) {
                return Err(unsupported(
                    path,
                    "attention_head_dim",
                    format!("heads of a multiple of 4 in {channels} channels"),
                    heads,
                ));
            }
        }
        Ok(())
    }

    /// The mid block's grid for a latent of [h, w]: each down-sampling halves, rounded up.
    pub fn mid_size(&self, h: u32, w: u32) -> [u32; 2] {
        (1..self.levels.len()).fold([h, w], |size, _| size.map(|n| n.div_ceil(2)))
    }
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, json: &str) -> Result<T> {
    serde_json::from_str(json)
        .map_err(|e| Error::file(path, format!("not the config expected here: {e}"), "fetch it again"))
}
