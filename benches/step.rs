//! `cargo bench --bench step [FILTER]`: ten steps of the embedded model at 128x128, by wall time, prompt to pixels.

use std::ops::ControlFlow;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use pollster::block_on;
use scumble::files::Files;
use scumble::gpu::{Gpu, GpuOptions};
use scumble::{Checkpoint, LoadOptions, Pipeline, Request};

fn steps(c: &mut Criterion) {
    let options = GpuOptions { device: std::env::var("SCUMBLE_DEVICE").ok(), ..Default::default() };
    let gpu = block_on(Gpu::open(&options)).expect("a GPU or a software device (lavapipe)");
    let model = Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("the embedded model");
    let pipeline = block_on(Pipeline::load(&gpu, model, LoadOptions::default())).expect("loaded");
    let mut group = c.benchmark_group("ten steps");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    for (name, cfg, sag_scale) in [("one pass", 1.0, 0.0), ("cfg", 7.0, 0.0), ("cfg and sag", 7.0, 0.75)] {
        let size = Some(128);
        let prompt = "a fox in a pine forest at night".to_owned();
        let request = Request { prompt, cfg, sag_scale, width: size, height: size, steps: 10, ..Default::default() };
        let make = || block_on(pipeline.generate(&request, &mut |_| ControlFlow::Continue(()))).expect("a picture");
        let first = make().images;
        group.bench_function(name, |b| b.iter(|| assert!(make().images == first, "{name}: another picture")));
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
