//! Denoising steps of a model, and whole pictures: wall time, device time by op, and how long the device idles.

use std::ops::ControlFlow;
use std::pin::pin;

use web_time::Instant;

use super::Samples;
use crate::error::{Error, Result};
use crate::gpu::profile::{Profile, ProfileRow};
use crate::gpu::tune::Observe;
use crate::noise::Generator;
use crate::pipeline::Pipeline;
use crate::request::{Progress, Request, Timings};
use crate::sampling::{Given, Sampling};

/// Which passes a step makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Passes {
    /// The prompt alone.
    One,
    /// Prompt and negative prompt.
    Cfg,
    /// And the degraded picture.
    CfgSag,
}

/// One kind of step.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    /// Its passes.
    pub passes: Passes,
    /// Pictures.
    pub batch: u32,
    /// Wall time of a step, sampler and all.
    pub times: Samples,
    /// Launches of a step.
    pub dispatches: u64,
    /// Device milliseconds of a step by op, each timed alone, the slowest first.
    pub ops: Vec<ProfileRow>,
    /// Their sum.
    pub device_ms: f64,
    /// The share of the wall time in which no op runs; below 0 where timing each alone costs more than the gaps.
    pub idle: f64,
}

/// Steps of a loop.
const STEPS: usize = 10;
/// Loops.
const LOOPS: usize = 5;

/// Measure the steps of `request` (its size, scales, sampler) with some passes, for each batch size that fits.
///
/// # Errors
/// Of the request; [`Error::DoesNotFit`]; of the device; [`Error::Device`] if two loops end in different latents.
pub async fn step(pipeline: &Pipeline, request: &Request, passes: Passes, batch: u32) -> Result<Row> {
    let (cfg, sag_scale) = match passes {
        Passes::One => (1.0, 0.0),
        Passes::Cfg => (request.cfg, 0.0),
        Passes::CfgSag => (request.cfg, request.sag_scale),
    };
    let request = Request { cfg, sag_scale, batch, steps: STEPS as u32, ..request.clone() };
    let request = pipeline.whole(&request)?;
    let mut job = pipeline.job(&request)?;
    job.frugal = pipeline.forecast(&request, &job, true).await?.frugal;
    let text = pipeline.text(&request, job.passes, None).await?;
    let unit = Generator::new(request.seed).randn(job.shape.iter().product());
    let given = Given::default();
    let unet = pipeline.unet().await?;
    let gpu = pipeline.gpu();
    let mut tuned = |_, _| ControlFlow::Continue(());
    let tune = request.autotune.then_some(&mut tuned as &mut Observe<'_>);
    let mut sampling = Sampling::new(gpu, &unet, pipeline.dtype(), &job, &text, &given, &unit, tune).await?;
    let scale = pipeline.start_scale(&job);
    let mut once = async |profile: Option<&mut Profile>| -> Result<(f64, Vec<f32>)> {
        sampling.start(&job, &given, &unit, scale);
        let since = Instant::now();
        let mut observe = |_: Progress| ControlFlow::Continue(());
        let running =
            sampling.run(&job, &mut Generator::new(request.seed), profile, &mut observe, pin!(async {})).await?;
        running.finish(&mut observe).await?;
        let ms = since.elapsed().as_secs_f64() * 1e3;
        Ok((ms, sampling.results(&job).await?.finish(&job).await?.0))
    };
    // The first loop warms caches and clock, and tells what all others must find.
    let (_, expected) = once(None).await?;
    let mut times = Vec::new();
    for _ in 0..LOOPS {
        let (ms, latents) = once(None).await?;
        if latents != expected {
            return Err(Error::Device {
                device: gpu.caps().name.clone(),
                what: "the sampler".into(),
                reason: "two runs of the same loop ended in different latents".into(),
            });
        }
        times.push(ms / STEPS as f64);
    }
    let mut profile = Profile::default();
    once(Some(&mut profile)).await?;
    let mut ops = profile.rows();
    for row in &mut ops {
        row.ms /= STEPS as f64;
        row.flops /= STEPS as u64;
        row.count /= STEPS as u64;
    }
    let device_ms: f64 = ops.iter().map(|row| row.ms).sum();
    let dispatches = ops.iter().map(|row| row.count).sum();
    let times = Samples::of(times);
    let idle = 1.0 - device_ms / times.median_ms;
    Ok(Row { passes, batch, times, dispatches, ops, device_ms, idle })
}

/// Prompt to pixels.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Picture {
    /// All of it.
    pub times: Samples,
    /// The stages of the run in the middle, milliseconds.
    pub stages: Timings,
    /// The stages of the first run, which compiles or reads what was compiled.
    pub first: Timings,
    /// Bytes on the device at peak.
    pub peak: u64,
}

/// Measure pictures: one to warm, then `repeats`.
///
/// # Errors
/// As [`Pipeline::generate`]; [`Error::Device`] if two runs make different pictures.
pub async fn picture(pipeline: &Pipeline, request: &Request, repeats: usize) -> Result<Picture> {
    let mut observe = |_: Progress| ControlFlow::Continue(());
    let first = pipeline.generate(request, &mut observe).await?;
    let mut runs = Vec::new();
    for _ in 0..repeats.max(1) {
        let made = pipeline.generate(request, &mut observe).await?;
        if made.images != first.images {
            return Err(Error::Device {
                device: pipeline.gpu().caps().name.clone(),
                what: "the pipeline".into(),
                reason: "two runs of the same request made different pictures".into(),
            });
        }
        runs.push(made.timings);
    }
    runs.sort_by(|a, b| a.total.total_cmp(&b.total));
    let stages = runs[(runs.len() - 1) / 2];
    let times = Samples::of(runs.iter().map(|run| run.total).collect());
    Ok(Picture { times, stages, first: first.timings, peak: first.memory.peak })
}
