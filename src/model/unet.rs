//! UNet2DConditionModel: the latent's noise (or velocity) at a timestep, given the text.
//!
//! B batch, h w latent grid, C channels of a level, P prompts, S context tokens, D context width, R time rows (1 or B).

use super::blocks::{ContextKv, Pair, Resnet, TimeRows, Transformer};
use super::config::UNetConfig;
use crate::error::Result;
use crate::gpu::{Graph, Tensor};
use crate::loader::Loader;
use crate::ops::chain::Chained;
use crate::ops::conv2d::{Taps, conv2d, doubled, fold};
use crate::ops::group_norm::group_norm;
use crate::ops::matmul::matmul;
use crate::ops::repeat::repeat;
use crate::ops::time_embedding::{Rows, frequencies, time_embedding};
use crate::ops::{Activation, BiasRows, Conv, Epilogue, Linear, Norm, Param};
use crate::weights::Weights;

/// The UNet's parameters, in the order of the computation.
pub struct UNet {
    /// What it is in numbers.
    pub config: UNetConfig,
    time: Time,
    added: Option<Added>,
    conv_in: Conv,
    down: Vec<Down>,
    mid: Mid,
    up: Vec<Up>,
    norm_out: Norm,
    conv_out: Conv,
}

struct Time {
    frequencies: Param,
    linear_1: Linear,
    linear_2: Linear,
    /// The time projections of all residual blocks side by side, conv1's biases added to theirs.
    projections: Linear,
}

/// What SDXL adds to the time embedding: the pooled text and six sizes.
struct Added {
    linear_1: Linear,
    /// Its bias holds that of the time embedding's second layer too, to which its result is added.
    linear_2: Linear,
}

/// Residual blocks of a level, and the transformer after each where there is one.
type Layers = Vec<(Resnet, Option<Transformer>)>;

struct Down {
    layers: Layers,
    downsample: Option<Conv>,
}

struct Mid {
    first: Resnet,
    attention: Transformer,
    second: Resnet,
}

struct Up {
    layers: Layers,
    upsample: Option<Conv>,
}

/// The residual blocks of a level, each with the level's size.
fn of_level(layers: &Layers, size: [u32; 2]) -> impl Iterator<Item = (&Resnet, [u32; 2])> {
    layers.iter().map(move |(resnet, _)| (resnet, size))
}

/// What the UNet is asked beside the sample.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// This call's rows of [`UNet::times`], [1, 1, R, Σ C]: one, one for each prompt, or one for each image.
    pub time: Tensor,
    /// [`UNet::context`] of the prompts.
    pub context: &'a [ContextKv],
    /// [`UNet::folded`] for this size.
    pub folded: &'a Folded,
    /// Return the mid block's mass per key of that many first images.
    pub mass_of: Option<u32>,
    /// x is one for that many prompts: what comes before the first cross-attention is computed once for all of them. 1 where x has
    /// an image for each.
    pub share: u32,
}

/// Weights folded from others, each where it saves work.
#[derive(Clone, Debug, Default)]
pub struct Folded {
    /// Of the way up's doublings, as [`fold`] has them: none where a size is odd, and what comes is not its double.
    doublings: Vec<Option<Tensor>>,
    /// [`Transformer::end`] of each transformer, in the order of the computation.
    ends: Vec<Option<Chained>>,
    /// [`Resnet::folded`] of each residual block, in the order of the computation.
    convs: Vec<Pair>,
}

impl Folded {
    /// Its tensors, in the order of [`Folded::map`].
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut all = Vec::new();
        self.map(|tensor| {
            all.push(tensor);
            tensor
        });
        all
    }

    /// The same of other tensors: where they are bound elsewhere.
    pub fn map(&self, mut of: impl FnMut(Tensor) -> Tensor) -> Folded {
        Folded {
            doublings: self.doublings.iter().map(|tensor| tensor.map(&mut of)).collect(),
            ends: self.ends.iter().map(|end| end.map(|end| end.map(&mut of))).collect(),
            convs: self.convs.iter().map(|pair| pair.map(|folded| folded.map(|folded| folded.map(&mut of)))).collect(),
        }
    }
}

/// What the UNet returns.
pub struct Output {
    /// [B, h, w, 4] f32: noise or velocity.
    pub sample: Tensor,
    /// The mid block's first self-attention's mass per key, f32, of the images asked for: B' · mid_h · mid_w floats.
    pub mass: Option<Tensor>,
}

/// Names of residual blocks and how many channels each puts out, in the order of the time projections.
#[derive(Default)]
struct TimeSlots {
    names: Vec<String>,
    widths: Vec<usize>,
}

impl TimeSlots {
    /// The first channel of a block's projection among all.
    fn take(&mut self, name: &str, width: usize) -> Option<u32> {
        let offset = self.widths.iter().sum::<usize>() as u32;
        self.names.push(name.to_owned());
        self.widths.push(width);
        Some(offset)
    }
}

impl UNet {
    /// Load by diffusers' names.
    ///
    /// # Errors
    /// Of the file (which tensor, expected and found), or of the device.
    pub async fn load(l: &mut Loader<'_>, config: UNetConfig) -> Result<UNet> {
        let mut slots = TimeSlots::default();
        let (groups, eps, cross) = (config.groups, config.eps, config.cross_dim);
        let levels = &config.levels;
        let last = levels.len() - 1;
        let mut down = Vec::new();
        let mut c = levels[0].channels;
        // Channels of the tensors that the way down leaves for the way up.
        let mut skips = vec![c];
        for (i, level) in levels.iter().enumerate() {
            let mut layers = Vec::new();
            for j in 0..level.layers {
                let name = format!("down_blocks.{i}.resnets.{j}");
                let slot = slots.take(&name, level.channels);
                let resnet = Resnet::load(l, &name, [c, level.channels], groups, eps, slot).await?;
                c = level.channels;
                let name = format!("down_blocks.{i}.attentions.{j}");
                let attention = match level.down_depth {
                    Some(depth) => Some(Transformer::load(l, &name, c, level.heads, depth, cross, groups).await?),
                    None => None,
                };
                layers.push((resnet, attention));
                skips.push(c);
            }
            let downsample = match i < last {
                true => Some(l.conv(&format!("down_blocks.{i}.downsamplers.0.conv"), c, c, 3).await?),
                false => None,
            };
            if downsample.is_some() {
                skips.push(c);
            }
            down.push(Down { layers, downsample });
        }
        let mid = Mid {
            first: {
                let slot = slots.take("mid_block.resnets.0", c);
                Resnet::load(l, "mid_block.resnets.0", [c, c], groups, eps, slot).await?
            },
            attention: {
                let heads = levels[last].heads;
                Transformer::load(l, "mid_block.attentions.0", c, heads, config.mid_depth, cross, groups).await?
            },
            second: {
                let slot = slots.take("mid_block.resnets.1", c);
                Resnet::load(l, "mid_block.resnets.1", [c, c], groups, eps, slot).await?
            },
        };
        let mut up = Vec::new();
        for (i, level) in levels.iter().rev().enumerate() {
            let mut layers = Vec::new();
            for j in 0..=level.layers {
                let Some(skip) = skips.pop() else { unreachable!("a skip for every residual block of the way up") };
                let name = format!("up_blocks.{i}.resnets.{j}");
                let slot = slots.take(&name, level.channels);
                let resnet = Resnet::load(l, &name, [c + skip, level.channels], groups, eps, slot).await?;
                c = level.channels;
                let name = format!("up_blocks.{i}.attentions.{j}");
                let attention = match level.up_depth {
                    Some(depth) => Some(Transformer::load(l, &name, c, level.heads, depth, cross, groups).await?),
                    None => None,
                };
                layers.push((resnet, attention));
            }
            let upsample = match i < last {
                true => Some(l.conv(&format!("up_blocks.{i}.upsamplers.0.conv"), c, c, 3).await?),
                false => None,
            };
            up.push(Up { layers, upsample });
        }
        let unet = UNet {
            time: Time::load(l, &config, &slots).await?,
            added: Added::load(l, &config).await?,
            conv_in: l.conv("conv_in", config.in_channels, levels[0].channels, 3).await?,
            down,
            mid,
            up,
            norm_out: l.norm("conv_norm_out", c, eps).await?,
            conv_out: l.conv("conv_out", c, config.out_channels, 3).await?,
            config,
        };
        l.finish().await?;
        Ok(unet)
    }

    /// The transformers in the order of the computation.
    fn transformers(&self) -> impl Iterator<Item = &Transformer> {
        let down = self.down.iter().flat_map(|level| level.layers.iter().filter_map(|(_, t)| t.as_ref()));
        let up = self.up.iter().flat_map(|level| level.layers.iter().filter_map(|(_, t)| t.as_ref()));
        down.chain([&self.mid.attention]).chain(up)
    }

    /// What every cross-attention knows of the `context` [P, 1, S, D], in the order of the computation. Once per prompt.
    pub fn context(&self, g: &mut Graph, context: Tensor) -> Vec<ContextKv> {
        self.transformers().flat_map(|t| &t.blocks).map(|block| block.context(g, context)).collect()
    }

    /// What is folded for latents of [h, w]. Once per run.
    pub fn folded(&self, g: &mut Graph, [h, w]: [u32; 2]) -> Folded {
        let sizes: Vec<[u32; 2]> = (0..self.up.len()).map(|level| [h, w].map(|n| n.div_ceil(1 << level))).collect();
        let ups = self.up.iter().filter_map(|up| up.upsample.as_ref());
        let pairs = sizes.windows(2).rev();
        let fold = |(conv, pair): (&Conv, &[[u32; 2]])| match pair[0] == pair[1].map(|n| 2 * n) {
            true => fold(g, conv, pair[1][0] * pair[1][1]),
            false => None,
        };
        let doublings = ups.zip(pairs).map(fold).collect();
        let ends = self.transformers().map(|transformer| transformer.end(g)).collect();
        let mid = [&self.mid.first, &self.mid.second].map(|resnet| (resnet, sizes[sizes.len() - 1]));
        let down = self.down.iter().zip(&sizes).flat_map(|(level, size)| of_level(&level.layers, *size));
        let up = self.up.iter().zip(sizes.iter().rev()).flat_map(|(level, size)| of_level(&level.layers, *size));
        let convs = down.chain(mid).chain(up).map(|(resnet, size)| resnet.folded(g, size)).collect();
        Folded { doublings, ends, convs }
    }

    /// SDXL's addition to the time embedding, [1, 1, P, 4·C] f32, of rows of [`added_input`], [1, 1, P, pooled + 6·time_dim]
    /// f32. Once per prompt; none for models without it.
    pub fn added(&self, g: &mut Graph, input: Tensor) -> Option<Tensor> {
        self.added.as_ref().map(|added| added.forward(g, input))
    }

    /// Channels of [`UNet::added`]'s input; none for models without it.
    pub fn added_input(&self) -> Option<u32> {
        self.added.as_ref().map(|added| added.linear_1.weight.dims[2])
    }

    /// The time projections of all residual blocks at the timesteps of all calls, [R, 1, calls, Σ C] f32: `timesteps`
    /// [calls, given] f32, given 1 or one for each image, `added` [1, 1, P, 4·C] from [`UNet::added`]; R is the more
    /// of `given` and P. Once per run: a call takes its own with [`crate::ops::take::take`].
    pub fn times(&self, g: &mut Graph, timesteps: Tensor, size: [u32; 2], added: Option<Tensor>) -> Tensor {
        self.time.forward(g, timesteps, size, added, self.config.cos_first)
    }

    /// Channels of [`UNet::times`]'s tensor.
    pub fn times_width(&self) -> u32 {
        self.time.projections.weight.dims[3]
    }

    /// x [B / share, h, w, C_in], contexts from [`UNet::context`] with B a multiple of P → [B, h, w, 4] f32. With `mass_of` also the
    /// mid block's mass per key of that many first images.
    ///
    /// # Panics
    /// If prompts share x, but not the rows of time.
    pub fn forward(&self, g: &mut Graph, x: Tensor, ask: &Ask<'_>) -> Output {
        let Ask { time, context, folded, mass_of, mut share } = *ask;
        assert!(share == 1 || time.rows() == 1, "UNet: {share} prompts share x, but time is {:?}", time.dims);
        let time = Some(TimeRows { tensor: time });
        let mut kv = context.iter().copied();
        let mut doublings = folded.doublings.iter().copied();
        let mut ends = folded.ends.iter().copied();
        let mut convs = folded.convs.iter().copied();
        let mut of_next = || convs.next().unwrap_or_default();

        // 1. in
        let mut h = conv2d(g, x, None, &self.conv_in, Taps::same(3), Epilogue::default());
        let mut skips = vec![h];

        // 2. down
        for level in &self.down {
            for (resnet, attention) in &level.layers {
                h = resnet.forward(g, h, None, time, of_next());
                if let Some(attention) = attention {
                    h = attention.forward(g, h, (&mut kv, ends.next().flatten()), None, share).0;
                    skips.iter_mut().for_each(|skip| *skip = repeat(g, *skip, share));
                    share = 1;
                }
                skips.push(h);
            }
            if let Some(conv) = &level.downsample {
                h = conv2d(g, h, None, conv, Taps::half(), Epilogue::default()); // [B, ceil(H/2), ceil(W/2), C]
                skips.push(h);
            }
        }

        // 3. middle
        h = self.mid.first.forward(g, h, None, time, of_next());
        let (mut h, mass) = self.mid.attention.forward(g, h, (&mut kv, ends.next().flatten()), mass_of, share);
        skips.iter_mut().for_each(|skip| *skip = repeat(g, *skip, share));
        h = self.mid.second.forward(g, h, None, time, of_next());

        // 4. up
        for level in &self.up {
            for (resnet, attention) in &level.layers {
                h = resnet.forward(g, h, skips.pop(), time, of_next());
                if let Some(attention) = attention {
                    h = attention.forward(g, h, (&mut kv, ends.next().flatten()), None, 1).0;
                }
            }
            if let (Some(conv), Some(next)) = (&level.upsample, skips.last()) {
                // To the size of the skip that comes next: where the way down rounded up, this is not twice.
                let size = [next.height(), next.width()];
                h = match doublings.next().flatten() {
                    Some(folded) => doubled(g, h, conv, folded, Epilogue::default()),
                    None => conv2d(g, h, None, conv, Taps::resized(size), Epilogue::default()),
                };
            }
        }

        // 5. out
        let h = group_norm(g, h, None, &self.norm_out, self.config.groups as u32, true);
        let sample =
            conv2d(g, h, None, &self.conv_out, Taps::same(3), Epilogue { f32_out: true, ..Default::default() });
        Output { sample, mass }
    }
}

impl Time {
    async fn load(l: &mut Loader<'_>, config: &UNetConfig, slots: &TimeSlots) -> Result<Time> {
        let width = config.levels[0].channels;
        let hidden = 4 * width;
        let names: Vec<String> = slots.names.iter().map(|name| format!("{name}.time_emb_proj")).collect();
        let mut projections = l.fused(&names, hidden, &slots.widths, false).await?;
        let both = |weights: &Weights| {
            let mut bias = Vec::new();
            for (name, &width) in slots.names.iter().zip(&slots.widths) {
                let own = weights.finite(&format!("{name}.time_emb_proj.bias"), &[width])?;
                let conv = weights.finite(&format!("{name}.conv1.bias"), &[width])?;
                bias.extend(own.iter().zip(&conv).map(|(a, b)| a + b));
            }
            Ok(bias)
        };
        projections.bias = Some(l.values("time projections", slots.widths.iter().sum(), both).await?);
        let half = width / 2;
        let table = |_: &Weights| Ok(frequencies(half as u32, config.freq_shift));
        Ok(Time {
            frequencies: l.values("frequencies", half, table).await?,
            linear_1: l.linear("time_embedding.linear_1", width, hidden, true).await?,
            linear_2: l.linear("time_embedding.linear_2", hidden, hidden, true).await?,
            projections,
        })
    }

    /// See [`UNet::times`].
    fn forward(
        &self,
        g: &mut Graph,
        timesteps: Tensor,
        [calls, given]: [u32; 2],
        added: Option<Tensor>,
        cos_first: bool,
    ) -> Tensor {
        let silu = Epilogue { activation: Activation::Silu, f32_out: true, ..Default::default() };
        let out = given.max(added.map_or(1, |added| added.rows()));
        let rows = Rows { calls, given, out };
        let h = time_embedding(g, timesteps, &self.frequencies, rows, cos_first);
        let h = matmul(g, h, &self.linear_1, silu);
        // Every block begins with SiLU of the embedding: once, here.
        let bias_rows = added.map(|tensor| BiasRows { tensor, offset: 0, rows: h.rows() / tensor.rows() });
        let h = matmul(g, h, &self.linear_2, Epilogue { bias_rows, ..silu });
        matmul(g, h, &self.projections, Epilogue { f32_out: true, ..Default::default() })
    }
}

impl Added {
    async fn load(l: &mut Loader<'_>, config: &UNetConfig) -> Result<Option<Added>> {
        let Some(added) = config.added else { return Ok(None) };
        let hidden = 4 * config.levels[0].channels;
        let mut linear_2 = l.linear("add_embedding.linear_2", hidden, hidden, false).await?;
        let both = |weights: &Weights| {
            let own = weights.finite("add_embedding.linear_2.bias", &[hidden])?;
            let time = weights.finite("time_embedding.linear_2.bias", &[hidden])?;
            Ok(own.iter().zip(&time).map(|(a, b)| a + b).collect())
        };
        linear_2.bias = Some(l.values("added embedding", hidden, both).await?);
        Ok(Some(Added { linear_1: l.linear("add_embedding.linear_1", added.input, hidden, true).await?, linear_2 }))
    }

    fn forward(&self, g: &mut Graph, input: Tensor) -> Tensor {
        let silu = Epilogue { activation: Activation::Silu, f32_out: true, ..Default::default() };
        let h = matmul(g, input, &self.linear_1, silu);
        matmul(g, h, &self.linear_2, Epilogue { f32_out: true, ..Default::default() })
    }
}

/// One row of what [`UNet::added`] takes: the pooled text, then the sinusoids (cosines first) of each size, as diffusers'
/// `text_time` embedding orders them. `time_dim` numbers a size.
pub fn added_input(text: &[f32], sizes: &[f32], time_dim: usize) -> Vec<f32> {
    let half = time_dim / 2;
    let table = frequencies(half as u32, 0.0);
    let angle = |size: f32, i: usize| f64::from(size) * f64::from(table[i]);
    let mut row = text.to_vec();
    for &size in sizes {
        row.extend((0..half).map(|i| angle(size, i).cos() as f32));
        row.extend((0..half).map(|i| angle(size, i).sin() as f32));
    }
    row
}
