//! Latents to pictures and back through the VAE: whole, or in tiles where the device cannot hold the whole.
//!
//! The VAE's levels near the latents, with its attention, always see the whole picture: they are small. Near the pixels only
//! convolutions and group norms are left. Tiles there get a margin as wide as the convolutions reach, and all have the whole
//! picture's statistics, which passes over the tiles find for one norm after the other: the result is that of the whole, to
//! rounding, for about half as many times the work as there are norms in the tiles.

use std::ops::ControlFlow;

use crate::denoiser::Step;
use crate::error::{Error, Result};
use crate::gpu::profile::Profile;
use crate::gpu::tune::Subject;
use crate::gpu::{Buffer, DType, Gpu, Graph, Program, Reading, Tensor};
use crate::image::Image;
use crate::model::config::VaeConfig;
use crate::model::vae::{Decoder, Encoder};
use crate::ops::levels::levels;
use crate::ops::pack::pack;
use crate::request::Progress;
use crate::tiles::{Cut, Network, Plane, run, tiled};

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

/// The decoder for whole pictures of [h, w] latents, compiled and with its memory.
///
/// # Errors
/// Of the device.
pub(crate) async fn ready(gpu: &Gpu, decoder: &Decoder, config: &VaeConfig, size: [u32; 2]) -> Result<Whole> {
    Recorded::new(gpu, decoder, config, size).await?.ready().await
}

/// The decoder for whole pictures, ready before the latents are.
pub(crate) struct Early {
    whole: Whole,
    /// The first picture, if it was submitted.
    begun: Option<Reading>,
}

impl Early {
    /// See [`ready`].
    pub fn new(whole: Whole) -> Early {
        Early { whole, begun: None }
    }

    /// Bytes of its buffers.
    pub fn bytes(&self) -> u64 {
        let Whole { latent, program, scalars, pixels, .. } = &self.whole;
        latent.bytes() + program.bytes() + scalars.bytes() + pixels.bytes()
    }

    /// Have the first of the latents decoded, once what is submitted has made them: the device need not wait for the host to read them.
    ///
    /// # Errors
    /// Of the device.
    pub async fn begin(&mut self, gpu: &Gpu, latents: &Buffer) -> Result<()> {
        latents.copy_to(&self.whole.latent);
        self.whole.submit(gpu, None).await?;
        self.begun = Some(self.whole.read().await?);
        Ok(())
    }
}

/// Final latents [B, h, w, 4] in the UNet's scale to pictures; `early`: the decoder for whole pictures, if it is ready; `meanwhile`: what the host
/// does once the device decodes one.
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
    early: Option<&mut Early>,
    tune: bool,
    mut profile: Option<&mut Profile>,
    observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    meanwhile: &mut dyn FnMut(),
) -> Result<Vec<Image>> {
    let c = config.latent_channels as u32;
    let mut made = None;
    let mut whole = match (tiling, early) {
        (Some(_), _) => None,
        (None, Some(early)) => Some(early),
        (None, None) => {
            let whole = Recorded::new(gpu, decoder, config, [h, w]).await?;
            if tune {
                whole.tune(observe).await?;
            }
            Some(made.insert(Early::new(whole.ready().await?)))
        }
    };
    let mut images = Vec::new();
    for (i, latent) in latents.chunks_exact((h * w * c) as usize).enumerate() {
        images.push(match (&mut whole, tiling) {
            (Some(Early { whole, begun }), _) => {
                let reading = match begun.take() {
                    Some(reading) => reading,
                    None => {
                        whole.latent.write(latent);
                        whole.submit(gpu, profile.as_deref_mut()).await?;
                        whole.read().await?
                    }
                };
                meanwhile();
                whole.image(reading).await?
            }
            (None, tiling) => {
                let scaled = latent.iter().map(|v| v / config.scaling_factor).collect();
                let z = Plane { h, w, c, data: scaled };
                let tiling = tiling.unwrap_or(Tiling { whole: 0, tile: 512, held: false });
                let picture = decode_tiled(gpu, decoder, &z, tiling).await?;
                Image::from_nhwc::<4>(&picture.data, picture.w, picture.h)?
            }
        });
        if observe(Progress::Decoded { done: i as u32 + 1, batch }).is_break() {
            return Err(Error::Cancelled);
        }
    }
    Ok(images)
}

/// The decoder for whole pictures, before it is compiled.
struct Recorded<'a> {
    gpu: &'a Gpu,
    decoder: &'a Decoder,
    latent: Buffer,
    dims: [u32; 4],
    scalars: crate::gpu::run::Steps,
}

impl<'a> Recorded<'a> {
    async fn new(gpu: &'a Gpu, decoder: &'a Decoder, config: &VaeConfig, [h, w]: [u32; 2]) -> Result<Recorded<'a>> {
        let c = config.latent_channels as u32;
        let latent = gpu.storage("latent", u64::from(h * w * c) * 4).await?;
        let scalars = gpu.steps(&[Step { c_in: 1.0 / config.scaling_factor, ..Default::default() }]).await?;
        Ok(Recorded { gpu, decoder, latent, dims: [1, h, w, c], scalars })
    }

    fn record(&self, g: &mut Graph) -> Tensor {
        let bound = g.bind("latent", &self.latent, self.dims, DType::F32);
        pixels(g, self.decoder, bound)
    }

    async fn tune(&self, observe: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        self.latent.write(&vec![0.5f32; (self.latent.bytes() / 4) as usize]);
        let record = |g: &mut Graph| {
            let _ = self.record(g);
        };
        let subject = Subject { dtype: DType::F32, record: &record, arguments: &[], steps: &self.scalars };
        self.gpu.tune(&subject, &mut |done, trials| observe(Progress::Tuned { done, trials })).await?;
        Ok(())
    }

    async fn ready(self) -> Result<Whole> {
        let mut g = Graph::new(self.gpu, DType::F32);
        let words = self.record(&mut g);
        let pixels = self.gpu.scratch("picture", words.bytes()).await?;
        g.keep(words, &pixels);
        let program = Program::new(self.gpu, g).await?;
        let [_, h, w, _] = self.dims;
        Ok(Whole { latent: self.latent, program, scalars: self.scalars, pixels, size: [8 * h, 8 * w] })
    }
}

/// The decoder for whole pictures, ready to run.
pub(crate) struct Whole {
    latent: Buffer,
    program: Program,
    scalars: crate::gpu::run::Steps,
    /// As [`levels`] has them.
    pixels: Buffer,
    /// Their height and width.
    size: [u32; 2],
}

/// Record latents [1, h, w, 4] to the words of pixels.
fn pixels(g: &mut Graph, decoder: &Decoder, latent: Tensor) -> Tensor {
    let packed = pack(g, latent, None, 1);
    let picture = decoder.forward(g, packed);
    levels(g, picture)
}

impl Whole {
    async fn submit(&self, gpu: &Gpu, profile: Option<&mut Profile>) -> Result<()> {
        let mut step = gpu.record(profile.is_some());
        step.run(&self.program, &[], &self.scalars, 0);
        step.submit(profile).await
    }

    async fn read(&self) -> Result<Reading> {
        self.pixels.begin_read(self.pixels.bytes()).await
    }

    async fn image(&self, reading: Reading) -> Result<Image> {
        let [h, w] = self.size;
        // Memory that the device writes may be no cache's: it is copied in wide pieces before it is looked at word by word.
        let words = reading.finish(<[u32]>::to_vec).await?;
        Image::from_levels(&words, w, h)
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
    /// Of them, what is there before it runs, where it runs whole.
    pub ready: u64,
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
    ready: u64,
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
    let ready = working + 256 + enters + result;
    Need { bytes: ready.max(2 * result), ready, largest: g.largest_tensor(), enters }
}

/// How to run a side of a VAE on a picture of [h, w] pixels: whole if it fits, else with as many levels whole, and then as large
/// tiles, as fit.
fn plan_vae(gpu: &Gpu, [h, w]: [u32; 2], side: &Side<'_>, forced: Option<u32>, fits: Fits<'_>) -> Result<VaePlan> {
    let check = |need: &Need| gpu.check_size("the VAE's picture", need.largest).and_then(|()| fits(need.bytes));
    let whole = (side.whole)();
    let refused = match (forced, check(&whole)) {
        (None, Ok(())) => return Ok(VaePlan { bytes: whole.bytes, ready: whole.ready, tiling: None }),
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
                return Ok(VaePlan { bytes, ready: 0, tiling: Some(Tiling { whole: levels, tile, held }) });
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
            let need = measure(gpu, [h, w, 4], &|g, z| pixels(g, decoder, z));
            // The program stays for the pictures that follow, while one is read back.
            Need { bytes: need.bytes + u64::from(h * w) * 64 * 4, ..need }
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
    use pollster::block_on;

    use super::*;
    use crate::Checkpoint;
    use crate::files::Files;
    use crate::parts::{Mode, load_decoder, load_encoder};

    fn embedded() -> (Gpu, Checkpoint, Decoder) {
        let gpu = block_on(Gpu::open(&Default::default())).expect("a GPU or a software device");
        let model = Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("a model");
        let (decoder, _) = block_on(load_decoder(&gpu, &model, DType::F32, Mode::Load)).expect("loaded");
        (gpu, model, decoder)
    }

    /// Begun behind what makes the latents, or from the host's: the same pictures, each its own.
    #[test]
    fn a_decoder_that_has_begun_makes_the_same_pictures() {
        let (gpu, model, decoder) = embedded();
        let config = &model.vae().expect("a VAE").config;
        let size = [2, 8, 8];
        let latents: Vec<f32> = (0..2 * 8 * 8 * 4).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let decode = |early: Option<&mut Early>| {
            let mut observe = |_: Progress| ControlFlow::Continue(());
            let mut done = || {};
            let done =
                decode(&gpu, &decoder, config, &latents, size, None, early, false, None, &mut observe, &mut done);
            block_on(done).expect("decoded")
        };
        let expected = decode(None);
        assert_ne!(expected[0], expected[1]);
        let mut early = Early::new(block_on(ready(&gpu, &decoder, config, [8, 8])).expect("ready"));
        let made = block_on(gpu.upload("latents", &latents)).expect("a buffer");
        for begins in [false, true, true, false] {
            if begins {
                block_on(early.begin(&gpu, &made)).expect("begun");
            }
            assert_eq!(decode(Some(&mut early)), expected, "{begins}");
        }
    }

    /// Both sides of the embedded VAE cut at every level, against whole: the share of the difference, and where it lies.
    #[test]
    fn tiles_are_the_whole_at_every_level() {
        let (gpu, model, decoder) = embedded();
        let config = &model.vae().expect("a VAE").config;
        let (encoder, _) = block_on(load_encoder(&gpu, &model, Mode::Load)).expect("loaded");
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
