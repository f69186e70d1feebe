//! Prompt to picture, top to bottom: text, noise, the sampler's loop, decode. Nothing else.

use std::ops::ControlFlow;

use web_time::Instant;

use crate::denoiser::{Scales, Step, steps};
use crate::error::{Error, Result};
use crate::gpu::run::Profile;
use crate::gpu::{Buffer, DType, Gpu, Graph, Program, Tensor};
use crate::guidance::{Passes, Surroundings, denoise};
use crate::image::Image;
use crate::layout::to_nchw;
use crate::model::clip::Clip;
use crate::model::config::VaeConfig;
use crate::model::unet::UNet;
use crate::model::vae::Decoder;
use crate::noise::Generator;
use crate::ops::degrade::RADIUS;
use crate::ops::pack::pack;
use crate::parts;
use crate::request::{Generated, Memory, Precision, Progress, Request, Timings};
use crate::sampler::{Recording, sampler};
use crate::sampling::{Job, Sampling, arities, lincombs};
use crate::schedule::{Prediction, Schedule, scheduler, sigmas};
use crate::text::Tokenizer;
use crate::weights::{Files, Loader};

/// A loaded model on a device.
pub struct Pipeline {
    gpu: Gpu,
    tokenizer: Tokenizer,
    clip: Clip,
    unet: UNet,
    decoder: Decoder,
    vae_config: VaeConfig,
    schedule: Schedule,
    prediction: Prediction,
    dtype: DType,
    weights: u64,
}

impl Pipeline {
    /// Load a model onto a device.
    ///
    /// # Errors
    /// Of the files (which one, what is wrong, what to do), or of the device.
    pub async fn load(gpu: &Gpu, files: &Files, precision: Precision) -> Result<Pipeline> {
        let dtype = parts::activation_type(gpu, precision)?;
        let before = gpu.memory_in_use().0;
        let tokenizer = parts::load_tokenizer(files)?;
        let (schedule, prediction) = parts::load_schedule(files)?;
        let clip = parts::load_clip(gpu, files).await?;
        let unet = parts::load_unet(gpu, files, dtype).await?;
        let vae_config = parts::vae_config(files)?;
        if unet.config.cross_dim != clip.config.hidden_size {
            let expected = format!("{}, the text encoder's width", clip.config.hidden_size);
            return Err(Error::Unsupported {
                path: files.path("unet/config.json"),
                what: "cross_attention_dim".into(),
                expected,
                found: unet.config.cross_dim.to_string(),
            });
        }
        if unet.config.in_channels != 4 || unet.config.out_channels != 4 || vae_config.factor() != 8 {
            return Err(Error::Unsupported {
                path: files.path("unet/config.json"),
                what: "a picture".into(),
                expected: "4 latent channels and a VAE of factor 8".into(),
                found: format!("{} channels, factor {}", unet.config.in_channels, vae_config.factor()),
            });
        }
        let weights = parts::open_part(files, "vae")?;
        // f32: SDXL's decoder overflows f16, and a black picture is a bug.
        let decoder = Decoder::load(&mut Loader::new(gpu, &weights, DType::F32), &vae_config).await?;
        gpu.flush().await?;
        let weights = gpu.memory_in_use().0 - before;
        Ok(Pipeline {
            gpu: gpu.clone(),
            tokenizer,
            clip,
            unet,
            decoder,
            vae_config,
            schedule,
            prediction,
            dtype,
            weights,
        })
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The element type of the UNet's activations.
    pub fn dtype(&self) -> DType {
        self.dtype
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
        request.check()?;
        let own = self.unet.config.sample_size as u32 * 8;
        let (width, height) = (request.width.unwrap_or(own), request.height.unwrap_or(own));
        let request = Request { width: Some(width), height: Some(height), ..request.clone() };
        let job = self.job(&request)?;
        let forecast = self.forecast(&job)?;
        self.gpu.reset_peak();
        let mut profile = request.profile.then(Profile::default);

        // text → context
        let mut warnings = Vec::new();
        let ids = self.tokens(&request, job.passes, &mut warnings);
        let context = self.context(&ids, job.passes, profile.as_mut()).await?;
        let mut timings = Timings { text: ms(begin), ..Default::default() };

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
        let mut sampling = Sampling::new(&self.gpu, &self.unet, self.dtype, &job, context).await?;
        sampling.start(&unit, job.shape, self.schedule.start_scale(job.sigmas[0]));
        timings.prepare = ms(since);

        // the loop
        let since = Instant::now();
        sampling.run(&job, &mut generator, profile.as_mut(), observe).await?;
        let latents = sampling.latents(&job).await?;
        let masks = sampling.masks(&job).await?;
        timings.sample = ms(since);
        let allocator = self.gpu.allocator_bytes();
        drop(sampling);

        // latents → pictures
        let since = Instant::now();
        let images = self.decode(&latents, &job, profile.as_mut(), observe).await?;
        timings.decode = ms(since);
        timings.total = ms(begin);
        let memory =
            Memory { weights: self.weights, planned_peak: forecast, peak: self.gpu.memory_in_use().1, allocator };
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

impl Pipeline {
    fn job(&self, request: &Request) -> Result<Job> {
        let size = |pixels: Option<u32>| pixels.unwrap_or(8) as usize / 8;
        let shape = [request.batch as usize, 4, size(request.height), size(request.width)];
        assert!(
            shape[2].min(shape[3]) > RADIUS as usize,
            "request.check allows no latent that cannot be blurred: {shape:?}"
        );
        let sigmas = sigmas(&self.schedule, scheduler(&request.scheduler)?, request.steps as usize, 1.0)?;
        let exact: Vec<f64> = sigmas.iter().map(|&sigma| f64::from(sigma)).collect();
        let recording = Recording::new(sampler(&request.sampler)?, &exact);
        let scales = Scales {
            cfg: request.cfg,
            sag_scale: request.sag_scale,
            sag_blur_sigma: request.sag_blur_sigma,
            sag_threshold: request.sag_threshold,
        };
        let (calls, timesteps) = steps(&self.schedule, self.prediction, &recording.calls(), &scales);
        Ok(Job { shape, passes: Passes::of(request.cfg, request.sag_scale), sigmas, recording, calls, timesteps })
    }

    /// Record everything without a byte allocated: does it fit, and what will the peak be?
    fn forecast(&self, job: &Job) -> Result<u64> {
        let gpu = &self.gpu;
        let alignment = gpu.caps().uniform_alignment;
        let what = || format!("a picture of {}x{} (batch {})", job.shape[3] * 8, job.shape[2] * 8, job.shape[0]);
        // The first activations at full size: what cannot fit is told before it is recorded.
        let [b, h, w, _] = job.dims().map(u64::from);
        let first = b * h * w * u64::from(job.passes.prompts()) * self.unet.config.levels[0].channels as u64;
        let last = 64 * h * w * self.vae_config.block_out_channels[0] as u64;
        gpu.check_size(&what(), (first * self.dtype.bytes()).max(last * DType::F32.bytes()))?;

        let mut g = Graph::new(gpu, DType::F32);
        let x = g.argument("embeddings", self.embedding_dims(job.passes), DType::F32);
        for kv in self.text(&mut g, x) {
            g.keep_argument(kv);
        }
        let bytes = |n: u64| n.max(16).next_multiple_of(16);
        let kv = self.context_shapes(job.passes);
        let context: u64 =
            kv.iter().map(|dims| bytes(dims.iter().map(|&d| u64::from(d)).product::<u64>() * self.dtype.bytes())).sum();
        let text = g.planned_bytes(alignment) + bytes(x.bytes()) + context + 256;

        let mut g = Graph::new(gpu, self.dtype);
        let (x, out) = (g.argument("x", job.dims(), DType::F32), g.argument("denoised", job.dims(), DType::F32));
        let floats =
            |g: &mut Graph, n: usize| g.argument("floats", [1, 1, 1, n.next_multiple_of(4) as u32], DType::F32);
        let timesteps = floats(&mut g, job.timesteps.len());
        let mask = job.passes.sag.then(|| floats(&mut g, job.mask_floats()));
        let bound: Vec<_> = kv.iter().map(|&dims| g.argument("context", dims, self.dtype)).collect();
        denoise(&mut g, &self.unet, job.passes, x, &Surroundings { timesteps, context: &bound, mask }, out);
        gpu.check_graph(&what(), &g)?;
        let latent = bytes(job.shape.iter().product::<usize>() as u64 * 4);
        let latents = job.recording.plan().slots.len() as u64 * latent;
        let mask = if job.passes.sag { bytes(job.mask_floats() as u64 * 4) } else { 0 };
        let scalars = bytes(job.timesteps.len() as u64 * 4) + (job.calls.len() + lincombs(&job.recording)) as u64 * 256;
        let lincomb_dims = arities(&job.recording).len() as u64 * 16;
        // Latents and masks are read back one after the other while the loop's buffers still live.
        let readback = latent.max(mask);
        let sample = g.planned_bytes(alignment) + context + latents + mask + scalars + lincomb_dims + readback;

        let mut g = Graph::new(gpu, DType::F32);
        let [_, h, w, c] = job.dims();
        let z = g.argument("latent", [1, h, w, c], DType::F32);
        let z = pack(&mut g, z, 1);
        let picture = self.decoder.forward(&mut g, z);
        g.keep_argument(picture);
        gpu.check_graph(&what(), &g)?;
        let pixels = bytes(picture.bytes());
        let decode = g.planned_bytes(alignment) + 2 * pixels + bytes(latent / job.shape[0] as u64) + 256;
        let stage = text.max(sample).max(decode);
        gpu.check_memory(&what(), stage)?;
        Ok(gpu.memory_in_use().0 + stage)
    }

    fn tokens(&self, request: &Request, passes: Passes, warnings: &mut Vec<String>) -> Vec<u32> {
        let mut ids = Vec::new();
        let prompts = [("negative prompt", &request.negative_prompt), ("prompt", &request.prompt)];
        for (what, prompt) in &prompts[usize::from(!passes.uncond)..] {
            let tokens = self.tokenizer.encode(prompt);
            if tokens.truncated > 0 {
                let kept = tokens.ids.len() - 2;
                warnings.push(format!(
                    "the {what} has {} tokens, the text model reads {kept}: the last {} were left out",
                    kept + tokens.truncated,
                    tokens.truncated
                ));
            }
            ids.extend(tokens.ids);
        }
        ids
    }

    /// Dims of the keys and values of every cross-attention.
    fn context_shapes(&self, passes: Passes) -> Vec<[u32; 4]> {
        let tokens = self.clip.config.max_position_embeddings as u32;
        self.unet.context_widths().map(|width| [passes.prompts(), 1, tokens, width]).collect()
    }

    fn embedding_dims(&self, passes: Passes) -> [u32; 4] {
        let config = &self.clip.config;
        [passes.prompts(), 1, config.max_position_embeddings as u32, config.hidden_size as u32]
    }

    /// Embeddings to the keys and values of every cross-attention; the text model in f32, these in the UNet's type.
    fn text(&self, g: &mut Graph, embeddings: Tensor) -> Vec<Tensor> {
        let hidden = self.clip.forward(g, embeddings);
        g.dtype = self.dtype;
        self.unet.context(g, hidden)
    }

    /// Prompts to the keys and values of every cross-attention, in buffers that outlive the loop.
    async fn context(
        &self,
        ids: &[u32],
        passes: Passes,
        profile: Option<&mut Profile>,
    ) -> Result<Vec<(Buffer, [u32; 4])>> {
        let gpu = &self.gpu;
        let embeddings = gpu.upload("embeddings", &self.clip.embed(ids)?).await?;
        let mut g = Graph::new(gpu, DType::F32);
        let x = g.bind("embeddings", &embeddings, self.embedding_dims(passes), DType::F32);
        let mut buffers = Vec::new();
        for kv in self.text(&mut g, x) {
            let buffer = gpu.storage("context", kv.bytes()).await?;
            g.keep(kv, &buffer);
            buffers.push((buffer, kv.dims));
        }
        run_once(gpu, g, &Step::default(), profile).await?;
        Ok(buffers)
    }

    async fn decode(
        &self,
        latents: &[f32],
        job: &Job,
        mut profile: Option<&mut Profile>,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Vec<Image>> {
        let gpu = &self.gpu;
        let [batch, h, w, c] = job.dims();
        let z = gpu.storage("latent", u64::from(h * w * c) * 4).await?;
        let mut g = Graph::new(gpu, DType::F32);
        let bound = g.bind("latent", &z, [1, h, w, c], DType::F32);
        let packed = pack(&mut g, bound, 1);
        let picture = self.decoder.forward(&mut g, packed);
        let pixels = gpu.storage("picture", picture.bytes()).await?;
        g.keep(picture, &pixels);
        let program = Program::new(gpu, g).await?;
        let scalars = gpu.steps(&[Step { c_in: 1.0 / self.vae_config.scaling_factor, ..Default::default() }]).await?;
        let mut images = Vec::new();
        for (i, latent) in latents.chunks_exact((h * w * c) as usize).enumerate() {
            z.write(latent);
            let mut step = gpu.record(profile.is_some());
            step.run(&program, &[], &scalars, 0);
            step.submit(profile.as_deref_mut()).await?;
            let data: Vec<f32> = pixels.read(picture.len() as usize).await?;
            images.push(Image::from_nhwc(&data, picture.width(), picture.height(), 4)?);
            if observe(Progress::Decoded { done: i as u32 + 1, batch }).is_break() {
                return Err(Error::Cancelled);
            }
        }
        Ok(images)
    }
}

/// Plan, run and drop a graph.
pub(crate) async fn run_once(gpu: &Gpu, g: Graph, scalars: &Step, profile: Option<&mut Profile>) -> Result<()> {
    let program = Program::new(gpu, g).await?;
    let scalars = gpu.steps(&[*scalars]).await?;
    let mut step = gpu.record(profile.is_some());
    step.run(&program, &[], &scalars, 0);
    step.submit(profile).await?;
    gpu.wait().await
}
