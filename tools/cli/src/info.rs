//! `scumble info`: what there is to run on, and what a model is.

use scumble::gpu::{Caps, Gpu};
use scumble::model::config::{ClipConfig, NoiseConfig, UNetConfig, VaeConfig};
use scumble::weights::Files;
use scumble::{Error, Result, ops};
use serde_json::{Value, json};

use crate::args::InfoArgs;

/// Run the command.
pub fn run(args: &InfoArgs) -> Result<()> {
    let adapters = pollster::block_on(Gpu::adapters());
    let gpu = args.device.open()?;
    args.device.precision()?;
    let model = model(&args.model.files()?, &args.model.name())?;
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
            crate::print(format_args!("  {part:16} {}", what.as_str().map_or_else(|| what.to_string(), str::to_owned)));
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

/// A model's parts in words and numbers.
fn model(files: &Files, name: &str) -> Result<Value> {
    let read = |path: &str| Ok::<_, Error>((files.path(path), files.text(path)?));
    let (path, text) = read("unet/config.json")?;
    let unet = UNetConfig::parse(&path, &text)?;
    let (path, text) = read("vae/config.json")?;
    let vae = VaeConfig::parse(&path, &text)?;
    let (path, text) = read("text_encoder/config.json")?;
    let clip = ClipConfig::parse(&path, &text)?;
    let (path, text) = read("scheduler/scheduler_config.json")?;
    let noise = NoiseConfig::parse(&path, &text)?;
    let channels: Vec<usize> = unet.levels.iter().map(|level| level.channels).collect();
    let side = unet.sample_size as u32 * vae.factor();
    Ok(json!({
        "name": name,
        "size": format!("{side}x{side} pixels, latents of 1/{}", vae.factor()),
        "unet": format!("channels {channels:?}, context {}", unet.cross_dim),
        "text encoder": format!("CLIP, {} layers of {}", clip.num_hidden_layers, clip.hidden_size),
        "vae": format!("channels {:?}, scaling factor {}", vae.block_out_channels, vae.scaling_factor),
        "predicts": noise.prediction_type,
    }))
}
