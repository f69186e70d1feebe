//! Prompt to picture, top to bottom: text, noise, the sampler's loop, decode. Nothing else.

use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use web_time::Instant;

use crate::checkpoint::Checkpoint;
use crate::conditioning::{Conditioning, Encoder, encode};
use crate::denoiser::{Scales, Step, steps};
use crate::error::{Error, Result};
use crate::forecast::Forecast;
use crate::gpu::profile::Profile;
use crate::gpu::tune::Observe;
use crate::gpu::{DType, Gpu, Graph, Program};
use crate::guidance::Passes;
use crate::inpaint::{composite, latent_mask, normalised, shown};
use crate::layout::to_nchw;
use crate::model::clip::Read;
use crate::noise::Generator;
use crate::ops::degrade::RADIUS;
use crate::parts::{
    Lent, Mode, ModelBytes, Networks, activation_type, load_clip, load_decoder, load_encoder, load_unet,
};
use crate::picture::{Early, Tiling, decode, encode_picture, ready};
use crate::request::{Generated, Memory, Precision, Progress, Request, Timings};
use crate::sampler::{Recording, sampler};
use crate::sampling::{Given, Job, Sampling};
use crate::schedule::{Prediction, Schedule, scheduler, sigmas};
use crate::text::Embeddings;

/// How to hold a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// In which numbers the UNet computes.
    pub precision: Precision,
    /// Hold one part on the device at a time: text encoders, UNet and VAE are loaded for each picture in turn.
    pub lowmem: bool,
}

/// A model on a device.
pub struct Pipeline {
    pub(crate) gpu: Gpu,
    pub(crate) model: Checkpoint,
    /// Textual inversions that prompts may name.
    pub embeddings: Embeddings,
    schedule: Schedule,
    prediction: Prediction,
    pub(crate) dtype: DType,
    pub(crate) planned: Networks,
    resident: Option<Networks>,
    /// Tells it from all others of this process.
    pub(crate) id: u64,
    pub(crate) bytes: ModelBytes,
    /// The last forecast, and what it was for.
    pub(crate) foreseen: Mutex<Option<(String, Forecast)>>,
    /// Of which pictures the kernels were tuned last.
    pub(crate) tuned: Mutex<Option<String>>,
}

impl Pipeline {
    /// Plan a model for a device: everything is checked and counted, nothing is loaded until a picture is asked for.
    ///
    /// # Errors
    /// Of the files (which one, what is wrong, what to do); [`Error::Invalid`] for f16 on a device without it.
    pub async fn plan(gpu: &Gpu, model: Checkpoint, options: LoadOptions) -> Result<Pipeline> {
        let dtype = activation_type(gpu, options.precision)?;
        let (planned, bytes) = Networks::make(gpu, &model, dtype, Mode::Plan).await?;
        let (schedule, prediction) = model.schedule();
        let (gpu, embeddings) = (gpu.clone(), Embeddings::none());
        let (resident, foreseen, tuned) = Default::default();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Pipeline {
            gpu,
            model,
            embeddings,
            schedule,
            prediction,
            dtype,
            planned,
            resident,
            id,
            bytes,
            foreseen,
            tuned,
        })
    }

    /// Load a model onto a device; with `lowmem`, only plan it.
    ///
    /// # Errors
    /// As [`Pipeline::plan`]; [`Error::DoesNotFit`] before anything is loaded; of the device.
    pub async fn load(gpu: &Gpu, model: Checkpoint, options: LoadOptions) -> Result<Pipeline> {
        let mut pipeline = Self::plan(gpu, model, options).await?;
        if !options.lowmem {
            pipeline.check_model()?;
            let (networks, _) = Networks::make(gpu, &pipeline.model, pipeline.dtype, Mode::Load).await?;
            pipeline.resident = Some(networks);
        }
        Ok(pipeline)
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The model.
    pub fn model(&self) -> &Checkpoint {
        &self.model
    }

    /// The element type of the UNet's activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Is it loaded, or are its parts loaded when they are needed?
    pub fn is_resident(&self) -> bool {
        self.resident.is_some()
    }

    /// Make pictures. `observe` hears of progress, between steps, and may break to cancel.
    ///
    /// # Errors
    /// [`Error::Invalid`] before anything runs; [`Error::DoesNotFit`] before anything is allocated; [`Error::Cancelled`];
    /// [`Error::DeviceLost`].
    pub async fn generate(
        &self,
        request: &Request,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let begin = Instant::now();
        let ms = |since: Instant| since.elapsed().as_secs_f64() * 1e3;
        let mut request = self.whole(request)?;
        let mut job = self.job(&request)?;
        // Once for all pictures of a kind: those after it need not be made in a way that leaves room for trials.
        request.autotune = request.autotune && !self.was_tuned(&request, &job)?;
        let forecast = self.forecast(&request, &job, true).await?;
        job.frugal = forecast.frugal;
        let key = self.kept_key(&request, &job, &forecast);
        // Another's is no use, and in the way.
        self.gpu.free_aside(forecast.keeps.then_some(&key));
        self.gpu.reset_peak();
        self.gpu.begin_picture();
        let mut profile = request.profile.then(Profile::default);

        // text → context
        let text = self.text(&request, job.passes, profile.as_mut()).await?;
        let mut timings = Timings { text: ms(begin), ..Default::default() };

        // picture → latents, where there is one
        let since = Instant::now();
        let given = self.given(&request, &job, forecast.encode_tiling).await?;
        timings.encode = ms(since);

        // seed → x
        let since = Instant::now();
        let mut generator = Generator::new(request.seed);
        let numel = job.shape.iter().product();
        // Drawn even where latents are given, so that an ancestral sampler's later noise is the seed's all the same.
        let drawn = generator.randn(numel);
        let unit = match &request.latents {
            None => drawn,
            Some(given) if given.len() == numel => given.clone(),
            Some(given) => {
                return Err(Error::invalid("latents", format!("{:?}, {numel} numbers", job.shape), given.len()));
            }
        };
        let unet = self.unet().await?;
        let mut tuned = |done, trials| observe(Progress::Tuned { done, trials });
        let tune = request.autotune.then_some(&mut tuned as &mut Observe<'_>);
        let (mut sampling, mut early) = match self.gpu.take::<Kept>(&key) {
            Some(Kept { mut sampling, early }) => {
                sampling.again(&unet, self.dtype, &job, &text).await?;
                (sampling, Some(early))
            }
            None => {
                let new = Sampling::new(&self.gpu, &unet, self.dtype, &job, &text, &given, &unit, tune).await?;
                (new, None)
            }
        };
        sampling.start(&job, &given, &unit, self.start_scale(&job));
        timings.prepare = ms(since);

        // the loop
        let since = Instant::now();
        let config = &self.model.vae()?.config;
        let [b, h, w, _] = job.dims();
        // The decoder gets ready while the device is busy. Should its memory be refused, it is asked for again when it is its turn.
        let running = {
            let meanwhile = pin!(async {
                if let (true, None, Some(networks)) = (forecast.early, &early, &self.resident) {
                    early = ready(&self.gpu, &networks.decoder, config, [h, w]).await.ok().map(Early::new);
                }
            });
            sampling.run(&job, &mut generator, profile.as_mut(), observe, meanwhile).await?
        };
        let results = sampling.results(&job).await?;
        if let (Some(early), None, false) = (&mut early, &profile, running.stop) {
            early.begin(&self.gpu, &sampling.result(&job)).await?;
        }
        running.finish(observe).await?;
        timings.sample = ms(since);

        // latents → pictures
        let since = Instant::now();
        let (latents, masks) = results.finish(&job).await?;
        let allocator = self.gpu.allocator_bytes();
        // What is done with takes a while to drop: beside the decoder, where that has its own memory already.
        let (kept, done) =
            if forecast.keeps && early.is_some() { (Some(sampling), None) } else { (None, Some(sampling)) };
        let mut done = Some((done, unet));
        let mut drop_done = || drop(done.take());
        if early.is_none() {
            drop_done();
        }

        let decoder = self.decoder().await?;
        let tiling = forecast.decode_tiling;
        let (size, tune) = ([b, h, w], request.autotune);
        let mut images = decode(
            &self.gpu,
            &decoder,
            config,
            &latents,
            size,
            tiling,
            early.as_mut(),
            tune,
            profile.as_mut(),
            observe,
            &mut drop_done,
        )
        .await?;
        if let Some(init) = &request.init
            && let Some(mask) = init.feathered()
        {
            images = images.iter().map(|made| composite(made, &init.image, &mask)).collect();
        }
        timings.decode = ms(since);
        // The next picture is likely of the same size; held part by part, the model needs the room itself.
        match self.is_resident() {
            true => self.gpu.free_unused(),
            false => self.gpu.free_idle(),
        }
        if let (Some(sampling), Some(early)) = (kept, early) {
            let bytes = sampling.bytes() + early.bytes();
            self.gpu.set_aside(key, Box::new(Kept { sampling, early }), bytes);
        }
        if request.autotune {
            self.keep_tuned(&request, &job)?;
        }
        let mut warnings = self.model.warnings.clone();
        warnings.extend(self.gpu.save_pipelines().err().map(|e| e.to_string()));
        timings.total = ms(begin);
        let weights = if self.is_resident() { self.bytes.weights() } else { 0 };
        let peak = self.gpu.memory_in_use().1;
        let memory = Memory { weights, planned_peak: forecast.peak, peak, allocator };
        let (shape, sigmas) = (job.shape, job.sigmas);
        Ok(Generated {
            request,
            images,
            latents: to_nchw(&latents, shape),
            shape,
            masks,
            sigmas,
            warnings,
            timings,
            memory,
            profile,
        })
    }
}

/// What a picture leaves for the next one of its kind: the loop and the decoder, recorded, bound, and with their memory.
struct Kept {
    sampling: Sampling,
    early: Early,
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.gpu.free_idle();
    }
}

impl Pipeline {
    /// The request with its sizes filled in.
    pub(crate) fn whole(&self, request: &Request) -> Result<Request> {
        request.check()?;
        let own = self.model.size();
        let init = request.init.as_ref().map(|init| (init.image.width, init.image.height));
        let (own_width, own_height) = init.unwrap_or((own, own));
        let (width, height) = (request.width.unwrap_or(own_width), request.height.unwrap_or(own_height));
        let request = Request { width: Some(width), height: Some(height), ..request.clone() };
        request.check()?;
        if let Some(init) = &request.init {
            init.check(width, height)?;
        }
        Ok(request)
    }

    pub(crate) fn job(&self, request: &Request) -> Result<Job> {
        let size = |pixels: Option<u32>| pixels.unwrap_or(8) as usize / 8;
        let shape = [request.batch as usize, 4, size(request.height), size(request.width)];
        assert!(
            shape[2].min(shape[3]) > RADIUS as usize,
            "request.check allows no latent that cannot be blurred: {shape:?}"
        );
        let scheduler = scheduler(&request.scheduler)?;
        let sigmas = sigmas(&self.schedule, scheduler, request.steps as usize, request.denoise)?;
        let exact: Vec<f64> = sigmas.iter().map(|&sigma| f64::from(sigma)).collect();
        let recording = Recording::new(sampler(&request.sampler)?, &exact);
        let scales = Scales {
            cfg: request.cfg,
            sag_scale: request.sag_scale,
            sag_blur_sigma: request.sag_blur_sigma,
            sag_threshold: request.sag_threshold,
        };
        let (calls, timesteps) = steps(&self.schedule, self.prediction, &recording.calls(), &scales);
        let passes = Passes::of(request.cfg, request.sag_scale);
        let sees_masks = self.model.unet.config.in_channels == 9;
        let masked = request.init.as_ref().is_some_and(|init| init.mask.is_some()) && !sees_masks;
        // Until the forecast says so.
        let frugal = false;
        Ok(Job { shape, passes, sigmas, recording, calls, timesteps, sees_masks, masked, frugal })
    }

    /// What the start noise is multiplied by.
    pub(crate) fn start_scale(&self, job: &Job) -> f32 {
        self.schedule.start_scale(job.sigmas[0])
    }

    /// Prompts to the context, the text encoders loaded for it if they are not.
    pub(crate) async fn text(&self, request: &Request, passes: Passes, profile: Option<&mut Profile>) -> Result<Text> {
        let mut loaded = Vec::new();
        let texts = self.model.texts()?;
        let prompts: Vec<&str> = passes.of_prompts(&request.negative_prompt, &request.prompt);
        let clips = match &self.resident {
            Some(networks) => &networks.clips,
            None => {
                for text in texts {
                    loaded.push(load_clip(&self.gpu, text, Mode::Load).await?.0);
                }
                &loaded
            }
        };
        let encoders: Vec<Encoder<'_>> = texts
            .iter()
            .zip(clips)
            .map(|(text, clip)| Encoder { clip, tokenizer: &text.tokenizer, read: self.read(request, text) })
            .collect();
        let conditioning =
            encode(&self.gpu, &encoders, &self.embeddings, &prompts, request.prompt_style, profile).await?;
        Ok(Text { added: self.added_rows(request, &conditioning), conditioning })
    }

    /// Which states of an encoder this model reads.
    pub(crate) fn read(&self, request: &Request, text: &crate::checkpoint::TextPart) -> Read {
        let skip = request.clip_skip.map_or(text.skip, |skip| skip as usize);
        Read { skip, normed: text.normed, last: self.model.unet.config.added.is_some() }
    }

    /// SDXL's rows of pooled text and sizes; empty for other models.
    fn added_rows(&self, request: &Request, text: &Conditioning) -> Vec<f32> {
        let Some(added) = self.model.unet.config.added else { return vec![] };
        let sizes = request.sizes().map(|n| n as f32);
        let row = |pooled: &[f32]| crate::model::unet::added_input(pooled, &sizes, added.time_dim);
        text.pooled.chunks_exact(added.pooled()).flat_map(row).collect()
    }

    /// The picture to start from, in latents.
    async fn given(&self, request: &Request, job: &Job, tiling: Option<Tiling>) -> Result<Given> {
        let [_, _, h, w] = job.shape;
        if request.init.is_none() && !job.sees_masks {
            return Ok(Given::default());
        }
        let config = &self.model.vae()?.config;
        let (encoder, _) = load_encoder(&self.gpu, &self.model, Mode::Load).await?;
        let size = [h as u32 * 8, w as u32 * 8];
        let latents =
            async |picture: Vec<f32>| encode_picture(&self.gpu, &encoder, config, &picture, size, tiling).await;
        let mut given = Given::default();
        let init = request.init.as_ref();
        let mask = init.and_then(|init| init.mask.as_ref());
        if let Some(init) = init {
            given.picture = Some(latents(normalised(&init.image, None)).await?);
            if job.masked {
                given.mask = init.feathered().map(|mask| latent_mask(&mask, h, w));
            }
        }
        if job.sees_masks {
            // Without a picture to repaint, all of it is hidden: grey, as these models were trained.
            let hidden = match (init, mask) {
                (Some(init), Some(mask)) => normalised(&init.image, Some(mask)),
                _ => vec![0.0; h * w * 64 * 4],
            };
            given.shown = Some(shown(mask.map(Vec::as_slice), &latents(hidden).await?, h, w));
        }
        Ok(given)
    }

    pub(crate) async fn unet(&self) -> Result<Lent<'_, crate::model::unet::UNet>> {
        match &self.resident {
            Some(networks) => Ok(Lent::Resident(&networks.unet)),
            None => Ok(Lent::Loaded(Box::new(load_unet(&self.gpu, &self.model, self.dtype, Mode::Load).await?.0))),
        }
    }

    async fn decoder(&self) -> Result<Lent<'_, crate::model::vae::Decoder>> {
        match &self.resident {
            Some(networks) => Ok(Lent::Resident(&networks.decoder)),
            None => Ok(Lent::Loaded(Box::new(load_decoder(&self.gpu, &self.model, self.dtype, Mode::Load).await?.0))),
        }
    }
}

/// What the prompts became.
pub(crate) struct Text {
    pub conditioning: Conditioning,
    /// [prompts, pooled + sizes] for SDXL, else empty.
    pub added: Vec<f32>,
}

/// Plan, run and drop a graph; done when this returns.
pub(crate) async fn run_once(gpu: &Gpu, g: Graph, scalars: &Step, profile: Option<&mut Profile>) -> Result<()> {
    submit_once(gpu, g, scalars, profile).await?;
    gpu.wait().await
}

/// Plan, submit and drop a graph: what is submitted next may read what it writes.
pub(crate) async fn submit_once(gpu: &Gpu, g: Graph, scalars: &Step, profile: Option<&mut Profile>) -> Result<()> {
    let program = Program::new(gpu, g).await?;
    let scalars = gpu.steps(&[*scalars]).await?;
    let mut step = gpu.record(profile.is_some());
    step.run(&program, &[], &scalars, 0);
    step.submit(profile).await
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests;
