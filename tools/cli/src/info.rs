//! `scumble info`: what there is to run on, and what a model is.

use scumble::gpu::{Caps, Gpu};
use scumble::weights::Weights;
use scumble::{Checkpoint, Error, LoadOptions, Pipeline, Request, Result, ops};
use serde_json::{Value, json};

use crate::args::InfoArgs;

/// Run the command.
pub fn run(args: &InfoArgs) -> Result<()> {
    let adapters = pollster::block_on(Gpu::adapters());
    let gpu = args.device.open()?;
    args.device.precision()?;
    let model = model(args, &gpu)?;
    let variants: serde_json::Map<String, Value> =
        ops::chosen(&gpu).into_iter().map(|(op, variant)| (op.to_owned(), json!(variant))).collect();
    if args.json {
        let chosen = gpu.caps();
        crate::print(json!({ "adapters": adapters, "chosen": chosen, "variants": variants, "model": model }));
        return Ok(());
    }
    for (i, caps) in adapters.iter().enumerate() {
        crate::print(format_args!("{i}: {}", describe(caps)));
    }
    crate::print(format_args!("chosen: {}", gpu.caps().name));
    for (op, variant) in &variants {
        crate::print(format_args!("  {op:16} {}", variant.as_str().unwrap_or("")));
    }
    crate::print(format_args!("model: {}", args.model.name()));
    if let Value::Object(parts) = &model {
        for (part, what) in parts {
            let lines = match what.as_str() {
                Some(text) => vec![text.to_owned()],
                None => needs_in_words(what),
            };
            let part = if part == "gpu_bytes" { "GPU memory" } else { part };
            for (i, line) in lines.iter().enumerate() {
                crate::print(format_args!("  {:16} {line}", if i == 0 { part } else { "" }));
            }
        }
    }
    Ok(())
}

fn describe(c: &Caps) -> String {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let memory = c.memory.map_or("memory unknown".to_owned(), mib);
    let mut can = vec![if c.f16 { "f16" } else { "no f16" }.to_owned()];
    if c.subgroups {
        can.push(format!("subgroups of {}..{}", c.subgroup_size[0], c.subgroup_size[1]));
    }
    if !c.cooperative.is_empty() {
        can.push(format!("cooperative matrices {:?}", c.cooperative));
    }
    if c.timestamps {
        can.push("timestamps".into());
    }
    format!(
        "{} ({}, {:?}, {})\n     {memory}, bindings up to {}, workgroup memory {} KiB; {}",
        c.name,
        c.backend,
        c.kind,
        c.driver,
        mib(c.max_binding),
        c.workgroup_memory >> 10,
        can.join(", ")
    )
}

/// A model's parts in words and numbers, and what a picture of its own size needs on this device.
fn model(args: &InfoArgs, gpu: &Gpu) -> Result<Value> {
    let model = args.model.open()?;
    let config = &model.unet.config;
    let channels: Vec<usize> = config.levels.iter().map(|level| level.channels).collect();
    let size = model.size();
    let stored = |weights: &Weights| {
        let types: Vec<String> =
            weights.sizes().1.into_iter().map(|(kind, n)| format!("{} MB {kind}", n / 1_000_000)).collect();
        types.join(", ")
    };
    let text = match model.texts() {
        Err(missing) => json!(missing.to_string()),
        Ok(texts) => {
            let one = |text: &scumble::checkpoint::TextPart| {
                let c = &text.part.config;
                let last =
                    if text.skip == 1 { String::new() } else { format!(", read {} from the last", text.skip - 1) };
                format!(
                    "CLIP, {} layers of {}{last}; {}",
                    c.num_hidden_layers,
                    c.hidden_size,
                    stored(&text.part.weights)
                )
            };
            json!(texts.iter().map(one).collect::<Vec<String>>().join(" | "))
        }
    };
    let vae = match model.vae() {
        Err(missing) => json!(missing.to_string()),
        Ok(vae) => {
            let c = &vae.config;
            json!(format!(
                "channels {:?}, scaling factor {}; {}",
                c.block_out_channels,
                c.scaling_factor,
                stored(&vae.weights)
            ))
        }
    };
    let mut parts = json!({
        "name": args.model.name(),
        "family": model.family,
        "decided by": model.decided,
        "size": format!("{size}x{size} pixels, latents of 1/8"),
        "unet": format!("channels {channels:?}, context {}; {}", config.cross_dim, stored(&model.unet.weights)),
        "text encoder": text,
        "vae": vae,
        "predicts": model.noise.prediction_type,
    });
    if !model.warnings.is_empty() {
        parts["warnings"] = json!(model.warnings.join("; "));
    }
    if model.texts().is_ok() && model.vae().is_ok() {
        parts["gpu_bytes"] = needs(model, args, gpu)?;
    }
    Ok(parts)
}

/// Bytes of device memory for the model and a picture of its own size, with SAG: all parts at once, and one at a time.
fn needs(model: Checkpoint, args: &InfoArgs, gpu: &Gpu) -> Result<Value> {
    let options = LoadOptions { precision: args.device.precision()?, lowmem: true };
    let pipeline = pollster::block_on(Pipeline::plan(gpu, model, options))?;
    let forecast = match pollster::block_on(pipeline.foresee(&Request::default())) {
        Ok(forecast) => forecast,
        Err(e @ Error::DoesNotFit { .. }) => return Ok(json!({ "too_large": e.to_string() })),
        Err(e) => return Err(e),
    };
    let m = forecast.model;
    let loading = m.text.loading.max(m.unet.loading).max(m.decoder.loading);
    let stage = forecast.text.max(forecast.encode).max(forecast.sample).max(forecast.decode);
    Ok(json!({
        "weights": m.weights(),
        "text_encoders": m.text.weights,
        "unet": m.unet.weights,
        "vae_decoder": m.decoder.weights,
        "peak": m.weights() + stage.max(loading),
        "lowmem_peak": forecast.peak,
        "vae_tile": forecast.decode_tiling.map(|tiling| tiling.tile),
    }))
}

/// Bytes as people read them.
fn megabytes(bytes: &Value) -> String {
    format!("{} MB", bytes.as_u64().unwrap_or(0).div_ceil(1_000_000))
}

/// The same in words.
fn needs_in_words(bytes: &Value) -> Vec<String> {
    if let Some(reason) = bytes["too_large"].as_str() {
        return vec![reason.to_owned()];
    }
    let part = |name: &str| megabytes(&bytes[name]);
    let mut lines = vec![
        format!(
            "weights {} (text {}, UNet {}, VAE {})",
            part("weights"),
            part("text_encoders"),
            part("unet"),
            part("vae_decoder")
        ),
        format!("a picture of its own size with SAG: {} at peak, {} with --lowmem", part("peak"), part("lowmem_peak")),
    ];
    if let Some(tile) = bytes["vae_tile"].as_u64() {
        lines.push(format!("the VAE works in tiles of {tile} pixels"));
    }
    lines
}
