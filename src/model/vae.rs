//! AutoencoderKL: pictures to latents and back.
//!
//! B batch, H W picture, h w latent (H / factor), C channels of a level.

use super::blocks::Resnet;
use super::config::VaeConfig;
use crate::error::Result;
use crate::gpu::{DType, Graph, Tensor};
use crate::loader::Loader;
use crate::ops::attention::{Attention, attention};
use crate::ops::conv2d::{Taps, conv2d, doubled, fold};
use crate::ops::group_norm::group_norm;
use crate::ops::matmul::matmul;
use crate::ops::{Conv, Epilogue, Linear, Norm};

const EPS: f32 = 1e-6;

/// The decoder's parameters, in the order of the computation.
pub struct Decoder {
    post_quant: Option<Conv>,
    conv_in: Conv,
    mid: Mid,
    /// Innermost level first: residual blocks, then the convolution after the doubling.
    up: Vec<(Vec<Resnet>, Option<Conv>)>,
    norm_out: Norm,
    conv_out: Conv,
    groups: u32,
    /// What products take; activations are f32.
    operands: DType,
}

/// The encoder's parameters, in the order of the computation.
pub struct Encoder {
    conv_in: Conv,
    /// Full size first: residual blocks, then the halving convolution.
    down: Vec<(Vec<Resnet>, Option<Conv>)>,
    mid: Mid,
    norm_out: Norm,
    conv_out: Conv,
    quant: Option<Conv>,
    groups: u32,
    /// What products take; activations are f32.
    operands: DType,
}

struct Mid {
    first: Resnet,
    norm: Norm,
    qkv: Linear,
    out: Linear,
    second: Resnet,
    groups: u32,
}

impl Mid {
    async fn load(l: &mut Loader<'_>, name: &str, c: usize, groups: usize) -> Result<Mid> {
        let attention = format!("{name}.attentions.0");
        // diffusers before 0.12 wrote other names for the same four layers.
        let old = l.weights().has(&format!("{attention}.query.weight"));
        let names = if old { ["query", "key", "value", "proj_attn"] } else { ["to_q", "to_k", "to_v", "to_out.0"] };
        let names = names.map(|n| format!("{attention}.{n}"));
        Ok(Mid {
            first: Resnet::load(l, &format!("{name}.resnets.0"), [c, c], groups, EPS, None).await?,
            norm: l.norm(&format!("{attention}.group_norm"), c, EPS).await?,
            qkv: l.fused(&names[..3], c, &[c; 3], true).await?,
            out: l.linear(&names[3], c, c, true).await?,
            second: Resnet::load(l, &format!("{name}.resnets.1"), [c, c], groups, EPS, None).await?,
            groups: groups as u32,
        })
    }

    /// x [B, h, w, C] → the same: residual block, attention of one head, residual block.
    fn forward(&self, g: &mut Graph, x: Tensor) -> Tensor {
        let x = apart(g, &self.first, x);
        let h = group_norm(g, x, None, &self.norm, self.groups, false);
        let qkv = matmul(g, h, &self.qkv, Epilogue::default());
        let h = attention(g, &Attention::fused(qkv, 1));
        let x = matmul(g, h, &self.out, Epilogue::add(x));
        apart(g, &self.second, x)
    }
}

/// A residual block, its weights transformed for this once: they are read once as well.
fn apart(g: &mut Graph, resnet: &Resnet, x: Tensor) -> Tensor {
    let folded = resnet.folded(g, [x.height(), x.width()]);
    resnet.forward(g, x, None, None, folded)
}

impl Decoder {
    /// Load by diffusers' names.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn load(l: &mut Loader<'_>, config: &VaeConfig) -> Result<Decoder> {
        let (channels, groups, z) = (&config.block_out_channels, config.norm_num_groups, config.latent_channels);
        let last = channels.len() - 1;
        let mut c = channels[last];
        let post_quant = match config.use_post_quant_conv {
            true => Some(l.conv("post_quant_conv", z, z, 1).await?),
            false => None,
        };
        let conv_in = l.conv("decoder.conv_in", z, c, 3).await?;
        let mid = Mid::load(l, "decoder.mid_block", c, groups).await?;
        let mut up = Vec::new();
        for (i, &width) in channels.iter().rev().enumerate() {
            let mut resnets = Vec::new();
            for j in 0..=config.layers_per_block {
                let name = format!("decoder.up_blocks.{i}.resnets.{j}");
                resnets.push(Resnet::load(l, &name, [c, width], groups, EPS, None).await?);
                c = width;
            }
            let conv = match i < last {
                true => Some(l.conv(&format!("decoder.up_blocks.{i}.upsamplers.0.conv"), c, c, 3).await?),
                false => None,
            };
            up.push((resnets, conv));
        }
        let decoder = Decoder {
            post_quant,
            conv_in,
            mid,
            up,
            norm_out: l.norm("decoder.conv_norm_out", c, EPS).await?,
            conv_out: l.conv("decoder.conv_out", c, config.out_channels, 3).await?,
            groups: groups as u32,
            operands: l.activations(),
        };
        l.finish().await?;
        Ok(decoder)
    }

    /// Levels of the way up.
    pub fn levels(&self) -> usize {
        self.up.len()
    }

    /// z [B, h, w, 4], unscaled → picture [B, H, W, 4] f32: red, green, blue in -1 .. 1, and a zero.
    pub fn forward(&self, g: &mut Graph, z: Tensor) -> Tensor {
        let h = self.head(g, z, 0);
        self.tail(g, h, 0)
    }

    /// z [B, h, w, 4], unscaled → what level `levels` of the way up takes.
    pub fn head(&self, g: &mut Graph, z: Tensor, levels: usize) -> Tensor {
        g.operands = self.operands;
        let z = match &self.post_quant {
            Some(conv) => conv2d(g, z, None, conv, Taps::same(1), Epilogue::default()),
            None => z,
        };
        let h = conv2d(g, z, None, &self.conv_in, Taps::same(3), Epilogue::default());
        let h = self.mid.forward(g, h);
        Self::climb(g, h, &self.up[..levels])
    }

    /// What level `levels` of the way up takes → picture [B, H, W, 4] f32. But for its norms this looks at neighbours alone.
    pub fn tail(&self, g: &mut Graph, h: Tensor, levels: usize) -> Tensor {
        g.operands = self.operands;
        let h = Self::climb(g, h, &self.up[levels..]);
        let h = group_norm(g, h, None, &self.norm_out, self.groups, true);
        conv2d(g, h, None, &self.conv_out, Taps::same(3), Epilogue { f32_out: true, ..Default::default() })
    }

    fn climb(g: &mut Graph, mut h: Tensor, levels: &[(Vec<Resnet>, Option<Conv>)]) -> Tensor {
        for (resnets, upsample) in levels {
            for resnet in resnets {
                h = apart(g, resnet, h);
            }
            if let Some(conv) = upsample {
                h = match fold(g, conv, h.rows()) {
                    Some(folded) => doubled(g, h, conv, folded, Epilogue::default()),
                    None => {
                        let double = [2 * h.height(), 2 * h.width()];
                        conv2d(g, h, None, conv, Taps::resized(double), Epilogue::default())
                    }
                };
            }
        }
        h
    }
}

impl Encoder {
    /// Load by diffusers' names.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn load(l: &mut Loader<'_>, config: &VaeConfig) -> Result<Encoder> {
        let (channels, groups, z) = (&config.block_out_channels, config.norm_num_groups, config.latent_channels);
        let last = channels.len() - 1;
        let conv_in = l.conv("encoder.conv_in", config.in_channels, channels[0], 3).await?;
        let mut c = channels[0];
        let mut down = Vec::new();
        for (i, &width) in channels.iter().enumerate() {
            let mut resnets = Vec::new();
            for j in 0..config.layers_per_block {
                let name = format!("encoder.down_blocks.{i}.resnets.{j}");
                resnets.push(Resnet::load(l, &name, [c, width], groups, EPS, None).await?);
                c = width;
            }
            let conv = match i < last {
                true => Some(l.conv(&format!("encoder.down_blocks.{i}.downsamplers.0.conv"), c, c, 3).await?),
                false => None,
            };
            down.push((resnets, conv));
        }
        let mid = Mid::load(l, "encoder.mid_block", c, groups).await?;
        let quant = match config.use_quant_conv {
            true => Some(l.conv("quant_conv", 2 * z, 2 * z, 1).await?),
            false => None,
        };
        let encoder = Encoder {
            conv_in,
            down,
            mid,
            norm_out: l.norm("encoder.conv_norm_out", c, EPS).await?,
            conv_out: l.conv("encoder.conv_out", c, 2 * z, 3).await?,
            quant,
            groups: groups as u32,
            operands: l.activations(),
        };
        l.finish().await?;
        Ok(encoder)
    }

    /// Picture [B, H, W, 4] (red, green, blue in -1 .. 1, and a zero) → [B, h, w, 8] f32: mean, then log variance,
    /// unscaled.
    pub fn forward(&self, g: &mut Graph, x: Tensor) -> Tensor {
        let levels = self.down.len();
        let h = self.head(g, x, levels);
        self.tail(g, h, levels)
    }

    /// Levels of the way down.
    pub fn levels(&self) -> usize {
        self.down.len()
    }

    /// Picture [B, H, W, 4] → what level `levels` of the way down takes. But for its norms this looks at neighbours alone.
    pub fn head(&self, g: &mut Graph, x: Tensor, levels: usize) -> Tensor {
        g.operands = self.operands;
        let h = conv2d(g, x, None, &self.conv_in, Taps::same(3), Epilogue::default());
        Self::descend(g, h, &self.down[..levels])
    }

    fn descend(g: &mut Graph, mut h: Tensor, levels: &[(Vec<Resnet>, Option<Conv>)]) -> Tensor {
        for (resnets, downsample) in levels {
            for resnet in resnets {
                h = apart(g, resnet, h);
            }
            if let Some(conv) = downsample {
                h = conv2d(g, h, None, conv, Taps::half_after(), Epilogue::default());
            }
        }
        h
    }

    /// What level `levels` of the way down takes → [B, h, w, 8] f32, as [`Encoder::forward`].
    pub fn tail(&self, g: &mut Graph, h: Tensor, levels: usize) -> Tensor {
        g.operands = self.operands;
        let h = Self::descend(g, h, &self.down[levels..]);
        let h = self.mid.forward(g, h);
        let h = group_norm(g, h, None, &self.norm_out, self.groups, true);
        let out = Epilogue { f32_out: true, ..Default::default() };
        match &self.quant {
            None => conv2d(g, h, None, &self.conv_out, Taps::same(3), out),
            Some(conv) => {
                let h = conv2d(g, h, None, &self.conv_out, Taps::same(3), Epilogue::default());
                conv2d(g, h, None, conv, Taps::same(1), out)
            }
        }
    }
}
