//! What a picture will need, before a byte is allocated: every stage recorded and planned, the VAE's tiles chosen.

use crate::conditioning::{chunked, common_length};
use crate::error::Result;
use crate::gpu::wait::lock;
use crate::gpu::{DType, Graph, Tensor};
use crate::guidance::{Surroundings, denoise};
use crate::model::blocks::ContextKv;
use crate::ops::blend::Kept;
use crate::parts::{Mode, ModelBytes, PartBytes, load_encoder};
use crate::picture::{Tiling, VaePlan, plan_decode, plan_encode};
use crate::pipeline::Pipeline;
use crate::request::Request;
use crate::sampling::{Job, arities, lincombs};

/// Bytes of device memory that a picture needs, and how its VAE runs.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Forecast {
    /// The model's parts.
    pub model: ModelBytes,
    /// Tokens of the context, all prompts of one length.
    pub tokens: u32,
    /// The text encoders' stage, parameters not counted.
    pub text: u64,
    /// The way of a picture to latents, with the encoder; 0 without one.
    pub encode: u64,
    /// The sampler's loop, parameters not counted.
    pub sample: u64,
    /// Latents to pictures, parameters not counted.
    pub decode: u64,
    /// The most at any time, parameters included.
    pub peak: u64,
    /// How the picture to start from is cut, if it is.
    pub encode_tiling: Option<Tiling>,
    /// How the result is cut, if it is.
    pub decode_tiling: Option<Tiling>,
    /// Is there room for the decoder beside the loop, to get ready meanwhile?
    pub early: bool,
    /// .. and do both wait for the next picture, if the device has the room then?
    pub keeps: bool,
    /// Is memory short, so that no weights are transformed to save time?
    pub frugal: bool,
}

/// Bytes of the sampler's loop and of what comes before it.
struct LoopBytes {
    /// Before it.
    before: u64,
    /// In it.
    sample: u64,
    /// .. at its end, for its results.
    readback: u64,
    /// Before it, beside all of it, where it waited for this picture.
    again: u64,
}

/// As [`crate::gpu::Gpu::storage`] rounds.
fn bytes(n: u64) -> u64 {
    n.max(16).next_multiple_of(16)
}

/// Bytes of the scalars that a program run once binds.
const SCALARS: u64 = 256;

const HINT: &str = "hold one part at a time with --lowmem, ask for a smaller picture or batch, or choose another device \
    with --device";

impl Pipeline {
    /// Would the model itself fit?
    ///
    /// # Errors
    /// [`crate::Error::DoesNotFit`] with the bytes.
    pub(crate) fn check_model(&self) -> Result<()> {
        let m = &self.bytes;
        let needed = m.weights() + m.text.loading.max(m.unet.loading).max(m.decoder.loading);
        self.gpu.check_memory(&format!("the model ({})", self.model.family), needed, HINT)
    }

    /// What a request will need on this device.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for the request; [`crate::Error::DoesNotFit`] with needed and available bytes.
    pub async fn foresee(&self, request: &Request) -> Result<Forecast> {
        let request = self.whole(request)?;
        let job = self.job(&request)?;
        self.forecast(&request, &job, false).await
    }

    /// All that a picture's recordings depend on, but no number that is written anew: this model, shapes and passes, sampler and steps, and how kernels
    /// were tuned.
    fn kind(&self, request: &Request, job: &Job, tokens: u32) -> String {
        format!(
            "{} {tokens} {:?} {:?} {:?} {:?}",
            self.id,
            (job.shape, job.passes, job.timesteps.len(), job.sees_masks, job.masked),
            (&request.sampler, &request.scheduler, request.steps, request.denoise),
            (request.init.is_some(), request.vae_tile, request.clip_skip, request.autotune, request.profile),
            (self.gpu.tuned(), self.is_resident()),
        )
    }

    /// Were the kernels of such a picture tuned last?
    pub(crate) fn was_tuned(&self, request: &Request, job: &Job) -> Result<bool> {
        let kind = self.kind(request, job, self.count_tokens(request, job)?);
        Ok(lock(&self.tuned).as_ref() == Some(&kind))
    }

    /// They were.
    pub(crate) fn keep_tuned(&self, request: &Request, job: &Job) -> Result<()> {
        *lock(&self.tuned) = Some(self.kind(request, job, self.count_tokens(request, job)?));
        Ok(())
    }

    /// What a loop and a decoder wait for ([`Forecast::keeps`]).
    pub(crate) fn kept_key(&self, request: &Request, job: &Job, forecast: &Forecast) -> String {
        format!("{} {}", self.kind(request, job, forecast.tokens), forecast.frugal)
    }

    /// Record everything without a byte allocated: does it fit, and what will the peak be? `compile`: and compile all that runs before
    /// the first step ends, at once.
    pub(crate) async fn forecast(&self, request: &Request, job: &Job, compile: bool) -> Result<Forecast> {
        let tokens = self.count_tokens(request, job)?;
        let key = format!("{} {}", self.kind(request, job, tokens), self.gpu.memory_in_use().0);
        if let Some((known, forecast)) = &*lock(&self.foreseen)
            && *known == key
        {
            return Ok(*forecast);
        }
        let mut graphs = Vec::new();
        let forecast = self.record_all(request, job, tokens, &mut graphs).await?;
        if compile {
            self.gpu.compile_all(&graphs)?;
        }
        *lock(&self.foreseen) = Some((key, forecast));
        Ok(forecast)
    }

    /// The forecast; `graphs` gets the recordings of the text's stage and of the loop's.
    async fn record_all(&self, request: &Request, job: &Job, tokens: u32, graphs: &mut Vec<Graph>) -> Result<Forecast> {
        let what = format!("a picture of {}x{} (batch {})", job.shape[3] * 8, job.shape[2] * 8, job.shape[0]);
        let m = self.bytes;
        // Beside what lies on the device already, a part that is not resident comes to its stage; what it needs while it is
        // loaded is gone when the stage runs.
        let beside = |part: PartBytes| if self.is_resident() { 0 } else { part.weights };
        let stage = |part: PartBytes, working: u64| match self.is_resident() {
            true => working,
            false => part.weights + working.max(part.loading),
        };
        // The first activations at full size: what cannot fit is told before it is recorded.
        let [b, h, w, _] = job.dims().map(u64::from);
        let first = b * h * w * u64::from(job.passes.prompts()) * self.model.unet.config.levels[0].channels as u64;
        self.gpu.check_size(&what, first * self.dtype.bytes())?;

        let text = self.forecast_text(request, [job.passes.prompts(), tokens], &what, graphs)?;
        let (encode, encode_tiling) = self.forecast_encode(request, job, &what).await?;
        // Who holds one part at a time wants it small.
        let mut frugal = !self.is_resident();
        let recorded = graphs.len();
        let mut looped = self.forecast_sample(job, tokens, frugal, &what, graphs)?;
        let most = looped.before.max(looped.sample + looped.readback);
        if !frugal && self.gpu.check_memory(&what, most, HINT).is_err() {
            graphs.truncate(recorded);
            frugal = true;
            looped = self.forecast_sample(job, tokens, frugal, &what, graphs)?;
        }
        let LoopBytes { before, sample, readback, again } = looped;
        let decode = self.forecast_decode(request, job, beside(m.decoder), &what)?;
        let beside_loop = sample + readback + decode.bytes;
        // A software device is busy itself, and what an unknown device has to spare nobody knows.
        let room = self.gpu.caps().memory.is_some() && self.gpu.check_memory(&what, beside_loop, HINT).is_ok();
        let early =
            self.is_resident() && decode.tiling.is_none() && !request.autotune && !self.gpu.caps().is_cpu() && room;
        // What is given is bound in the loop, and what is timed is no loop to keep.
        let given = request.init.is_some() || job.sees_masks || request.profile;
        let kept = beside_loop.max(sample + decode.ready + again);
        let keeps = early && !given && self.gpu.check_memory(&what, kept, HINT).is_ok();
        let sample = before.max(match (keeps, early) {
            (true, _) => kept,
            (_, true) => beside_loop,
            _ => sample + readback,
        });
        let most = stage(m.text, text).max(encode).max(stage(m.unet, sample)).max(stage(m.decoder, decode.bytes));
        self.gpu.check_memory(&what, most, HINT)?;
        let peak = self.gpu.memory_in_use().0 + most;
        let (decode, decode_tiling) = (decode.bytes, decode.tiling);
        Ok(Forecast {
            model: m,
            tokens,
            text,
            encode,
            sample,
            decode,
            peak,
            encode_tiling,
            decode_tiling,
            early,
            keeps,
            frugal,
        })
    }

    /// Tokens of the context, all prompts of one length.
    fn count_tokens(&self, request: &Request, job: &Job) -> Result<u32> {
        let text = &self.model.texts()?[0];
        let prompts = job.passes.of_prompts(&request.negative_prompt, &request.prompt);
        let chunks = chunked(&text.tokenizer, &self.embeddings, &prompts, request.prompt_style)?;
        Ok((common_length(chunks.iter().map(Vec::len)) * text.part.config.max_position_embeddings) as u32)
    }

    fn forecast_text(
        &self,
        request: &Request,
        [prompts, tokens]: [u32; 2],
        what: &str,
        graphs: &mut Vec<Graph>,
    ) -> Result<u64> {
        let mut most = 0;
        for (clip, text) in self.planned.clips.iter().zip(self.model.texts()?) {
            let length = clip.config.max_position_embeddings as u32;
            let record = |chunks: u32| {
                let mut g = Graph::new(&self.gpu, DType::F32);
                let dims = [chunks, 1, length, clip.config.hidden_size as u32];
                let x = g.argument("embeddings", dims, DType::F32);
                clip.forward(&mut g, x, self.read(request, text));
                (g, x)
            };
            // At most two prompts, and the empty one where weights are measured against it.
            let (g, x) = record(2 * tokens / length + 1);
            self.gpu.check_graph(what, &g)?;
            most = most.max(g.planned_bytes(self.gpu.caps().uniform_alignment) + 4 * bytes(x.bytes()) + SCALARS);
            // More likely there is none such.
            graphs.push(record(prompts * tokens / length).0);
        }
        Ok(most)
    }

    /// Bytes with the encoder's parameters, and how the picture is cut.
    async fn forecast_encode(&self, request: &Request, job: &Job, what: &str) -> Result<(u64, Option<Tiling>)> {
        if request.init.is_none() && !job.sees_masks {
            return Ok((0, None));
        }
        let (encoder, part) = load_encoder(&self.gpu, &self.model, Mode::Plan).await?;
        let channels = &self.model.vae()?.config.block_out_channels;
        let [_, h, w, _] = job.dims();
        let fits = |n: u64| self.gpu.check_memory(what, part.weights + n, HINT);
        let plan = plan_encode(&self.gpu, &encoder, channels, [h, w], request.vae_tile, &fits)?;
        Ok((part.weights + plan.bytes.max(part.loading), plan.tiling))
    }

    fn forecast_decode(&self, request: &Request, job: &Job, beside: u64, what: &str) -> Result<VaePlan> {
        let channels = &self.model.vae()?.config.block_out_channels;
        let [_, h, w, _] = job.dims();
        let fits = |n: u64| self.gpu.check_memory(what, beside + n, HINT);
        plan_decode(&self.gpu, &self.planned.decoder, channels, [h, w], request.vae_tile, &fits)
    }

    /// Bytes before the loop, and in it.
    fn forecast_sample(
        &self,
        job: &Job,
        tokens: u32,
        frugal: bool,
        what: &str,
        graphs: &mut Vec<Graph>,
    ) -> Result<LoopBytes> {
        let gpu = &self.gpu;
        let alignment = gpu.caps().uniform_alignment;
        let unet = &self.planned.unet;
        let prompts = job.passes.prompts();
        // Text to keys and values: once, before the loop.
        let mut g = Graph::new(gpu, self.dtype);
        let hidden = g.argument("hidden states", [prompts, 1, tokens, unet.config.cross_dim as u32], DType::F32);
        let context = unet.context(&mut g, hidden);
        let tensors: Vec<Tensor> = context.iter().flat_map(ContextKv::tensors).collect();
        tensors.iter().for_each(|t| g.keep_argument(*t));
        let states = bytes(hidden.bytes()) + SCALARS;
        let again = g.planned_bytes(alignment) + states;
        let [_, h, w, _] = job.dims();
        g.frugal = frugal;
        let folded = unet.folded(&mut g, [h, w]);
        folded.tensors().iter().for_each(|t| g.keep_argument(*t));
        gpu.check_graph(what, &g)?;
        let size =
            |dims: &[u32; 4], dtype: DType| bytes(dims.iter().map(|&d| u64::from(d)).product::<u64>() * dtype.bytes());
        let mut kept: u64 = tensors.iter().map(|t| bytes(t.bytes())).sum();
        kept += folded.tensors().iter().map(|t| bytes(t.bytes())).sum::<u64>();
        let before = kept + g.planned_bytes(alignment) + states;
        graphs.push(g);

        // Timesteps to time projections: once, too.
        let mut g = Graph::new(gpu, DType::F32);
        let calls = job.timesteps.len() as u32;
        let t = g.argument("timesteps", [1, 1, 1, calls.next_multiple_of(4)], DType::F32);
        let rows = unet.added_input().map(|width| g.argument("added rows", [1, 1, prompts, width], DType::F32));
        let given = bytes(t.bytes()) + rows.map_or(0, |rows| bytes(rows.bytes()));
        let added = rows.and_then(|rows| unet.added(&mut g, rows));
        let times = unet.times(&mut g, t, [calls, 1], added);
        g.keep_argument(times);
        gpu.check_graph(what, &g)?;
        kept += bytes(times.bytes());
        let of_times = g.planned_bytes(alignment) + given + SCALARS;
        let (before, again) = (before.max(kept + of_times), again.max(of_times));
        graphs.push(g);

        let mut g = Graph::new(gpu, self.dtype);
        let (x, out) = (g.argument("x", job.dims(), DType::F32), g.argument("denoised", job.dims(), DType::F32));
        let floats =
            |g: &mut Graph, n: usize| g.argument("floats", [1, 1, 1, n.next_multiple_of(4) as u32], DType::F32);
        let times = g.argument("times", times.dims, DType::F32);
        let mask = job.passes.sag.then(|| floats(&mut g, job.mask_floats()));
        let context: Vec<_> = context.iter().map(|kv| kv.map(|t| g.argument("context", t.dims, t.dtype))).collect();
        let folded = folded.map(|t| g.argument("folded weights", t.dims, t.dtype));
        let mut more = Vec::new();
        let mut argument = |g: &mut Graph, dims: [u32; 4]| {
            more.push(size(&dims, DType::F32));
            g.argument("given", dims, DType::F32)
        };
        let extra = job.sees_masks.then(|| argument(&mut g, [1, h, w, 8]));
        let held = job.masked.then(|| Kept {
            mask: argument(&mut g, [1, 1, 1, (h * w).next_multiple_of(4)]),
            picture: argument(&mut g, [1, h, w, 4]),
            noise: argument(&mut g, job.dims()),
        });
        let surroundings = Surroundings { times, context: &context, folded: &folded, mask, extra, kept: held };
        denoise(&mut g, unet, job.passes, x, &surroundings, out);
        gpu.check_graph(what, &g)?;
        kept += more.iter().sum::<u64>();
        let latent = bytes(job.shape.iter().product::<usize>() as u64 * 4);
        let latents = job.recording.plan().slots.len() as u64 * latent;
        let mask = if job.passes.sag { bytes(job.mask_floats() as u64 * 4) } else { 0 };
        let scalars = (job.calls.len() + lincombs(&job.recording)) as u64 * 256;
        let lincomb_dims = arities(&job.recording).len() as u64 * 16;
        // Latents and masks are read back together while the loop's buffers still live.
        let readback = latent + mask;
        let sample = g.planned_bytes(alignment) + kept + latents + mask + scalars + lincomb_dims;
        graphs.push(g);
        Ok(LoopBytes { before, sample, readback, again })
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use std::ops::ControlFlow;

    use pollster::block_on;

    use super::*;
    use crate::files::Files;
    use crate::gpu::Gpu;
    use crate::gpu::noop::NoopProfile;
    use crate::request::Progress;
    use crate::{Checkpoint, LoadOptions};

    #[test]
    fn what_runs_before_the_decoder_is_compiled_at_once() {
        for profile in [NoopProfile::BROWSER, NoopProfile::H200] {
            let gpu = block_on(Gpu::noop(&profile)).expect("noop");
            let model = Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("the embedded model");
            let pipeline = block_on(Pipeline::load(&gpu, model, LoadOptions::default())).expect("loaded");
            let request = Request { steps: 2, ..Default::default() };
            let whole = pipeline.whole(&request).expect("a request");
            let job = pipeline.job(&whole).expect("a job");
            block_on(pipeline.forecast(&whole, &job, true)).expect("it fits");
            let then = gpu.compiled();
            let mut started = 0;
            let mut observe = |progress: Progress| {
                if matches!(progress, Progress::Start { .. }) {
                    started = gpu.compiled();
                }
                ControlFlow::Continue(())
            };
            block_on(pipeline.generate(&request, &mut observe)).expect("a run");
            // The sampler's own combinations are few and short.
            assert_eq!(started, then + arities(&job.recording).len(), "{}", profile.name);
        }
    }
}
