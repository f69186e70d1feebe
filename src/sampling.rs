//! The sampler's loop on the device: a recording replayed, one submit a step, with cancellation between steps.

use std::ops::ControlFlow;
use std::pin::Pin;

use crate::conditioning::Conditioning;
use crate::denoiser::Step;
use crate::error::{Error, Result};
use crate::gpu::profile::Profile;
use crate::gpu::run::Steps;
use crate::gpu::tune::{Observe, Subject};
use crate::gpu::{Buffer, DType, Gpu, Graph, Program, Reading};
use crate::guidance::{Passes, Surroundings, denoise};
use crate::layout::to_nhwc;
use crate::model::blocks::ContextKv;
use crate::model::unet::{Folded, UNet};
use crate::noise::Generator;
use crate::ops::blend::Kept;
use crate::ops::degrade::mask_stride;
use crate::ops::lincomb::{MAX_TERMS, lincomb};
use crate::pipeline::{Text, submit_once};
use crate::request::Progress;
use crate::sampler::{Command, Latent, Recording};

/// A request turned into numbers.
pub(crate) struct Job {
    pub shape: [usize; 4],
    pub passes: Passes,
    pub sigmas: Vec<f32>,
    pub recording: Recording,
    pub calls: Vec<Step>,
    pub timesteps: Vec<f32>,
    /// The model sees mask and masked picture itself: nine channels.
    pub sees_masks: bool,
    /// What is outside a mask is put back at every step.
    pub masked: bool,
    /// Memory is short: see [`Graph::frugal`].
    pub frugal: bool,
}

/// The picture to start from.
#[derive(Default)]
pub(crate) struct Given {
    /// Its latents [h, w, 4] in the UNet's scale.
    pub picture: Option<Vec<f32>>,
    /// [h, w], 1 where it is repainted.
    pub mask: Option<Vec<f32>>,
    /// What an inpainting model sees beside x, [h, w, 8].
    pub shown: Option<Vec<f32>>,
}

impl Job {
    pub fn dims(&self) -> [u32; 4] {
        let [b, c, h, w] = self.shape.map(|n| n as u32);
        [b, h, w, c]
    }

    pub fn mask_floats(&self) -> usize {
        let [b, h, w, _] = self.dims();
        self.calls.len() * (b * mask_stride(h, w)) as usize
    }
}

/// Dispatches of the first denoising that are bound and submitted at once.
const PART: usize = 100;

/// Numbers of terms that the recording's linear combinations have, each once.
pub(crate) fn arities(recording: &Recording) -> Vec<usize> {
    let terms = |command: &Command| match command {
        Command::Lincomb { terms, .. } => Some(terms.len()),
        _ => None,
    };
    let mut all: Vec<usize> = recording.steps.iter().flatten().filter_map(terms).collect();
    all.sort_unstable();
    all.dedup();
    all
}

pub(crate) fn lincombs(recording: &Recording) -> usize {
    recording.steps.iter().flatten().filter(|command| matches!(command, Command::Lincomb { .. })).count()
}

/// The linear combination of so many terms.
fn of_terms(programs: &mut [(usize, Program)], terms: usize) -> &mut Program {
    match programs.iter_mut().find(|(arity, _)| *arity == terms) {
        Some((_, program)) => program,
        None => unreachable!("a program for every number of terms, also {terms}"),
    }
}

/// The sampler's loop on the device: programs, latents, scalars.
pub(crate) struct Sampling {
    gpu: Gpu,
    latents: Vec<Buffer>,
    slot_of: Vec<usize>,
    denoise: Program,
    lincombs: Vec<(usize, Program)>,
    scalars: Steps,
    coefficients: Steps,
    mask: Option<Buffer>,
    prepared: Prepared,
}

/// What is computed once before the loop, in buffers that outlive it.
struct Prepared {
    /// What every cross-attention knows of the prompts, and where.
    context: Vec<(ContextKv, Vec<Buffer>)>,
    /// The UNet's folded weights, and where.
    folded: (Folded, Vec<Buffer>),
    /// Time projections of all calls.
    times: (Buffer, [u32; 4]),
}

impl Prepared {
    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        self.context.iter().flat_map(|(_, buffers)| buffers).chain(&self.folded.1).chain([&self.times.0])
    }
}

/// Text to keys and values; timesteps, and what SDXL adds to them, to time projections: submitted, and computed while the host records
/// the loop. Into the buffers of `known`, if there is one of the same shapes, whose weights stay folded.
async fn prepare(
    gpu: &Gpu,
    unet: &UNet,
    dtype: DType,
    text: &Text,
    job: &Job,
    known: Option<&Prepared>,
) -> Result<Prepared> {
    let Conditioning { prompts, tokens, width, ref hidden, .. } = text.conditioning;
    let states = gpu.upload("hidden states", hidden).await?;
    let mut g = Graph::new(gpu, dtype);
    let x = g.bind("hidden states", &states, [prompts as u32, 1, tokens as u32, width as u32], DType::F32);
    let mut context = Vec::new();
    let mut there = known.iter().flat_map(|known| &known.context).flat_map(|(_, buffers)| buffers);
    for kv in unet.context(&mut g, x) {
        let mut buffers = Vec::new();
        for tensor in kv.tensors() {
            let buffer = match there.next() {
                Some(buffer) => buffer.clone(),
                None => gpu.scratch("context", tensor.bytes()).await?,
            };
            g.keep(tensor, &buffer);
            buffers.push(buffer);
        }
        context.push((kv, buffers));
    }
    let [_, h, w, _] = job.dims();
    g.frugal = job.frugal;
    let folded = match known {
        Some(known) => known.folded.clone(),
        None => {
            let folded = unet.folded(&mut g, [h, w]);
            let mut buffers = Vec::new();
            for tensor in folded.tensors() {
                let buffer = gpu.scratch("folded weights", tensor.bytes()).await?;
                g.keep(tensor, &buffer);
                buffers.push(buffer);
            }
            (folded, buffers)
        }
    };
    submit_once(gpu, g, &Step::default(), None).await?;
    drop(states);

    let mut g = Graph::new(gpu, DType::F32);
    let timesteps = gpu.upload("timesteps", &job.timesteps).await?;
    let t = g.bind("timesteps", &timesteps, [1, 1, 1, (timesteps.bytes() / 4) as u32], DType::F32);
    let rows = match text.added.is_empty() {
        true => None,
        false => Some(gpu.upload("added rows", &text.added).await?),
    };
    let added = rows.as_ref().and_then(|rows| {
        let x = g.bind("added rows", rows, [1, 1, prompts as u32, (text.added.len() / prompts) as u32], DType::F32);
        unet.added(&mut g, x)
    });
    let times = unet.times(&mut g, t, [job.timesteps.len() as u32, 1], added);
    let buffer = match known {
        Some(known) => known.times.0.clone(),
        None => gpu.storage("times", times.bytes()).await?,
    };
    g.keep(times, &buffer);
    submit_once(gpu, g, &Step::default(), None).await?;
    Ok(Prepared { context, folded, times: (buffer, times.dims) })
}

/// What one denoising reads and writes beside its latents, in buffers.
struct Bound<'a> {
    unet: &'a UNet,
    job: &'a Job,
    prepared: &'a Prepared,
    mask: Option<Buffer>,
    shown: Option<Buffer>,
    kept: Option<[Buffer; 3]>,
}

impl Bound<'_> {
    /// Record one denoising; its arguments are x and denoised, [B, h, w, 4] f32.
    fn record(&self, g: &mut Graph) {
        let dims = self.job.dims();
        let [_, h, w, _] = dims;
        let (x, denoised) = (g.argument("x", dims, DType::F32), g.argument("denoised", dims, DType::F32));
        let floats = |buffer: &Buffer| [1, 1, 1, (buffer.bytes() / 4) as u32];
        let times = &self.prepared.times;
        let mut context = Vec::new();
        for (kv, buffers) in &self.prepared.context {
            let mut buffers = buffers.iter();
            context.push(kv.map(|t| match buffers.next() {
                Some(buffer) => g.bind("context", buffer, t.dims, t.dtype),
                None => unreachable!("a buffer for each tensor"),
            }));
        }
        let (folded, buffers) = &self.prepared.folded;
        let mut buffers = buffers.iter();
        let around = Surroundings {
            times: g.bind("times", &times.0, times.1, DType::F32),
            mask: self.mask.as_ref().map(|mask| g.bind("masks", mask, floats(mask), DType::F32)),
            context: &context,
            folded: &folded.map(|t| match buffers.next() {
                Some(buffer) => g.bind("folded weights", buffer, t.dims, t.dtype),
                None => unreachable!("a buffer for each tensor"),
            }),
            extra: self.shown.as_ref().map(|b| g.bind("mask and masked picture", b, [1, h, w, 8], DType::F32)),
            kept: self.kept.as_ref().map(|[mask, picture, noise]| Kept {
                mask: g.bind("mask", mask, floats(mask), DType::F32),
                picture: g.bind("picture", picture, [1, h, w, dims[3]], DType::F32),
                noise: g.bind("start noise", noise, dims, DType::F32),
            }),
        };
        denoise(g, self.unet, self.job.passes, x, &around, denoised);
    }
}

impl Sampling {
    /// `unit`: the start noise [B, 4, h, w]. `tune`: measure the UNet's kernels first; it hears how far that is.
    #[allow(clippy::too_many_arguments)] // Each is another thing, and the one caller has them all at hand.
    pub async fn new(
        gpu: &Gpu,
        unet: &UNet,
        dtype: DType,
        job: &Job,
        text: &Text,
        given: &Given,
        unit: &[f32],
        tune: Option<&mut Observe<'_>>,
    ) -> Result<Sampling> {
        let prepared = prepare(gpu, unet, dtype, text, job, None).await?;
        let dims = job.dims();
        let bytes = job.shape.iter().product::<usize>() as u64 * 4;
        let plan = job.recording.plan();
        let mut latents = Vec::new();
        for _ in &plan.slots {
            latents.push(gpu.storage("latent", bytes).await?);
        }
        let mask = match job.passes.sag {
            true => Some(gpu.storage("masks", job.mask_floats() as u64 * 4).await?),
            false => None,
        };
        let shown = match &given.shown {
            None => None,
            Some(shown) => Some(gpu.upload("mask and masked picture", shown).await?),
        };
        let kept = kept(gpu, job, given, unit).await?;
        let scalars = gpu.steps(&job.calls).await?;
        let bound = Bound { unet, job, prepared: &prepared, mask: mask.clone(), shown, kept };
        if let Some(observe) = tune {
            let spare = gpu.storage("latent", bytes).await?;
            let arguments = [&latents[0], &spare];
            let record = |g: &mut Graph| bound.record(g);
            gpu.tune(&Subject { dtype, record: &record, arguments: &arguments, steps: &scalars }, observe).await?;
        }
        let mut g = Graph::new(gpu, dtype);
        bound.record(&mut g);
        let denoise = Program::unbound(gpu, g).await?;

        let mut lincombs = Vec::new();
        for terms in arities(&job.recording) {
            let mut g = Graph::new(gpu, DType::F32);
            let out = g.argument("out", dims, DType::F32);
            let inputs: Vec<_> = (0..terms).map(|_| g.argument("term", dims, DType::F32)).collect();
            lincomb(&mut g, out, &inputs);
            lincombs.push((terms, Program::new(gpu, g).await?));
        }
        Ok(Sampling {
            gpu: gpu.clone(),
            latents,
            slot_of: plan.slot_of,
            denoise,
            lincombs,
            scalars,
            coefficients: gpu.steps(&all_coefficients(job)).await?,
            mask,
            prepared,
        })
    }

    /// The same loop for another picture: other prompts, scales and start, but a job of the same shapes and passes, sampler, steps and weights, and nothing
    /// given.
    pub async fn again(&mut self, unet: &UNet, dtype: DType, job: &Job, text: &Text) -> Result<()> {
        self.prepared = prepare(&self.gpu, unet, dtype, text, job, Some(&self.prepared)).await?;
        self.scalars.write(&job.calls);
        self.coefficients.write(&all_coefficients(job));
        Ok(())
    }

    /// Bytes of its buffers.
    pub fn bytes(&self) -> u64 {
        let buffers =
            self.latents.iter().chain(&self.mask).chain(self.prepared.buffers()).map(Buffer::bytes).sum::<u64>();
        let programs = self.lincombs.iter().map(|(_, program)| program).chain([&self.denoise]).map(Program::bytes);
        buffers + programs.sum::<u64>() + self.scalars.bytes() + self.coefficients.bytes()
    }

    fn buffer(&self, latent: Latent) -> Buffer {
        self.latents[self.slot_of[latent.0]].clone()
    }

    /// x = unit noise · scale, and the picture to start from.
    pub fn start(&self, job: &Job, given: &Given, unit: &[f32], scale: f32) {
        let mut x: Vec<f32> = to_nhwc(unit, job.shape).iter().map(|n| n * scale).collect();
        if let Some(picture) = &given.picture {
            x.iter_mut().zip(picture.iter().cycle()).for_each(|(x, p)| *x += p);
        }
        self.buffer(Recording::START).write(&x);
    }

    /// Replay the recording: one submit a step, at most two steps in flight. `meanwhile` is what the host does once there are. The last step may be
    /// under way when this returns: see [`Running::finish`].
    pub async fn run(
        &mut self,
        job: &Job,
        generator: &mut Generator,
        mut profile: Option<&mut Profile>,
        observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
        meanwhile: Pin<&mut dyn Future<Output = ()>>,
    ) -> Result<Running<impl Future<Output = Result<()>> + use<>>> {
        let mut meanwhile = Some(meanwhile);
        let steps = job.recording.steps.len();
        let mut stop = observe(Progress::Start { steps }).is_break();
        let (mut call, mut combination) = (0, 0);
        let mut in_flight = None;
        for (i, commands) in job.recording.steps.iter().enumerate() {
            if stop {
                break;
            }
            let mut step = self.gpu.record(profile.is_some());
            for command in commands {
                match command {
                    Command::Noise { out } => {
                        let unit = generator.randn(job.shape.iter().product());
                        self.buffer(*out).write(&to_nhwc(&unit, job.shape));
                    }
                    Command::Denoise { out, x, .. } => {
                        let arguments = [&self.buffer(*x), &self.buffer(*out)];
                        if call == 0 && profile.is_none() {
                            step.submit(None).await?;
                            step = self.first(&arguments).await?;
                        } else {
                            self.denoise.prepare(&arguments).await?;
                            step.run(&self.denoise, &arguments, &self.scalars, call);
                        }
                        call += 1;
                    }
                    Command::Lincomb { out, terms } => {
                        let buffers = self.operands(*out, terms);
                        let arguments: Vec<&Buffer> = buffers.iter().collect();
                        let program = of_terms(&mut self.lincombs, terms.len());
                        program.prepare(&arguments).await?;
                        step.run(program, &arguments, &self.coefficients, combination);
                        combination += 1;
                    }
                }
            }
            step.submit(profile.as_deref_mut()).await?;
            let ticket = self.gpu.ticket();
            if in_flight.is_some()
                && let Some(meanwhile) = meanwhile.take()
            {
                meanwhile.await;
            }
            if let Some(before) = in_flight.replace(ticket) {
                before.await?;
                stop = observe(Progress::Step { done: i, steps }).is_break();
            }
        }
        Ok(Running { last: in_flight, stop, steps })
    }

    /// Where the final latents [B, h, w, 4] are, or will be.
    pub fn result(&self, job: &Job) -> Buffer {
        self.buffer(job.recording.result.unwrap_or(Recording::START))
    }

    /// The first denoising, in parts: the device has begun when the last is bound. What is then left to submit.
    async fn first(&mut self, arguments: &[&Buffer]) -> Result<crate::gpu::run::Recording> {
        let nodes = self.denoise.nodes().len();
        let mut step = self.gpu.record(false);
        for from in (0..nodes).step_by(PART) {
            let part = from..nodes.min(from + PART);
            self.denoise.prepare_nodes(arguments, part.clone()).await?;
            step.run_nodes(&self.denoise, arguments, (&self.scalars, 0), part);
            step.submit(None).await?;
            step = self.gpu.record(false);
        }
        Ok(step)
    }

    fn operands(&self, out: Latent, terms: &[(f64, Latent)]) -> Vec<Buffer> {
        std::iter::once(out).chain(terms.iter().map(|(_, latent)| *latent)).map(|latent| self.buffer(latent)).collect()
    }

    /// Have the results read back, when everything submitted so far is done.
    pub async fn results(&self, job: &Job) -> Result<Results> {
        let floats = |count: usize| count as u64 * 4;
        let latents = self.result(job).begin_read(floats(job.shape.iter().product())).await?;
        let masks = match &self.mask {
            Some(mask) => Some(mask.begin_read(floats(job.mask_floats())).await?),
            None => None,
        };
        Ok(Results { device: self.gpu.caps().name.clone(), latents, masks })
    }
}

/// What a loop leaves, on its way to the host.
pub(crate) struct Results {
    device: String,
    latents: Reading,
    masks: Option<Reading>,
}

impl Results {
    /// The final latents [B, h, w, 4], and the masks of all calls, [calls][B · h · w].
    ///
    /// # Errors
    /// Of the device; [`Error::Device`] for latents that are not finite.
    pub async fn finish(self, job: &Job) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
        let latents = self.latents.finish(<[f32]>::to_vec).await?;
        if !latents.iter().all(|value| value.is_finite()) {
            return Err(Error::Device {
                device: self.device,
                what: "the sampler".into(),
                reason: "the latents are not finite; try --precision f32, a lower cfg or another sampler".into(),
            });
        }
        let Some(masks) = self.masks else { return Ok((latents, Vec::new())) };
        let [b, h, w, _] = job.dims();
        let (stride, area) = (mask_stride(h, w) as usize, (h * w) as usize);
        let images = |call: &[f32]| call.chunks_exact(stride).flat_map(|image| image[..area].to_vec()).collect();
        let all = |all: &[f32]| all.chunks_exact(b as usize * stride).map(images).collect();
        Ok((latents, masks.finish(all).await?))
    }
}

/// A loop of which all is submitted, unless it was stopped.
pub(crate) struct Running<F> {
    /// The last step that was.
    last: Option<F>,
    /// Was it stopped?
    pub stop: bool,
    steps: usize,
}

impl<F: Future<Output = Result<()>>> Running<F> {
    /// Wait for the last step, and tell.
    pub async fn finish(mut self, observe: &mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        if let Some(last) = self.last {
            last.await?;
            let steps = self.steps;
            self.stop = self.stop || observe(Progress::Step { done: steps, steps }).is_break();
        }
        if self.stop { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// What stays of a picture outside a mask: mask, picture, noise.
async fn kept(gpu: &Gpu, job: &Job, given: &Given, unit: &[f32]) -> Result<Option<[Buffer; 3]>> {
    let (Some(mask), Some(picture)) = (&given.mask, &given.picture) else { return Ok(None) };
    let mut floats = mask.clone();
    floats.resize(mask.len().next_multiple_of(4), 0.0);
    let noise = gpu.upload("start noise", &to_nhwc(unit, job.shape)).await?;
    let (mask, picture) = (gpu.upload("mask", &floats).await?, gpu.upload("picture", picture).await?);
    Ok(Some([mask, picture, noise]))
}

/// Of all linear combinations, in order.
fn all_coefficients(job: &Job) -> Vec<[f32; MAX_TERMS]> {
    job.recording.steps.iter().flatten().filter_map(coefficients).collect()
}

fn coefficients(command: &Command) -> Option<[f32; MAX_TERMS]> {
    let Command::Lincomb { terms, .. } = command else { return None };
    Some(std::array::from_fn(|i| terms.get(i).map_or(0.0, |(c, _)| *c as f32)))
}
