//! One part of the pipeline on given tensors, so that anyone can hold a part against PyTorch. Tensors cross this border in
//! f32 and PyTorch's layout [B, C, H, W].

use crate::checkpoint::{Checkpoint, TextPart};
use crate::conditioning::{Encoder as TextEncoder, encode};
use crate::denoiser::Step;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, DType, Gpu, Graph, Tensor};
use crate::layout::{to_nchw, to_nhwc};
use crate::model::clip::{Clip, Read, Row};
use crate::model::config::{SIZES, VaeConfig};
use crate::model::unet::{Ask, UNet, added_input};
use crate::model::vae::{Decoder, Encoder};
use crate::ops::degrade::{RADIUS, blur_weights, degrade, mask_stride};
use crate::ops::pack::pack;
use crate::parts::{Mode, activation_type, load_clip, load_decoder, load_encoder, load_unet};
use crate::pipeline::run_once;
use crate::request::Precision;
use crate::schedule::{scheduler, sigmas};
use crate::text::{Embeddings, Style, Token, chunks};

/// A tensor on the host, in PyTorch's layout.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// As PyTorch prints it.
    pub shape: Vec<usize>,
    /// Row-major.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// A tensor of that shape.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "{shape:?}");
        HostTensor { shape, data }
    }

    /// [B, C, H, W] with `channels` channels (any, if `None`).
    fn image(&self, what: &str, channels: Option<usize>) -> Result<[usize; 4]> {
        match self.shape[..] {
            [b, c, h, w] if b * c * h * w > 0 && channels.is_none_or(|n| n == c) => Ok([b, c, h, w]),
            _ => {
                let c = channels.map_or("C".into(), |n| n.to_string());
                Err(Error::invalid(what, format!("[B, {c}, H, W]"), format!("{:?}", self.shape)))
            }
        }
    }

    /// As [B, H, W, C] with the channels padded by zeros to a multiple of four.
    fn to_padded_nhwc(&self, [b, c, h, w]: [usize; 4]) -> Vec<f32> {
        let padded = c.next_multiple_of(4);
        let mut out = vec![0.0; b * h * w * padded];
        for (pixel, values) in out.chunks_exact_mut(padded).zip(to_nhwc(&self.data, [b, c, h, w]).chunks_exact(c)) {
            pixel[..c].copy_from_slice(values);
        }
        out
    }
}

/// A prompt's ids, one row of 77 for each chunk, as the first text encoder gets them; none where an embedding stands.
///
/// # Errors
/// Of the model's files, or of the prompt.
pub fn tokens(
    model: &Checkpoint,
    embeddings: &Embeddings,
    prompt: &str,
    style: Style,
) -> Result<Vec<Vec<Option<u32>>>> {
    let id = |token: &Token| match token {
        Token::Id(id) => Some(*id),
        Token::Embedding { .. } => None,
    };
    let chunks = chunks(&model.texts()?[0].tokenizer, embeddings, prompt, style)?;
    Ok(chunks.iter().map(|chunk| chunk.tokens.iter().map(|(token, _)| id(token)).collect()).collect())
}

/// How a prompt is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// What weights mean.
    pub style: Style,
    /// Which layer is read, counted from the last; the model's own if `None`.
    pub clip_skip: Option<u32>,
}

/// A prompt to (`hidden_states` [1, 77·k, D] as the UNet receives it, `pooled` [1, D']).
///
/// # Errors
/// Of the model's files, of the prompt, or of the device.
pub async fn clip(
    gpu: &Gpu,
    model: &Checkpoint,
    embeddings: &Embeddings,
    prompt: &str,
    reading: Reading,
) -> Result<(HostTensor, HostTensor)> {
    let mut clips = Vec::new();
    for text in model.texts()? {
        clips.push(load_clip(gpu, text, Mode::Load).await?.0);
    }
    let projected = model.unet.config.added.is_some();
    let read = |text: &TextPart| Read {
        skip: reading.clip_skip.map_or(text.skip, |skip| skip as usize),
        normed: text.normed,
        last: projected,
    };
    let pairs = model.texts()?.iter().zip(&clips);
    let encoders: Vec<TextEncoder<'_>> =
        pairs.map(|(text, clip)| TextEncoder { clip, tokenizer: &text.tokenizer, read: read(text) }).collect();
    let made = encode(gpu, &encoders, embeddings, &[prompt], reading.style, None).await?;
    let pooled = HostTensor::new([1, made.pooled.len()], made.pooled);
    Ok((HostTensor::new([1, made.tokens, made.width], made.hidden), pooled))
}

/// Ids (P · 77) to (`hidden_states` [P, 77, D] after the last norm, `pooled` [P, D]).
///
/// # Errors
/// [`Error::Invalid`] for an id that is not in the vocabulary; of the device.
pub async fn clip_ids(gpu: &Gpu, clip: &Clip, ids: &[u32]) -> Result<(HostTensor, HostTensor)> {
    let (d, length) = (clip.config.hidden_size, clip.config.max_position_embeddings);
    let prompts = ids.len() / length;
    let embeddings = gpu.upload("embeddings", &clip.embed(ids.iter().map(|&id| Row::Id(id)))?).await?;
    let mut g = Graph::new(gpu, DType::F32);
    let x = g.bind("embeddings", &embeddings, [prompts as u32, 1, length as u32, d as u32], DType::F32);
    let (hidden, _) = clip.forward(&mut g, x, Read::LAST);
    let out = gpu.storage("hidden states", hidden.bytes()).await?;
    g.keep(hidden, &out);
    run_once(gpu, g, &Step::default(), None).await?;
    let hidden: Vec<f32> = out.read(hidden.len() as usize).await?;
    let mut pooled = Vec::new();
    for (prompt, states) in ids.chunks_exact(length).zip(hidden.chunks_exact(length * d)) {
        pooled.extend_from_slice(&states[clip.pooled_position(prompt) * d..][..d]);
    }
    Ok((HostTensor::new([prompts, length, d], hidden), HostTensor::new([prompts, d], pooled)))
}

/// What the UNet is asked.
pub struct UNetInput {
    /// [B, C_in, h, w]
    pub sample: HostTensor,
    /// [B] or [1]
    pub timestep: HostTensor,
    /// [B, S, D]
    pub encoder_hidden_states: HostTensor,
    /// SDXL: `text_embeds` [B, pooled] and `time_ids` [B, 6].
    pub added: Option<(HostTensor, HostTensor)>,
}

/// The UNet of a model: `sample` [B, 4, h, w], and with `sag_map` also `mass` [B, T_mid].
///
/// # Errors
/// [`Error::Invalid`] for a tensor of the wrong shape; of the files; of the device.
pub async fn unet(
    gpu: &Gpu,
    model: &Checkpoint,
    precision: Precision,
    input: &UNetInput,
    sag_map: bool,
) -> Result<(HostTensor, Option<HostTensor>)> {
    let dtype = activation_type(gpu, precision)?;
    let (unet, _) = load_unet(gpu, model, dtype, Mode::Load).await?;
    run_unet(gpu, &unet, dtype, input, sag_map).await
}

/// SDXL's rows for [`UNet::added`], [B, pooled + sinusoids].
fn added_rows(unet: &UNet, input: &UNetInput, batch: usize) -> Result<Vec<f32>> {
    let Some(config) = unet.config.added else {
        return match input.added {
            None => Ok(vec![]),
            Some(_) => Err(Error::invalid("text_embeds", "none for this model", "some")),
        };
    };
    let Some((text, ids)) = &input.added else {
        return Err(Error::invalid("text_embeds and time_ids", "both, for this model", "neither"));
    };
    let (pooled, time_dim) = (config.pooled(), config.time_dim);
    for (what, tensor, width) in [("text_embeds", text, pooled), ("time_ids", ids, SIZES)] {
        if tensor.shape[..] != [batch, width] {
            return Err(Error::invalid(what, format!("[{batch}, {width}]"), format!("{:?}", tensor.shape)));
        }
    }
    let rows = text.data.chunks_exact(pooled).zip(ids.data.chunks_exact(SIZES));
    Ok(rows.flat_map(|(text, sizes)| added_input(text, sizes, time_dim)).collect())
}

/// [`unet`] on a loaded UNet with activations of `dtype`.
///
/// # Errors
/// As [`unet`].
pub async fn run_unet(
    gpu: &Gpu,
    unet: &UNet,
    dtype: DType,
    input: &UNetInput,
    sag_map: bool,
) -> Result<(HostTensor, Option<HostTensor>)> {
    let config = &unet.config;
    let shape = input.sample.image("sample", Some(config.in_channels))?;
    let [b, c, h, w] = shape;
    let rows = match input.timestep.shape[..] {
        [] => 1,
        [n] if n == 1 || n == b => n,
        _ => return Err(Error::invalid("timestep", format!("[1] or [{b}]"), format!("{:?}", input.timestep.shape))),
    };
    let s = match input.encoder_hidden_states.shape[..] {
        [n, s, d] if n == b && s > 0 && d == config.cross_dim => s,
        _ => {
            let found = format!("{:?}", input.encoder_hidden_states.shape);
            return Err(Error::invalid("encoder_hidden_states", format!("[{b}, S, {}]", config.cross_dim), found));
        }
    };
    let dims = |n: [usize; 4]| n.map(|n| n as u32);
    let added = added_rows(unet, input, b)?;
    let added = match added.is_empty() {
        true => None,
        false => {
            let rows = gpu.upload("added rows", &added).await?;
            let mut g = Graph::new(gpu, DType::F32);
            let x = g.bind("added rows", &rows, dims([1, 1, b, added.len() / b]), DType::F32);
            run_kept(gpu, g, |g| unet.added(g, x)).await?
        }
    };
    let x = gpu.upload("sample", &input.sample.to_padded_nhwc(shape)).await?;
    let t = gpu.upload("timestep", &input.timestep.data).await?;
    let time = {
        let mut g = Graph::new(gpu, DType::F32);
        let t = g.bind("timestep", &t, dims([1, 1, 1, rows.next_multiple_of(4)]), DType::F32);
        let added = added.map(|(buffer, dims)| g.bind("added", &buffer, dims, DType::F32));
        run_kept(gpu, g, |g| Some(unet.times(g, t, [1, rows as u32], added))).await?
    };
    let e = gpu.upload("context", &input.encoder_hidden_states.data).await?;
    let mut g = Graph::new(gpu, dtype);
    let x = g.bind("sample", &x, dims([b, h, w, c.next_multiple_of(4)]), DType::F32);
    let x = pack(&mut g, x, None, 1);
    let e = g.bind("context", &e, dims([b, 1, s, config.cross_dim]), DType::F32);
    let Some((time, [rows, ..])) = time else { unreachable!("a UNet has time projections") };
    let time = g.bind("times", &time, [1, 1, rows, unet.times_width()], DType::F32);
    let context = unet.context(&mut g, e);
    let mass_of = sag_map.then_some(b as u32);
    let folded = unet.folded(&mut g, [x.height(), x.width()]);
    let ask = Ask { time, context: &context, folded: &folded, mass_of, share: 1 };
    let out = unet.forward(&mut g, x, &ask);
    let sample = gpu.storage("sample", out.sample.bytes()).await?;
    g.keep(out.sample, &sample);
    let mass = match out.mass {
        None => None,
        Some(mass) => {
            let buffer = gpu.storage("mass", mass.bytes()).await?;
            g.keep(mass, &buffer);
            Some(buffer)
        }
    };
    run_once(gpu, g, &Step { c_in: 1.0, ..Default::default() }, None).await?;
    let c_out = config.out_channels;
    let sample = unpad(&sample.read(out.sample.len() as usize).await?, [b, c_out, h, w]);
    let mass = match mass {
        None => None,
        Some(buffer) => {
            let [mid_h, mid_w] = config.mid_size(h as u32, w as u32).map(|n| n as usize);
            Some(HostTensor::new([b, mid_h * mid_w], buffer.read(b * mid_h * mid_w).await?))
        }
    };
    Ok((sample, mass))
}

/// Run what `record` records; its result stays on the device, with its dims.
async fn run_kept(
    gpu: &Gpu,
    mut g: Graph,
    record: impl FnOnce(&mut Graph) -> Option<Tensor>,
) -> Result<Option<(Buffer, [u32; 4])>> {
    let Some(out) = record(&mut g) else { return Ok(None) };
    let buffer = gpu.storage("result", out.bytes()).await?;
    g.keep(out, &buffer);
    run_once(gpu, g, &Step::default(), None).await?;
    Ok(Some((buffer, out.dims)))
}

/// [B, H, W, C padded] → [B, C, H, W].
fn unpad(data: &[f32], [b, c, h, w]: [usize; 4]) -> HostTensor {
    let cut: Vec<f32> = data.chunks_exact(c.next_multiple_of(4)).flat_map(|pixel| pixel[..c].to_vec()).collect();
    HostTensor::new([b, c, h, w], to_nchw(&cut, [b, c, h, w]))
}

/// The VAE's decoder: `sample` [B, 4, h, w], unscaled, to [B, 3, H, W].
///
/// # Errors
/// As [`unet`].
pub async fn vae_decode(
    gpu: &Gpu,
    model: &Checkpoint,
    precision: Precision,
    sample: &HostTensor,
) -> Result<HostTensor> {
    let (decoder, _) = load_decoder(gpu, model, activation_type(gpu, precision)?, Mode::Load).await?;
    run_decoder(gpu, &decoder, &model.vae()?.config, sample).await
}

/// [`vae_decode`] on a loaded decoder.
///
/// # Errors
/// As [`unet`].
pub async fn run_decoder(gpu: &Gpu, decoder: &Decoder, config: &VaeConfig, sample: &HostTensor) -> Result<HostTensor> {
    let shape = sample.image("sample", Some(config.latent_channels))?;
    let out = run_image(gpu, sample, shape, |g, z| decoder.forward(g, z)).await?;
    let f = config.factor() as usize;
    Ok(unpad(&out, [shape[0], config.out_channels, shape[2] * f, shape[3] * f]))
}

/// The VAE's encoder: `sample` [B, 3, H, W] in -1 .. 1 to (`mean`, `logvar`) [B, 4, h, w], unscaled.
///
/// # Errors
/// As [`unet`].
pub async fn vae_encode(gpu: &Gpu, model: &Checkpoint, sample: &HostTensor) -> Result<(HostTensor, HostTensor)> {
    let (encoder, _) = load_encoder(gpu, model, Mode::Load).await?;
    run_encoder(gpu, &encoder, &model.vae()?.config, sample).await
}

/// [`vae_encode`] on a loaded encoder. Log variances are clamped to -30 .. 20, as diffusers' distribution does.
///
/// # Errors
/// As [`unet`]; [`Error::Invalid`] if the picture is smaller than one latent pixel.
pub async fn run_encoder(
    gpu: &Gpu,
    encoder: &Encoder,
    config: &VaeConfig,
    sample: &HostTensor,
) -> Result<(HostTensor, HostTensor)> {
    let shape = sample.image("sample", Some(config.in_channels))?;
    let f = config.factor() as usize;
    if shape[2] < f || shape[3] < f {
        return Err(Error::invalid("sample", format!("at least {f} x {f} pixels"), format!("{:?}", sample.shape)));
    }
    let out = run_image(gpu, sample, shape, |g, x| encoder.forward(g, x)).await?;
    let z = config.latent_channels;
    let latent = [shape[0], 2 * z, shape[2] / f, shape[3] / f];
    let moments = unpad(&out, latent);
    let half = |second: usize| -> Vec<f32> {
        let of = |image: &[f32]| image[second * image.len() / 2..][..image.len() / 2].to_vec();
        moments.data.chunks_exact(2 * z * latent[2] * latent[3]).flat_map(of).collect()
    };
    let shape = [latent[0], z, latent[2], latent[3]];
    let logvar = half(1).into_iter().map(|v| v.clamp(-30.0, 20.0)).collect();
    Ok((HostTensor::new(shape, half(0)), HostTensor::new(shape, logvar)))
}

async fn run_image(
    gpu: &Gpu,
    sample: &HostTensor,
    shape: [usize; 4],
    network: impl FnOnce(&mut Graph, crate::gpu::Tensor) -> crate::gpu::Tensor,
) -> Result<Vec<f32>> {
    let [b, c, h, w] = shape;
    let x = gpu.upload("sample", &sample.to_padded_nhwc(shape)).await?;
    let mut g = Graph::new(gpu, DType::F32);
    let x = g.bind("sample", &x, [b, h, w, c.next_multiple_of(4)].map(|n| n as u32), DType::F32);
    let out = network(&mut g, x);
    let buffer = gpu.storage("result", out.bytes()).await?;
    g.keep(out, &buffer);
    run_once(gpu, g, &Step::default(), None).await?;
    buffer.read(out.len() as usize).await
}

/// A schedule: sigmas, and the timestep of each but the last 0.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ScheduleOut {
    /// Descending, the last 0.
    pub sigmas: Vec<f32>,
    /// Of each sigma above 0.
    pub timesteps: Vec<f32>,
}

/// The sigmas and timesteps of a run.
///
/// # Errors
/// [`Error::Invalid`] for an unknown scheduler or numbers out of range.
pub fn schedule(model: &Checkpoint, name: &str, steps: usize, denoise: f32) -> Result<ScheduleOut> {
    let (schedule, _) = model.schedule();
    let sigmas = sigmas(&schedule, scheduler(name)?, steps, denoise)?;
    let timesteps = sigmas.iter().filter(|&&sigma| sigma > 0.0).map(|&sigma| schedule.timestep(sigma)).collect();
    Ok(ScheduleOut { sigmas, timesteps })
}

/// SAG's degraded picture: (`degraded` [B, 4, h, w], `mask` [B, 1, h, w]) of `denoised` [B, 4, h, w] and `mass` [B, T] on a grid
/// of `mid` = [H, W].
///
/// # Errors
/// [`Error::Invalid`] for shapes or numbers that do not fit; of the device.
pub async fn degraded(
    gpu: &Gpu,
    denoised: &HostTensor,
    mass: &HostTensor,
    mid: [u32; 2],
    sigma: f32,
    threshold: f32,
) -> Result<(HostTensor, HostTensor)> {
    let shape = denoised.image("denoised", Some(4))?;
    let [b, _, h, w] = shape;
    let tokens = (mid[0] as usize).saturating_mul(mid[1] as usize);
    if tokens == 0 || mass.shape[..] != [b, tokens] {
        return Err(Error::invalid(
            "mass",
            format!("[{b}, {tokens}] for --mid {},{}", mid[0], mid[1]),
            format!("{:?}", mass.shape),
        ));
    }
    if h.min(w) <= RADIUS as usize {
        return Err(Error::invalid(
            "denoised",
            format!("more than {RADIUS} latent pixels a side"),
            format!("{h} x {w}"),
        ));
    }
    if !(sigma.is_finite() && sigma >= 0.0) {
        return Err(Error::invalid("blur-sigma", "a number of at least 0", sigma));
    }
    if threshold.is_nan() {
        return Err(Error::invalid("threshold", "a number", threshold));
    }
    let x = gpu.upload("denoised", &to_nhwc(&denoised.data, shape)).await?;
    let m = gpu.upload("mass", &mass.data).await?;
    let stride = mask_stride(h as u32, w as u32);
    let mask = gpu.storage("mask", u64::from(b as u32 * stride) * 4).await?;
    let mut g = Graph::new(gpu, DType::F32);
    let x = g.bind("denoised", &x, [b, h, w, 4].map(|n| n as u32), DType::F32);
    let m = g.bind("mass", &m, [1, 1, 1, (m.bytes() / 4) as u32], DType::F32);
    let bound = g.bind("mask", &mask, [1, 1, 1, b as u32 * stride], DType::F32);
    let (out, _) = degrade(&mut g, x, x, m, mid, bound);
    let buffer = gpu.storage("degraded", out.bytes()).await?;
    g.keep(out, &buffer);
    // denoised = 1 x + 0 output: x is the denoised picture already.
    let step = Step { c_skip: 1.0, c_out: 0.0, threshold, blur: blur_weights(sigma), ..Default::default() };
    run_once(gpu, g, &step, None).await?;
    let out = to_nchw(&buffer.read::<f32>(out.len() as usize).await?, shape);
    let rows: Vec<f32> = mask.read(b * stride as usize).await?;
    let mask = rows.chunks_exact(stride as usize).flat_map(|image| image[..h * w].to_vec()).collect();
    Ok((HostTensor::new(shape, out), HostTensor::new([b, 1, h, w], mask)))
}
