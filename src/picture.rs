//! Latents to pictures and back through the VAE: whole, or in tiles where the device cannot hold the whole.
//!
//! The VAE's levels near the latents, with its attention, always see the whole picture: they are small. Near the pixels only
//! convolutions and group norms are left. Tiles there get a margin as wide as the convolutions reach, and all have the whole
//! picture's statistics, which passes over the tiles find for one norm after the other: the result is that of the whole, to
//! rounding, for about half as many times the work as there are norms in the tiles.

use std::ops::ControlFlow;

use crate::denoiser::Step;
use crate::error::{Error, Result};
use crate::gpu::run::Profile;
use crate::gpu::{Buffer, DType, Gpu, Graph, Program, Statistics, Tensor, Tile};
use crate::image::Image;
use crate::model::config::VaeConfig;
use crate::model::vae::{Decoder, Encoder};
use crate::ops::pack::pack;
use crate::pipeline::run_once;
use crate::request::Progress;

/// How a picture is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Tiling {
    /// Levels of the VAE, counted from the latents, that see the whole picture.
    pub whole: usize,
    /// Side of a tile in pixels, without its margin.
    pub tile: u32,
    /// Do the tiles stay on the device while the norms' statistics are found? Faster, where there is room.
    pub held: bool,
}

/// Pixels of the smallest tile.
const SMALLEST: u32 = 64;

/// Pixels, at the resolution where tiles are cut nearest to the latents, that a tile sees beyond its own.
const MARGIN: u32 = 16;

/// A tile along one axis, in units of the side where it is cut: what it sees, and which part of that is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    from: u32,
    to: u32,
    own_from: u32,
    own_to: u32,
}

/// `size` cut into tiles of at most `tile`, each seeing `margin` more on either side as far as there is any.
fn spans(size: u32, tile: u32, margin: u32) -> Vec<Span> {
    let count = size.div_ceil(tile.max(1));
    let edge = |i: u32| (u64::from(size) * u64::from(i) / u64::from(count)) as u32;
    let span = |i: u32| {
        let (own_from, own_to) = (edge(i), edge(i + 1));
        Span { from: own_from.saturating_sub(margin), to: (own_to + margin).min(size), own_from, own_to }
    };
    (0..count).map(span).collect()
}

impl Span {
    /// All of an axis, which is its own.
    fn whole(size: u32) -> Span {
        Span { from: 0, to: size, own_from: 0, own_to: size }
    }

    /// In units `align` times smaller, cut at `size`.
    fn scaled(self, align: u32, size: u32) -> Span {
        let at = |n: u32| (n * align).min(size);
        Span { from: at(self.from), to: at(self.to), own_from: at(self.own_from), own_to: at(self.own_to) }
    }

    /// Its own part, counted from where it begins.
    fn own(self) -> [u32; 2] {
        [self.own_from - self.from, self.own_to - self.from]
    }
}

/// An image on the host, [h, w, c].
struct Plane {
    h: u32,
    w: u32,
    c: u32,
    data: Vec<f32>,
}

impl Plane {
    fn zeros(h: u32, w: u32, c: u32) -> Plane {
        Plane { h, w, c, data: vec![0.0; (h * w * c) as usize] }
    }

    /// Rows `y` and columns `x`.
    fn cut(&self, y: Span, x: Span) -> Plane {
        let mut out = Plane { h: y.to - y.from, w: x.to - x.from, c: self.c, data: Vec::new() };
        for row in y.from..y.to {
            let at = ((row * self.w + x.from) * self.c) as usize;
            out.data.extend_from_slice(&self.data[at..at + (out.w * self.c) as usize]);
        }
        out
    }

    /// Put the part of `tile` that is its own, both scaled by `up / down`, where it belongs.
    fn paste(&mut self, tile: &Plane, y: Span, x: Span, up: u32, down: u32) {
        let scale = |n: u32| n * up / down;
        let width = ((scale(x.own_to) - scale(x.own_from)) * self.c) as usize;
        for row in scale(y.own_from)..scale(y.own_to) {
            let from = (((row - scale(y.from)) * tile.w + scale(x.own_from) - scale(x.from)) * self.c) as usize;
            let to = ((row * self.w + scale(x.own_from)) * self.c) as usize;
            self.data[to..to + width].copy_from_slice(&tile.data[from..from + width]);
        }
    }
}

/// A network, or a part of one, on one image [1, h, w, C].
type Network<'a> = &'a dyn Fn(&mut Graph, Tensor) -> Tensor;

/// Mean and squared deviations of each channel, and how many pixels they are of: pooled over tiles (Chan et al. 1979).
struct Pooled {
    pixels: u32,
    /// [C] each, f64: a picture has millions of pixels.
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Pooled {
    fn new(channels: usize) -> Pooled {
        Pooled { pixels: 0, mean: vec![0.0; channels], squares: vec![0.0; channels] }
    }

    /// Add the chunks of a tile's norm, [chunks, C/4, 2, 4].
    fn add(&mut self, sums: &[f32], pixels: u32, chunk: u32) {
        let channels = self.mean.len();
        for (i, of_chunk) in sums.chunks_exact(channels * 2).enumerate() {
            let n = chunk.min(pixels - i as u32 * chunk);
            let total = f64::from(self.pixels + n);
            for c in 0..channels {
                let at = c / 4 * 8 + c % 4;
                let delta = f64::from(of_chunk[at]) - self.mean[c];
                self.mean[c] += delta * f64::from(n) / total;
                self.squares[c] +=
                    f64::from(of_chunk[at + 4]) + delta * delta * f64::from(self.pixels) * f64::from(n) / total;
            }
            self.pixels += n;
        }
    }

    /// As one chunk's sums, [1, C/4, 2, 4].
    fn sums(&self) -> Vec<f32> {
        let group = |c: usize| [&self.mean[c..c + 4], &self.squares[c..c + 4]].concat();
        (0..self.mean.len()).step_by(4).flat_map(group).map(|v| v as f32).collect()
    }
}

/// A tile and where its numbers are: on the device between the passes, or brought there for each.
struct Piece {
    y: Span,
    x: Span,
    held: Option<Buffer>,
}

impl Piece {
    async fn buffer(&self, gpu: &Gpu, image: &Plane) -> Result<Buffer> {
        match &self.held {
            Some(buffer) => Ok(buffer.clone()),
            None => gpu.upload("image", &image.cut(self.y, self.x).data).await,
        }
    }

    /// A recording that begins with this tile.
    fn start(&self, gpu: &Gpu, c: u32, buffer: &Buffer, given: &[(Buffer, u32)]) -> (Graph, Tensor) {
        let mut g = Graph::new(gpu, DType::F32);
        let size = [self.y.to - self.y.from, self.x.to - self.x.from];
        let image = g.bind("image", buffer, [1, size[0], size[1], c], DType::F32);
        let mut known = std::collections::VecDeque::new();
        for (buffer, pixels) in given {
            let c4 = (buffer.bytes() / 32) as u32;
            known.push_back((g.bind("group norm sums", buffer, [1, 1, c4, 8], DType::F32), *pixels));
        }
        g.statistics = Statistics::Tile(Tile { given: known, size, own: [self.y.own(), self.x.own()], next: None });
        (g, image)
    }
}

/// Run a network on one image.
async fn run(gpu: &Gpu, image: &Plane, network: Network<'_>) -> Result<Plane> {
    run_piece(gpu, image, &Piece { y: Span::whole(image.h), x: Span::whole(image.w), held: None }, network, &[]).await
}

/// Run a network on a tile, its norms' statistics given.
async fn run_piece(
    gpu: &Gpu,
    image: &Plane,
    piece: &Piece,
    network: Network<'_>,
    given: &[(Buffer, u32)],
) -> Result<Plane> {
    let buffer = piece.buffer(gpu, image).await?;
    let (mut g, x) = piece.start(gpu, image.c, &buffer, given);
    let out = network(&mut g, x);
    let result = gpu.storage("result", out.bytes()).await?;
    g.keep(out, &result);
    run_once(gpu, g, &Step { c_in: 1.0, ..Default::default() }, None).await?;
    drop(buffer);
    let data = result.read(out.len() as usize).await?;
    Ok(Plane { h: out.height(), w: out.width(), c: out.channels(), data })
}

/// The sums of the first norm that is not given, of a tile's own part: (sums, pixels, pixels of a chunk); none if all are given.
async fn next_sums(
    gpu: &Gpu,
    image: &Plane,
    piece: &Piece,
    network: Network<'_>,
    given: &[(Buffer, u32)],
) -> Result<Option<(Vec<f32>, u32, u32)>> {
    let buffer = piece.buffer(gpu, image).await?;
    let (mut g, x) = piece.start(gpu, image.c, &buffer, given);
    network(&mut g, x);
    let Statistics::Tile(Tile { next: Some(sums), .. }) = std::mem::take(&mut g.statistics) else { return Ok(None) };
    // What follows needs these sums of all tiles first.
    g.truncate(sums.nodes);
    let result = gpu.storage("group norm sums", sums.tensor.bytes()).await?;
    g.keep(sums.tensor, &result);
    run_once(gpu, g, &Step { c_in: 1.0, ..Default::default() }, None).await?;
    Ok(Some((result.read(sums.tensor.len() as usize).await?, sums.pixels, sums.chunk)))
}

/// Where and how tiles are cut.
struct Cut {
    /// Side of a tile without its margins, and how far beyond it sees.
    tile: u32,
    margin: u32,
    /// Edges are multiples of this.
    align: u32,
    /// The result's side for one of the image's, up / down.
    up: u32,
    down: u32,
    /// Do the tiles stay on the device between the passes?
    held: bool,
}

/// Run the part of a network that sees no further than the margin on an image in tiles.
async fn tiled(gpu: &Gpu, image: Plane, network: Network<'_>, cut: &Cut) -> Result<Plane> {
    let &Cut { tile, margin, align, up, down, held } = cut;
    let along = |size: u32| -> Vec<Span> {
        let all = spans(size.div_ceil(align), (tile / align).max(1), margin.div_ceil(align));
        all.into_iter().map(|span| span.scaled(align, size)).collect()
    };
    let mut pieces = Vec::new();
    for y in along(image.h) {
        for x in along(image.w) {
            let mut piece = Piece { y, x, held: None };
            if held {
                piece.held = Some(piece.buffer(gpu, &image).await?);
            }
            pieces.push(piece);
        }
    }
    // The statistics of one norm after the other: each is exact, since those before it are.
    let mut given: Vec<(Buffer, u32)> = Vec::new();
    loop {
        let mut pooled: Option<Pooled> = None;
        for piece in &pieces {
            let Some((sums, pixels, chunk)) = next_sums(gpu, &image, piece, network, &given).await? else { break };
            let chunks = pixels.div_ceil(chunk) as usize;
            pooled.get_or_insert_with(|| Pooled::new(sums.len() / chunks / 2)).add(&sums, pixels, chunk);
        }
        let Some(norm) = pooled else { break };
        given.push((gpu.upload("group norm sums", &norm.sums()).await?, norm.pixels));
    }
    let mut out: Option<Plane> = None;
    for piece in &pieces {
        let made = run_piece(gpu, &image, piece, network, &given).await?;
        let out = out.get_or_insert_with(|| Plane::zeros(image.h * up / down, image.w * up / down, made.c));
        out.paste(&made, piece.y, piece.x, up, down);
    }
    match out {
        Some(out) => Ok(out),
        None => unreachable!("an image has a tile"),
    }
}

/// Final latents [B, h, w, 4] in the UNet's scale to pictures.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::Invalid`] for pictures that are not finite; of the device.
#[allow(clippy::too_many_arguments)] // Each is another thing, and both callers have them all at hand.
pub(crate) async fn decode(
    gpu: &Gpu,
    decoder: &Decoder,
    config: &VaeConfig,
    latents: &[f32],
    [batch, h, w]: [u32; 3],
    tiling: Option<Tiling>,
    mut profile: Option<&mut Profile>,
    observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Vec<Image>> {
    let c = config.latent_channels as u32;
    let whole = match tiling {
        Some(_) => None,
        None => Some(Whole::new(gpu, decoder, config, [h, w]).await?),
    };
    let mut images = Vec::new();
    for (i, latent) in latents.chunks_exact((h * w * c) as usize).enumerate() {
        let picture = match (&whole, tiling) {
            (Some(whole), _) => {
                whole.latent.write(latent);
                whole.run(gpu, profile.as_deref_mut()).await?
            }
            (None, tiling) => {
                let scaled = latent.iter().map(|v| v / config.scaling_factor).collect();
                let z = Plane { h, w, c, data: scaled };
                decode_tiled(gpu, decoder, &z, tiling.unwrap_or(Tiling { whole: 0, tile: 512, held: false })).await?
            }
        };
        images.push(Image::from_nhwc(&picture.data, picture.w, picture.h, 4)?);
        if observe(Progress::Decoded { done: i as u32 + 1, batch }).is_break() {
            return Err(Error::Cancelled);
        }
    }
    Ok(images)
}

/// The decoder for whole pictures, ready to run.
struct Whole {
    latent: Buffer,
    program: Program,
    scalars: crate::gpu::run::Steps,
    pixels: Buffer,
    picture: Tensor,
}

impl Whole {
    async fn new(gpu: &Gpu, decoder: &Decoder, config: &VaeConfig, [h, w]: [u32; 2]) -> Result<Whole> {
        let c = config.latent_channels as u32;
        let latent = gpu.storage("latent", u64::from(h * w * c) * 4).await?;
        let mut g = Graph::new(gpu, DType::F32);
        let bound = g.bind("latent", &latent, [1, h, w, c], DType::F32);
        let packed = pack(&mut g, bound, None, 1);
        let picture = decoder.forward(&mut g, packed);
        let pixels = gpu.storage("picture", picture.bytes()).await?;
        g.keep(picture, &pixels);
        let program = Program::new(gpu, g).await?;
        let scalars = gpu.steps(&[Step { c_in: 1.0 / config.scaling_factor, ..Default::default() }]).await?;
        Ok(Whole { latent, program, scalars, pixels, picture })
    }

    async fn run(&self, gpu: &Gpu, profile: Option<&mut Profile>) -> Result<Plane> {
        let mut step = gpu.record(profile.is_some());
        step.run(&self.program, &[], &self.scalars, 0);
        step.submit(profile).await?;
        let data = self.pixels.read(self.picture.len() as usize).await?;
        Ok(Plane { h: self.picture.height(), w: self.picture.width(), c: self.picture.channels(), data })
    }
}

/// Unscaled latents to a picture in tiles.
async fn decode_tiled(gpu: &Gpu, decoder: &Decoder, z: &Plane, tiling: Tiling) -> Result<Plane> {
    let levels = tiling.whole;
    let h = run(gpu, z, &|g, z| decoder.head(g, z, levels)).await?;
    let up = 1 << (decoder.levels() - 1 - levels);
    let tail = |g: &mut Graph, h: Tensor| decoder.tail(g, h, levels);
    let tile = (tiling.tile / up).max(1);
    tiled(gpu, h, &tail, &Cut { tile, margin: MARGIN, align: 1, up, down: 1, held: tiling.held }).await
}

/// A picture [H, W, 4] in -1 .. 1 to latents [h, w, 4] in the UNet's scale: the mean of what the encoder finds.
///
/// # Errors
/// Of the device; [`Error::Device`] for latents that are not finite.
pub(crate) async fn encode_picture(
    gpu: &Gpu,
    encoder: &Encoder,
    config: &VaeConfig,
    picture: &[f32],
    [h, w]: [u32; 2],
    tiling: Option<Tiling>,
) -> Result<Vec<f32>> {
    let x = Plane { h, w, c: 4, data: picture.to_vec() };
    let out = match tiling {
        None => run(gpu, &x, &|g, x| encoder.forward(g, x)).await?,
        Some(tiling) => {
            let levels = encoder.levels() - 1 - tiling.whole;
            let down = 1 << levels;
            let head = |g: &mut Graph, x: Tensor| encoder.head(g, x, levels);
            // The margin is counted at the resolution nearest to the latents.
            let cut = Cut { tile: tiling.tile, margin: MARGIN * down, align: down, up: 1, down, held: tiling.held };
            let inner = tiled(gpu, x, &head, &cut).await?;
            run(gpu, &inner, &|g, h| encoder.tail(g, h, levels)).await?
        }
    };
    let z = config.latent_channels;
    let mean: Vec<f32> =
        out.data.chunks_exact(out.c as usize).flat_map(|p| p[..z].iter().map(|v| v * config.scaling_factor)).collect();
    if mean.iter().any(|v| !v.is_finite()) {
        return Err(Error::Device {
            device: gpu.caps().name.clone(),
            what: "the VAE's encoder".into(),
            reason: "the latents are not finite".into(),
        });
    }
    Ok(mean)
}

/// Bytes that the VAE needs beside its parameters, and how the picture is cut.
pub(crate) struct VaePlan {
    pub bytes: u64,
    pub tiling: Option<Tiling>,
}

/// Does the device have so many bytes more? The error that says no.
type Fits<'a> = &'a dyn Fn(u64) -> Result<()>;

/// One side of a VAE: what recording its parts on a picture would allocate, and their largest tensors.
struct Side<'a> {
    levels: usize,
    whole: &'a dyn Fn() -> Need,
    /// The part near the latents, of which so many levels see the whole picture.
    near: &'a dyn Fn(usize) -> Need,
    /// The rest, on a tile of so many pixels with its margins.
    far: &'a dyn Fn(usize, u32) -> Need,
}

/// Bytes for the statistics of a VAE's norms.
const STATISTICS: u64 = 4 << 20;

/// Bytes in all, of the largest tensor, and of what enters.
struct Need {
    bytes: u64,
    largest: u64,
    enters: u64,
}

fn measure(gpu: &Gpu, [h, w, c]: [u32; 3], network: Network<'_>) -> Need {
    let bytes = |n: u64| n.max(16).next_multiple_of(16);
    let mut g = Graph::new(gpu, DType::F32);
    let x = g.argument("image", [1, h, w, c], DType::F32);
    let out = network(&mut g, x);
    g.keep_argument(out);
    let working = g.planned_bytes(gpu.caps().uniform_alignment);
    // While it runs, what enters is there; while the result is read back, a copy of that.
    let (enters, result) = (bytes(x.bytes()), bytes(out.bytes()));
    Need { bytes: (working + 256 + enters + result).max(2 * result), largest: g.largest_tensor(), enters }
}

/// How to run a side of a VAE on a picture of [h, w] pixels: whole if it fits, else with as many levels whole, and then as large
/// tiles, as fit.
fn plan_vae(gpu: &Gpu, [h, w]: [u32; 2], side: &Side<'_>, forced: Option<u32>, fits: Fits<'_>) -> Result<VaePlan> {
    let check = |need: &Need| gpu.check_size("the VAE's picture", need.largest).and_then(|()| fits(need.bytes));
    let whole = (side.whole)();
    let refused = match (forced, check(&whole)) {
        (None, Ok(())) => return Ok(VaePlan { bytes: whole.bytes, tiling: None }),
        (_, refused) => refused,
    };
    for levels in (0..side.levels).rev() {
        let near = (side.near)(levels);
        if check(&near).is_err() {
            continue;
        }
        let mut tile = forced.unwrap_or(h.max(w).next_power_of_two() / 2).max(SMALLEST);
        while tile >= SMALLEST {
            let far = (side.far)(levels, tile);
            if check(&far).is_ok() {
                // While a tile is on the device, the statistics of all norms are: small, but there.
                let one = far.bytes + STATISTICS;
                let tiles = u64::from(h.div_ceil(tile)) * u64::from(w.div_ceil(tile));
                let all = one + (tiles - 1) * far.enters;
                let held = fits(all).is_ok();
                let bytes = near.bytes.max(if held { all } else { one });
                return Ok(VaePlan { bytes, tiling: Some(Tiling { whole: levels, tile, held }) });
            }
            tile /= 2;
        }
    }
    refused.and_then(|()| fits(u64::MAX / 2)).map(|()| unreachable!("no device has that many bytes"))
}

/// How to decode a picture of [h, w] latents; `channels` of the VAE's levels, outermost first.
///
/// # Errors
/// [`Error::DoesNotFit`] if not even tiles do.
pub(crate) fn plan_decode(
    gpu: &Gpu,
    decoder: &Decoder,
    channels: &[usize],
    [h, w]: [u32; 2],
    forced: Option<u32>,
    fits: Fits<'_>,
) -> Result<VaePlan> {
    let count = decoder.levels();
    let side = Side {
        levels: count,
        whole: &|| {
            let need = measure(gpu, [h, w, 4], &|g, z| {
                let z = pack(g, z, None, 1);
                decoder.forward(g, z)
            });
            // The program stays for the pictures that follow, while one is read back.
            Need { bytes: need.bytes + u64::from(h * w) * 64 * 4 * 4, ..need }
        },
        near: &|k| measure(gpu, [h, w, 4], &|g, z| decoder.head(g, z, k)),
        far: &|k, tile| {
            let up = 1 << (count - 1 - k);
            let side = |n: u32| n.min((tile / up).max(1) + 2 * MARGIN);
            // What level k of the way up takes is as wide as the level before put out.
            let c = channels[if k == 0 { count - 1 } else { count - k }] as u32;
            measure(gpu, [side(h << k), side(w << k), c], &|g, x| decoder.tail(g, x, k))
        },
    };
    plan_vae(gpu, [h * 8, w * 8], &side, forced, fits)
}

/// How to encode a picture of [h, w] latents; `channels` of the VAE's levels, outermost first.
///
/// # Errors
/// [`Error::DoesNotFit`] if not even tiles do.
pub(crate) fn plan_encode(
    gpu: &Gpu,
    encoder: &Encoder,
    channels: &[usize],
    [h, w]: [u32; 2],
    forced: Option<u32>,
    fits: Fits<'_>,
) -> Result<VaePlan> {
    let count = encoder.levels();
    let side = Side {
        levels: count,
        whole: &|| measure(gpu, [h * 8, w * 8, 4], &|g, x| encoder.forward(g, x)),
        near: &|k| {
            let levels = count - 1 - k;
            let c = channels[levels.saturating_sub(1)] as u32;
            measure(gpu, [(h * 8) >> levels, (w * 8) >> levels, c], &|g, x| encoder.tail(g, x, levels))
        },
        far: &|k, tile| {
            let levels = count - 1 - k;
            let side = |n: u32| n.min(tile + 2 * (MARGIN << levels));
            measure(gpu, [side(h * 8), side(w * 8), 4], &|g, x| encoder.head(g, x, levels))
        },
    };
    plan_vae(gpu, [h * 8, w * 8], &side, forced, fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_everything_once_and_see_their_margins() {
        for (size, tile, margin) in [(64, 32, 8), (65, 32, 16), (7, 32, 3), (100, 33, 0), (5, 1, 2)] {
            let all = spans(size, tile, margin);
            assert_eq!((all[0].own_from, all[all.len() - 1].own_to), (0, size));
            assert!(all.windows(2).all(|pair| pair[0].own_to == pair[1].own_from));
            for s in all {
                assert!(s.own_to > s.own_from && s.own_to - s.own_from <= tile);
                assert_eq!((s.from, s.to), (s.own_from.saturating_sub(margin), (s.own_to + margin).min(size)));
            }
        }
    }

    #[test]
    fn pooled_statistics_are_those_of_the_whole() {
        let values: Vec<f32> = (0..4 * 30).map(|i| (i as f32 * 0.7).sin() * 3.0 + i as f32).collect();
        let sums = |pixels: &[f32]| {
            let n = pixels.len() / 4;
            let mean: Vec<f32> = (0..4).map(|c| pixels.iter().skip(c).step_by(4).sum::<f32>() / n as f32).collect();
            let squares: Vec<f32> =
                (0..4).map(|c| pixels.iter().skip(c).step_by(4).map(|v| (v - mean[c]).powi(2)).sum::<f32>()).collect();
            [mean, squares].concat()
        };
        let mut pooled = Pooled::new(4);
        pooled.add(&[sums(&values[..48]), sums(&values[48..64])].concat(), 16, 12);
        pooled.add(&sums(&values[64..]), 14, 16);
        assert_eq!(pooled.pixels, 30);
        for (found, expected) in pooled.sums().iter().zip(sums(&values)) {
            assert!((found - expected).abs() < 1e-3 * expected.abs(), "{found} {expected}");
        }
    }

    /// Both sides of the embedded VAE cut at every level, against whole: the share of the difference, and where it lies.
    #[test]
    fn tiles_are_the_whole_at_every_level() {
        use pollster::block_on;
        let gpu = block_on(Gpu::open(&Default::default())).expect("a GPU or a software device");
        let model =
            crate::Checkpoint::open(&crate::files::Files::Embedded(scumble_model::FILES).into()).expect("a model");
        let config = &model.vae().expect("a VAE").config;
        let (decoder, _) =
            block_on(crate::parts::load_decoder(&gpu, &model, crate::parts::Mode::Load)).expect("loaded");
        let (encoder, _) =
            block_on(crate::parts::load_encoder(&gpu, &model, crate::parts::Mode::Load)).expect("loaded");
        let (h, w) = (96u32, 128u32);
        // Flat, striped and dotted parts: statistics that differ from tile to tile.
        let value = |i: u32| {
            let (x, y, c) = (i / 4 % w, i / 4 / w, i % 4);
            let stripes = ((x * (c + 1)) as f32 * 0.2).sin();
            let dots = if (x / 8 + y / 8) % 2 == 0 { 0.8 } else { -0.6 };
            let shade = y as f32 / h as f32;
            if c == 3 {
                0.0
            } else if x < 50 {
                shade - 0.5
            } else if y < 45 {
                stripes
            } else {
                dots * shade
            }
        };
        let picture: Vec<f32> = (0..h * w * 4).map(value).collect();
        let encode =
            |tiling| block_on(encode_picture(&gpu, &encoder, config, &picture, [h, w], tiling)).expect("encoded");
        let whole = encode(None);
        let error = |a: &[f32], b: &[f32]| {
            let square = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>();
            (square(&mut a.iter().zip(b).map(|(x, y)| x - y)) / square(&mut b.iter().copied())).sqrt()
        };
        for level in [2, 0] {
            let found = error(&encode(Some(Tiling { whole: level, tile: 64, held: level == 0 })), &whole);
            println!("encoded with {level} levels whole: {found:.1e}");
            assert!(found < 1e-5, "encoded with {level} levels whole: {found:.1e}");
        }
        let z: Vec<f32> = whole.iter().map(|v| v / config.scaling_factor).collect();
        let z = Plane { h: h / 8, w: w / 8, c: 4, data: z };
        let expected = block_on(run(&gpu, &z, &|g, z| decoder.forward(g, z))).expect("decoded").data;
        for level in [3, 1] {
            let made = block_on(decode_tiled(&gpu, &decoder, &z, Tiling { whole: level, tile: 64, held: false }))
                .expect("decoded");
            let squares: f64 = made.data.iter().zip(&expected).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let psnr = 10.0 * (4.0 * expected.len() as f64 / squares).log10();
            println!("decoded with {level} levels whole: {psnr:.1} dB");
            assert!(psnr > 100.0, "decoded with {level} levels whole: {psnr:.1} dB");
        }
    }
}
