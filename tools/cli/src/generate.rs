//! `scumble generate`: a picture of a prompt, with its settings inside.

use std::path::{Path, PathBuf};

use scumble::disk::write_atomic;
use scumble::image::Image;
use scumble::probe::HostTensor;
use scumble::sampler::sampler;
use scumble::schedule::scheduler;
use scumble::{Error, Generated, Pipeline, Request, Result};
use serde_json::json;

use crate::args::GenerateArgs;
use crate::options::ModelArgs;
use crate::progress::Bar;
use crate::tensors;

/// Run the command.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let request = args.request()?;
    if args.mask_out.is_some() && request.sag_scale == 0.0 {
        return Err(Error::invalid("--mask-out", "SAG switched on", "--no-sag or --sag-scale 0"));
    }
    let paths = outputs(args.out.as_deref(), request.seed, request.batch);
    check_writable(&paths)?;
    let (pipeline, load_ms) = args.load()?;
    let made = make(&pipeline, &request, "generate")?;
    let parameters = parameters(&made.request, &args.model);
    let request_json = json!(made.request).to_string();
    for (image, path) in made.images.iter().zip(&paths) {
        write_atomic(path, &image.encode_png(&[("parameters", &parameters), ("scumble", &request_json)])?)?;
    }
    write_extras(args, &made)?;
    report(args, &pipeline, load_ms, &made, &paths);
    Ok(())
}

/// Generate behind a progress bar, and say the settings and the warnings.
pub fn make(pipeline: &Pipeline, request: &Request, label: &str) -> Result<Generated> {
    eprintln!("{}", settings(request, pipeline));
    let bar = Bar::new(label);
    let made = pollster::block_on(pipeline.generate(request, &mut bar.observe()))?;
    drop(bar);
    for warning in &made.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(made)
}

fn settings(r: &Request, pipeline: &Pipeline) -> String {
    let sag = match r.sag_scale {
        0.0 => "no SAG".into(),
        scale => format!("SAG {scale} (blur {}, threshold {})", r.sag_blur_sigma, r.sag_threshold),
    };
    let caps = pipeline.gpu().caps();
    format!(
        "seed {}, {} steps of {}/{}, cfg {}, {sag}, on {} ({:?})",
        r.seed,
        r.steps,
        r.sampler,
        r.scheduler,
        r.cfg,
        caps.name,
        pipeline.dtype()
    )
}

/// The files of a batch: NAME.png, or NAME-1.png and so on. Without a name: scumble-SEED.png, or a later number if it is taken.
pub fn outputs(out: Option<&Path>, seed: u64, batch: u32) -> Vec<PathBuf> {
    let numbered = |path: &Path, i: u32| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let extension = path.extension().map_or("png".into(), |e| e.to_string_lossy());
        path.with_file_name(format!("{stem}-{i}.{extension}"))
    };
    let of_batch = |path: &Path| match batch {
        1 => vec![path.to_owned()],
        _ => (1..=batch).map(|i| numbered(path, i)).collect(),
    };
    if let Some(path) = out {
        return of_batch(path);
    }
    let first = PathBuf::from(format!("scumble-{seed}.png"));
    let later = (2..).map(|i| numbered(&first, i));
    let free = std::iter::once(first.clone()).chain(later).map(|path| of_batch(&path));
    free.into_iter().find(|paths| !paths.iter().any(|path| path.exists())).unwrap_or_default()
}

/// An output that cannot be written is told before the work, not after it.
pub fn check_writable(paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        if path.is_dir() || path.file_name().is_none() {
            return Err(Error::file(path, "this is a folder, expected a file name", "choose another output with -o"));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !folder.is_dir() {
            return Err(Error::file(
                path,
                "cannot be written: its folder does not exist",
                "choose another output with -o",
            ));
        }
        let trial = folder.join(format!(".scumble-{}.part", std::process::id()));
        let tried = std::fs::write(&trial, b"");
        let _ = std::fs::remove_file(&trial);
        tried.map_err(|e| Error::file(path, format!("cannot be written: {e}"), "choose another output with -o"))?;
    }
    Ok(())
}

/// A1111's infotext: prompt, negative prompt, settings.
pub fn parameters(r: &Request, model: &ModelArgs) -> String {
    let mut text = r.prompt.clone();
    if !r.negative_prompt.is_empty() {
        text += &format!("\nNegative prompt: {}", r.negative_prompt);
    }
    let label = sampler(&r.sampler).map_or(r.sampler.as_str(), |s| s.label);
    let schedule = scheduler(&r.scheduler).map_or(r.scheduler.as_str(), |s| s.label);
    text += &format!(
        "\nSteps: {}, Sampler: {label}, Schedule type: {schedule}, CFG scale: {}, Seed: {}, Size: {}x{}",
        r.steps,
        r.cfg,
        r.seed,
        r.width.unwrap_or(0),
        r.height.unwrap_or(0)
    );
    text += &format!(", Model: {}", model.name());
    if let Some(init) = &r.init {
        text += &format!(", Denoising strength: {}", r.denoise);
        if init.mask.is_some() {
            text += &format!(", Mask blur: {}", init.feather);
        }
    }
    if let Some(skip) = r.clip_skip {
        text += &format!(", Clip skip: {skip}");
    }
    let loras: Vec<String> = model.loras().iter().map(|(name, strength)| format!("{name}: {strength}")).collect();
    if !loras.is_empty() {
        text += &format!(", LoRAs: \"{}\"", loras.join(", "));
    }
    if r.sag_scale != 0.0 {
        text += &format!(
            ", SAG scale: {}, SAG blur sigma: {}, SAG threshold: {}",
            r.sag_scale, r.sag_blur_sigma, r.sag_threshold
        );
    }
    text + &format!(", Version: scumble {}", env!("CARGO_PKG_VERSION"))
}

/// `--latents-out` and `--mask-out`.
pub fn write_extras(args: &GenerateArgs, made: &Generated) -> Result<()> {
    if let Some(path) = &args.latents_out {
        tensors::write(path, &[("latents", &HostTensor::new(made.shape, made.latents.clone()))])?;
    }
    let Some(folder) = &args.mask_out else { return Ok(()) };
    std::fs::create_dir_all(folder)
        .map_err(|e| Error::file(folder, format!("cannot be made: {e}"), "choose another --mask-out"))?;
    let [b, _, h, w] = made.shape;
    let picture = |values: &[f32], max: f32| {
        let image = Image::from_gray(values, w as u32, (b * h) as u32, max);
        image.resize_nearest(w as u32 * 8, (b * h) as u32 * 8).encode_png(&[])
    };
    for (i, mask) in made.masks.iter().enumerate() {
        write_atomic(&folder.join(format!("mask-{:03}.png", i + 1)), &picture(mask, 1.0)?)?;
    }
    write_atomic(&folder.join("mask-sum.png"), &picture(&sum(&made.masks), made.masks.len() as f32)?)?;
    let all = HostTensor::new([made.masks.len(), b, h, w], made.masks.concat());
    tensors::write(&folder.join("masks.safetensors"), &[("masks", &all)])
}

/// How often each place was masked.
pub fn sum(masks: &[Vec<f32>]) -> Vec<f32> {
    let mut total = vec![0.0; masks.first().map_or(0, Vec::len)];
    for mask in masks {
        total.iter_mut().zip(mask).for_each(|(t, m)| *t += m);
    }
    total
}

/// What was made: as JSON on stdout, or in words on stderr.
pub fn report(args: &GenerateArgs, pipeline: &Pipeline, load_ms: f64, made: &Generated, paths: &[PathBuf]) {
    let rows = made.profile.as_ref().map(|profile| profile.rows()).unwrap_or_default();
    if args.json {
        let files: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        let report = json!({
            "files": files,
            "request": made.request,
            "device": pipeline.gpu().caps().name,
            "precision": pipeline.dtype(),
            "sigmas": made.sigmas,
            "warnings": made.warnings,
            "load_ms": load_ms,
            "timings_ms": made.timings,
            "memory": made.memory,
            "peak_gpu_bytes": made.memory.peak,
            "profile": rows,
        });
        crate::print(report);
        return;
    }
    let t = &made.timings;
    eprintln!(
        "load {:.2} s, text {:.2} s, prepare {:.2} s, sample {:.2} s ({:.2} it/s), decode {:.2} s, total {:.2} s; GPU memory at peak {:.0} MB",
        load_ms / 1e3,
        t.text / 1e3,
        t.prepare / 1e3,
        t.sample / 1e3,
        (made.sigmas.len() - 1) as f64 / (t.sample / 1e3),
        t.decode / 1e3,
        t.total / 1e3,
        made.memory.peak as f64 / 1e6
    );
    let whole: f64 = rows.iter().map(|row| row.ms).sum();
    for row in rows.iter().take(40) {
        eprintln!(
            "{:5.1} % {:9.2} ms {:6} x {:>8.2} GFLOP/s  {}/{}  {}",
            100.0 * row.ms / whole,
            row.ms,
            row.count,
            row.flops as f64 / row.ms / 1e6,
            row.op,
            row.variant,
            row.shapes
        );
    }
    for path in paths {
        crate::print(path.display());
    }
}
