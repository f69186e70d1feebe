//! The blocks that the networks share: residual block, transformer, and their parameters by checkpoint name.
//!
//! B batch, H W grid, C channels, T = H·W tokens, S context tokens, D context width.

use crate::error::Result;
use crate::gpu::{Graph, Tensor};
use crate::loader::Loader;
use crate::ops::attention::{Attention, attention, attention_with_mass};
use crate::ops::chain::{self, Chained, chain};
use crate::ops::conv2d::{Taps, conv2d};
use crate::ops::cross::{Folded, cross, fold};
use crate::ops::group_norm::{group_norm, group_norm_to_tiles};
use crate::ops::layer_norm::layer_norm;
use crate::ops::matmul::matmul;
use crate::ops::repeat::repeat;
use crate::ops::row_sums::Normed;
use crate::ops::winograd::{self, Transformed, winograd};
use crate::ops::{Activation, BiasRows, Conv, Epilogue, Linear, Norm};

/// ResnetBlock2D: norm, SiLU, conv, + time embedding, norm, SiLU, conv, + shortcut.
pub struct Resnet {
    norm1: Norm,
    conv1: Conv,
    norm2: Norm,
    conv2: Conv,
    shortcut: Option<Conv>,
    groups: u32,
    /// First channel of this block in the rows of all time projections; none in the VAE.
    time_offset: Option<u32>,
}

/// What [`winograd`] takes of a block's two convolutions; none of one that is convolved directly.
pub type Pair = [Option<Transformed>; 2];

/// The rows of all blocks' time projections, [1, 1, R, Σ C_out] f32; conv1's biases are in them.
#[derive(Clone, Copy)]
pub struct TimeRows {
    /// [1, 1, R, Σ C_out]
    pub tensor: Tensor,
}

impl Resnet {
    /// `channels` [in, out]; `time_offset`: see [`Resnet`].
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn load(
        l: &mut Loader<'_>,
        name: &str,
        channels: [usize; 2],
        groups: usize,
        eps: f32,
        time_offset: Option<u32>,
    ) -> Result<Resnet> {
        let [c_in, c_out] = channels;
        let shortcut = match c_in == c_out {
            true => None,
            false => Some(l.conv(&format!("{name}.conv_shortcut"), c_in, c_out, 1).await?),
        };
        Ok(Resnet {
            norm1: l.norm(&format!("{name}.norm1"), c_in, eps).await?,
            conv1: l.conv(&format!("{name}.conv1"), c_in, c_out, 3).await?,
            norm2: l.norm(&format!("{name}.norm2"), c_out, eps).await?,
            conv2: l.conv(&format!("{name}.conv2"), c_out, c_out, 3).await?,
            shortcut,
            groups: groups as u32,
            time_offset,
        })
    }

    /// The weights of its convolutions as [`winograd`] takes them, for images of [h, w]: from the layers alone.
    pub fn folded(&self, g: &mut Graph, size: [u32; 2]) -> Pair {
        [&self.conv1, &self.conv2].map(|conv| winograd::fold(g, conv, size))
    }

    /// x [B, H, W, C], and `skip` [B, H, W, C'] beside it on the way up → [B, H, W, C_out]. `folded` from [`Resnet::folded`].
    pub fn forward(
        &self,
        g: &mut Graph,
        x: Tensor,
        skip: Option<Tensor>,
        time: Option<TimeRows>,
        folded: Pair,
    ) -> Tensor {
        let bias_rows = time.zip(self.time_offset).map(|(time, offset)| BiasRows {
            tensor: time.tensor,
            offset,
            // One row for the whole batch, or one for each image.
            rows: x.rows() / time.tensor.rows(),
        });
        let plus_time = |_: &mut Graph| Epilogue { bias_rows, ..Default::default() };
        let h = convolved(g, (x, skip), self.groups, (&self.norm1, &self.conv1, folded[0]), plus_time);
        let plus_shortcut = |g: &mut Graph| match &self.shortcut {
            Some(conv) => Epilogue::add(conv2d(g, x, skip, conv, Taps::same(1), Epilogue::default())),
            None => Epilogue::add(x),
        };
        convolved(g, (h, None), self.groups, (&self.norm2, &self.conv2, folded[1]), plus_shortcut)
    }
}

/// Norm of x, and `skip` beside it, in `groups`, SiLU, 3x3 convolution in the tiles that its weights were `folded` for, if they were and there is room, and what `epilogue`
/// records and adds: [B, H, W, C_out].
pub fn convolved(
    g: &mut Graph,
    (x, skip): (Tensor, Option<Tensor>),
    groups: u32,
    (norm, conv, folded): (&Norm, &Conv, Option<Transformed>),
    epilogue: impl FnOnce(&mut Graph) -> Epilogue,
) -> Tensor {
    let [batch, h, w, _] = x.dims;
    if let Some(folded) = folded.filter(|folded| winograd::fits(g, [batch, h, w], folded))
        && let Some(tiles) = group_norm_to_tiles(g, x, skip, norm, groups, folded.tiles)
    {
        let epilogue = epilogue(g);
        return winograd(g, tiles, [batch, h, w], (folded, conv.bias.as_ref()), epilogue);
    }
    let h = group_norm(g, x, skip, norm, groups, true);
    let epilogue = epilogue(g);
    conv2d(g, h, None, conv, Taps::same(3), epilogue)
}

/// What one cross-attention knows of the prompts; computed once per prompt.
#[derive(Clone, Copy)]
pub enum ContextKv {
    /// Keys and values, [P, 1, S, 2·C].
    Apart(Tensor),
    /// The projections around them folded in.
    Folded(Folded),
}

impl ContextKv {
    /// Its tensors, in the order of [`ContextKv::map`].
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut all = Vec::new();
        self.map(|tensor| {
            all.push(tensor);
            tensor
        });
        all
    }

    /// The same of other tensors: where they are bound elsewhere, or of fewer prompts.
    pub fn map(&self, mut of: impl FnMut(Tensor) -> Tensor) -> ContextKv {
        match *self {
            ContextKv::Apart(kv) => ContextKv::Apart(of(kv)),
            ContextKv::Folded(folded) => ContextKv::Folded(folded.map(of)),
        }
    }
}

/// BasicTransformerBlock: self-attention, cross-attention, feed-forward, each with norm before and residual after.
pub struct TransformerBlock {
    qkv: Normed,
    out1: Linear,
    q: Normed,
    /// Context D → [k, v].
    kv: Linear,
    out2: Linear,
    up: Normed,
    down: Linear,
    heads: u32,
}

impl TransformerBlock {
    async fn load(l: &mut Loader<'_>, name: &str, channels: usize, heads: usize, cross_dim: usize) -> Result<Self> {
        let c = channels;
        let projections = |attn: &str, which: &[&str]| -> Vec<String> {
            which.iter().map(|w| format!("{name}.{attn}.to_{w}")).collect()
        };
        let [norm1, norm2, norm3] = ["norm1", "norm2", "norm3"].map(|norm| format!("{name}.{norm}"));
        let qkv = l.fused(&projections("attn1", &["q", "k", "v"]), c, &[c; 3], false).await?;
        let q = l.linear(&format!("{name}.attn2.to_q"), c, c, false).await?;
        let up = l.geglu(&format!("{name}.ff.net.0.proj"), c, 4 * c).await?;
        Ok(TransformerBlock {
            qkv: l.normed(&norm1, 1e-5, qkv).await?,
            out1: l.linear(&format!("{name}.attn1.to_out.0"), c, c, true).await?,
            q: l.normed(&norm2, 1e-5, q).await?,
            kv: l.fused(&projections("attn2", &["k", "v"]), cross_dim, &[c; 2], false).await?,
            out2: l.linear(&format!("{name}.attn2.to_out.0"), c, c, true).await?,
            up: l.normed(&norm3, 1e-5, up).await?,
            down: l.linear(&format!("{name}.ff.net.2"), 4 * c, c, true).await?,
            heads: heads as u32,
        })
    }

    /// Of hidden states [P, 1, S, D].
    pub fn context(&self, g: &mut Graph, hidden: Tensor) -> ContextKv {
        let kv = matmul(g, hidden, &self.kv, Epilogue::default());
        match fold(g, &self.q.linear, &self.out2, kv, self.heads) {
            Some(folded) => ContextKv::Folded(folded),
            None => ContextKv::Apart(kv),
        }
    }

    /// x [B / share, 1, T, C] → what [`TransformerBlock::down`] projects, [B, 1, T, 4·C], and what is added to it, [B, 1, T, C]; with `mass_of`
    /// also the self-attention's mass per key of that many first images.
    fn forward(
        &self,
        g: &mut Graph,
        x: Tensor,
        kv: ContextKv,
        mass_of: Option<u32>,
        share: u32,
    ) -> ([Tensor; 2], Option<Tensor>) {
        let qkv = self.qkv.forward(g, x, Epilogue::default());
        let own = Attention::fused(qkv, self.heads);
        let (h, mass) = match mass_of {
            Some(batch) => {
                let (h, mass) = attention_with_mass(g, &own, batch);
                (h, Some(mass))
            }
            None => (attention(g, &own), None),
        };
        let x = matmul(g, h, &self.out1, Epilogue::add(x));

        // Here the prompts part.
        let x = match kv {
            ContextKv::Folded(folded) => {
                // Sums are of rows as they were stored, not of repeated ones.
                let sums = if share == 1 { self.q.sums(g, x) } else { None };
                let h = if sums.is_some() { x } else { layer_norm(g, x, &self.q.norm) };
                let [h, x] = [h, x].map(|h| repeat(g, h, share));
                cross(g, h, sums, &folded, &self.out2, x)
            }
            ContextKv::Apart(kv) => {
                let q = self.q.forward(g, x, Epilogue::default());
                let [q, x] = [q, x].map(|h| repeat(g, h, share));
                let h = attention(g, &Attention::cross(q, kv, self.heads));
                matmul(g, h, &self.out2, Epilogue::add(x))
            }
        };

        let h = self.up.forward(g, x, Epilogue::act(Activation::Geglu));
        ([h, x], mass)
    }
}

/// Transformer2DModel: norm, projection in, blocks, projection out, + input.
pub struct Transformer {
    norm: Norm,
    proj_in: Linear,
    /// The blocks, in order.
    pub blocks: Vec<TransformerBlock>,
    proj_out: Linear,
    groups: u32,
}

impl Transformer {
    /// `depth` blocks of `heads` heads over `channels`, attending to a context of width `cross_dim`.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn load(
        l: &mut Loader<'_>,
        name: &str,
        channels: usize,
        heads: usize,
        depth: usize,
        cross_dim: usize,
        groups: usize,
    ) -> Result<Transformer> {
        let mut blocks = Vec::new();
        for i in 0..depth {
            blocks.push(
                TransformerBlock::load(l, &format!("{name}.transformer_blocks.{i}"), channels, heads, cross_dim)
                    .await?,
            );
        }
        Ok(Transformer {
            norm: l.norm(&format!("{name}.norm"), channels, 1e-6).await?,
            proj_in: l.linear(&format!("{name}.proj_in"), channels, channels, true).await?,
            blocks,
            proj_out: l.linear(&format!("{name}.proj_out"), channels, channels, true).await?,
            groups: groups as u32,
        })
    }

    /// The last feed-forward's projection and the one out as one, where that is to be had. Once per run.
    pub fn end(&self, g: &mut Graph) -> Option<Chained> {
        chain::fold(g, &self.blocks.last()?.down, &self.proj_out)
    }

    /// x [B / share, H, W, C] → [B, H, W, C]; takes one context of `kv` for each block, and `end` from [`Transformer::end`]. With `mass_of`
    /// also the mass per key of the first block's self-attention.
    pub fn forward(
        &self,
        g: &mut Graph,
        x: Tensor,
        (kv, end): (&mut impl Iterator<Item = ContextKv>, Option<Chained>),
        mass_of: Option<u32>,
        share: u32,
    ) -> (Tensor, Option<Tensor>) {
        let h = group_norm(g, x, None, &self.norm, self.groups, false);
        let mut h = matmul(g, h, &self.proj_in, Epilogue::default());
        let mut mass = None;
        for (i, block) in self.blocks.iter().enumerate() {
            let Some(kv) = kv.next() else { unreachable!("a context for every transformer block") };
            let own_share = if i == 0 { share } else { 1 };
            let ([wide, rest], block_mass) = block.forward(g, h, kv, mass_of.filter(|_| i == 0), own_share);
            mass = mass.or(block_mass);
            if let (Some(end), true) = (end, i + 1 == self.blocks.len()) {
                let x = repeat(g, x, share);
                return (chain(g, wide, rest, &end, x), mass);
            }
            h = matmul(g, wide, &block.down, Epilogue::add(rest));
        }
        let x = repeat(g, x, share);
        (matmul(g, h, &self.proj_out, Epilogue::add(x)), mass)
    }
}
