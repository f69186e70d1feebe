//! `scumble bench`: the share of the device's limits that every kernel reaches, the time of a step, and of a picture.

use std::ops::ControlFlow;
use std::time::Duration;

use scumble::bench::kernels::{self, Bound, Kernels, Options};
use scumble::bench::step::{self, Passes, Picture};
use scumble::gpu::Gpu;
use scumble::{Error, LoadOptions, Pipeline, Request, Result};
use serde_json::{Value, json};

use crate::args::BenchArgs;
use crate::options::whole;

/// Run the command.
pub fn run(args: &BenchArgs) -> Result<()> {
    let all = !(args.kernels || args.step || args.image);
    let gpu = args.device.open()?;
    let caps = gpu.caps();
    let mut report = json!({
        "device": caps.name,
        "driver": caps.driver,
        "backend": caps.backend,
        "variants": scumble::ops::chosen(&gpu),
        "version": env!("CARGO_PKG_VERSION"),
    });
    eprintln!("{} ({}, {})", caps.name, caps.backend, caps.driver);
    let mut wrong = 0;
    if args.kernels || all {
        let found = kernels(args, &gpu)?;
        wrong = found.rows.iter().filter(|row| row.times.is_none()).count();
        report["kernels"] = json!(found);
    }
    if args.step || args.image || all {
        let options = LoadOptions { precision: args.device.precision()?, lowmem: false };
        let pipeline = pollster::block_on(Pipeline::load(&gpu, args.model.open()?, options))?;
        let request = request(args)?;
        report["model"] = json!({ "name": args.model.name(), "precision": pipeline.dtype() });
        if args.step || all {
            report["step"] = steps(args, &pipeline, &request)?;
        }
        if args.image || all {
            let repeats = whole("repeats", args.repeats, "a whole number from 1")?.max(1) as usize;
            let found = pollster::block_on(step::picture(&pipeline, &request, repeats))?;
            print_picture(&found);
            report["image"] = json!(found);
        }
    }
    if args.json {
        crate::print(report);
    }
    match wrong {
        0 => Ok(()),
        n => Err(Error::Device {
            device: gpu.caps().name.clone(),
            what: "kernels".into(),
            reason: format!("{n} of them gave wrong results; run the tests, and bisect with --variant"),
        }),
    }
}

fn request(args: &BenchArgs) -> Result<Request> {
    let size = |what: &str, n: Option<i64>| n.map(|n| whole(what, n, "a multiple of 8 from 40 to 16384")).transpose();
    let request = Request {
        prompt: "a fox in a pine forest at night".into(),
        seed: 42,
        width: size("width", args.width)?,
        height: size("height", args.height)?,
        steps: whole("steps", args.steps, "a whole number from 1 to 10000")?,
        autotune: args.autotune,
        ..Default::default()
    };
    request.check()?;
    Ok(request)
}

/// The batch sizes asked for.
fn batches(args: &BenchArgs) -> Result<Vec<u32>> {
    let expected = "whole numbers from 1 to 1024, with commas";
    let one = |n: &i64| match whole("batch", *n, expected)? {
        n @ 1..=1024 => Ok(n),
        other => Err(Error::invalid("batch", expected, other)),
    };
    args.batch.iter().map(one).collect()
}

fn kernels(args: &BenchArgs, gpu: &Gpu) -> Result<Kernels> {
    if !(args.seconds.is_finite() && (0.0..=3600.0).contains(&args.seconds)) {
        return Err(Error::invalid("seconds", "a number from 0 to 3600", args.seconds));
    }
    let options = Options {
        shapes: args.shapes.clone(),
        filter: args.filter.clone(),
        batch: batches(args)?.first().copied(),
        budget: Duration::from_secs_f64(args.seconds),
    };
    eprintln!(
        "{:<48} {:>6} {:>9} {:>8} {:>8} {:>5}  of",
        "op, images, times a forward", "", "ms", "TFLOP/s", "GB/s", "%"
    );
    let mut network = "";
    let mut observe = |row: &kernels::Row| {
        if row.network != network {
            network = row.network;
            eprintln!("{network}");
        }
        let what = format!("  {}, {}", row.name, row.batch);
        match &row.times {
            None => eprintln!("{what:<48} {:>6} WRONG: relative error {:.1e}", format!("x{}", row.count), row.error),
            Some(times) => eprintln!(
                "{what:<48} {:>6} {:>9.4} {:>8.3} {:>8.1} {:>5.1}  {} ({})",
                format!("x{}", row.count),
                times.median_ms,
                row.tflops,
                row.gb_s,
                row.share * 100.0,
                if row.bound == Bound::Product { "product" } else { "copy" },
                row.variants.join("+"),
            ),
        }
        ControlFlow::Continue(())
    };
    let found = pollster::block_on(kernels::run(gpu, &options, &mut observe))?;
    let l = &found.limits;
    eprintln!(
        "limits: copy {:.1} GB/s, product {:.2} TFLOP/s ({}), multiply-adds {:.2} TFLOP/s in f32{}",
        l.copy_gb_s,
        l.product_tflops,
        l.product,
        l.fma_f32_tflops,
        l.fma_f16_tflops.map_or(String::new(), |rate| format!(", {rate:.2} in f16")),
    );
    found.skipped.iter().for_each(|skipped| eprintln!("skipped: {skipped}"));
    Ok(found)
}

fn steps(args: &BenchArgs, pipeline: &Pipeline, request: &Request) -> Result<Value> {
    let mut rows = Vec::new();
    let mut skipped = Vec::new();
    let asked = batches(args)?;
    for batch in if asked.is_empty() { vec![1, 2, 4, 8] } else { asked } {
        for passes in [Passes::One, Passes::Cfg, Passes::CfgSag] {
            match pollster::block_on(step::step(pipeline, request, passes, batch)) {
                Ok(row) => {
                    eprintln!(
                        "step, batch {batch}, {passes:?}: {:.3} ms (fastest {:.3}, spread {:.3}), {} dispatches, {:.3} ms on the device, idle {:.0} %",
                        row.times.median_ms,
                        row.times.min_ms,
                        row.times.iqr_ms,
                        row.dispatches,
                        row.device_ms,
                        row.idle * 100.0
                    );
                    rows.push(row);
                }
                Err(e @ (Error::DoesNotFit { .. } | Error::OutOfMemory { .. })) => {
                    eprintln!("skipped: batch {batch}: {e}");
                    skipped.push(json!({ "batch": batch, "reason": e.to_string() }));
                }
                Err(e) => return Err(e),
            }
        }
    }
    if let Some(row) = rows.first() {
        eprintln!("device time by op, batch {}, {:?}:", row.batch, row.passes);
        for op in row.ops.iter().take(12) {
            let rate = op.flops as f64 / op.ms / 1e9;
            let (ms, count) = (op.ms, op.count);
            eprintln!("  {ms:>8.3} ms {count:>4}x {}/{} {rate:.3} TFLOP/s {}", op.op, op.variant, op.shapes);
        }
    }
    Ok(json!({ "rows": rows, "skipped": skipped }))
}

fn print_picture(found: &Picture) {
    let (t, first) = (&found.stages, &found.first);
    eprintln!(
        "picture: {:.1} ms (fastest {:.1}, spread {:.1}): text {:.1}, prepare {:.1}, sample {:.1}, decode {:.1}; the first {:.1}, of it prepare {:.1}; {} MB on the device at peak",
        found.times.median_ms,
        found.times.min_ms,
        found.times.iqr_ms,
        t.text,
        t.prepare,
        t.sample,
        t.decode,
        first.total,
        first.prepare,
        found.peak.div_ceil(1_000_000)
    );
}
