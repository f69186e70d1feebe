//! Rung 2: whole networks recorded, planned, and validated by wgpu on its `noop` backend under four capability sets: what a
//! browser guarantees, lavapipe, Apple, an H200. No GPU.

use pollster::block_on;
use scumble::files::Files;
use scumble::gpu::noop::NoopProfile;
use scumble::gpu::{Gpu, GpuOptions};
use scumble::{Checkpoint, Error, LoadOptions, Pipeline, Request};

const PROFILES: [NoopProfile; 4] = [NoopProfile::BROWSER, NoopProfile::LAVAPIPE, NoopProfile::APPLE, NoopProfile::H200];

fn pipeline(profile: &NoopProfile) -> Pipeline {
    let gpu = block_on(Gpu::noop(profile)).expect("noop");
    load(&gpu, LoadOptions::default())
}

fn load(gpu: &Gpu, options: LoadOptions) -> Pipeline {
    let model = Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("the embedded model");
    block_on(Pipeline::load(gpu, model, options)).expect("loaded")
}

/// noop computes nothing, so a run ends with zeros; what counts is that wgpu accepted every buffer, pipeline and dispatch.
fn run(pipeline: &Pipeline, request: &Request) -> scumble::Result<scumble::Generated> {
    block_on(pipeline.generate(request, &mut |_| std::ops::ControlFlow::Continue(())))
}

#[test]
fn every_profile_gets_the_kernels_of_its_kind() {
    for (profile, expected) in PROFILES.iter().zip(["tile", "subgroup", "tile", "coop"]) {
        let gpu = block_on(Gpu::noop(profile)).expect("noop");
        let conv2d = scumble::ops::chosen(&gpu).into_iter().find(|(op, _)| *op == "conv2d");
        assert_eq!(conv2d, Some(("conv2d", expected)), "{}", profile.name);
    }
}

#[test]
fn a_whole_run_validates_under_every_profile() {
    for profile in &PROFILES {
        let pipeline = pipeline(profile);
        for (sampler, sag_scale) in [("euler_ancestral", 0.75), ("heun", 0.0), ("dpmpp_2m", 0.75)] {
            let request = Request { steps: 2, sampler: sampler.into(), sag_scale, ..Default::default() };
            let made = run(&pipeline, &request).unwrap_or_else(|e| panic!("{}: {e}", profile.name));
            assert_eq!(made.images.len(), 1);
        }
    }
}

/// Where matrix units multiply, a transformer's norms are in their neighbours: all but the first before the prompts part, whose rows are then
/// repeated.
#[test]
fn norms_between_products_are_no_dispatches() {
    let norms = |variants, cfg| {
        let profile = NoopProfile { variants, ..NoopProfile::H200 };
        let request = Request { steps: 1, cfg, sag_scale: 0.0, profile: true, ..Default::default() };
        let made = run(&pipeline(&profile), &request).expect("a run");
        let rows = made.profile.expect("asked for").rows();
        // Text encoders' are in f32, between products that are not folded.
        let unets = rows.iter().filter(|row| row.op == "layer_norm" && !row.shapes.contains("x1x77x"));
        unets.map(|row| row.count).sum::<u64>()
    };
    assert_eq!((norms(&[], 1.0), norms(&[], 7.0)), (0, 1));
    assert!(norms(&[("row_sums", "apart")], 7.0) > 16);
}

#[test]
fn the_planned_peak_is_the_peak_that_is_allocated() {
    for profile in &PROFILES {
        let pipeline = pipeline(profile);
        for (batch, width, sag_scale, sampler) in [
            (1, 256, 0.75, "euler"),
            (2, 192, 0.0, "heun"),
            (1, 328, 0.75, "dpmpp_2m"),
            (1, 40, 0.0, "euler"),
            (64, 64, 0.75, "euler"),
        ] {
            let request = Request {
                steps: 3,
                batch,
                width: Some(width),
                sag_scale,
                sampler: sampler.into(),
                ..Default::default()
            };
            let memory = run(&pipeline, &request).expect("a run").memory;
            assert_eq!(memory.planned_peak, memory.peak, "{} batch {batch} width {width}", profile.name);
        }
    }
}

#[test]
fn the_decoder_gets_ready_beside_the_loop_where_there_is_room() {
    // A long prompt, of which new keys and values are made beside a loop that was kept.
    let prompt = "a fox ".repeat(600);
    let request = Request { prompt, steps: 3, width: Some(384), height: Some(384), ..Default::default() };
    let check = |memory: u64, early: bool, keeps: bool| {
        let pipeline = pipeline(&NoopProfile { memory: Some(memory), ..NoopProfile::H200 });
        let foreseen = block_on(pipeline.foresee(&request)).expect("it fits");
        assert_eq!((foreseen.early, foreseen.keeps), (early, keeps), "{memory} bytes");
        // The second time, the forecast is remembered, and what was kept is used.
        let peaks = [0; 2].map(|_| {
            let memory = run(&pipeline, &request).expect("a run").memory;
            assert_eq!(memory.planned_peak, foreseen.peak);
            memory.peak
        });
        assert_eq!(peaks[0].max(peaks[1]), foreseen.peak, "early: {early}, keeps: {keeps}");
        assert!(keeps || peaks[0] == peaks[1], "{peaks:?}");
        foreseen.peak
    };
    let kept = check(8 << 30, true, true);
    let both = check(kept - 1, true, false);
    assert!(both < kept && check(both - 1, false, false) < both);
}

/// Transformed weights go before a picture does not fit.
#[test]
fn what_saves_time_gives_way_to_memory() {
    // Many small pictures: the loop is what needs most.
    let request = Request { steps: 2, batch: 16, ..Default::default() };
    let variants = &[("winograd", "estimated")];
    let with = |memory| pipeline(&NoopProfile { memory: Some(memory), variants, ..NoopProfile::H200 });
    let (mut memory, mut seen) = (8 << 30, Vec::new());
    for _ in 0..4 {
        let foreseen = block_on(with(memory).foresee(&request)).expect("it fits in some way");
        seen.push((foreseen.frugal, foreseen.peak, memory));
        memory = foreseen.peak - 1;
    }
    let ways: Vec<bool> = seen.iter().map(|(frugal, ..)| *frugal).collect();
    assert!(!ways[0] && ways.is_sorted() && ways[ways.len() - 1], "{seen:?}");
    for &(_, peak, memory) in &seen {
        let memory = run(&with(memory), &request).expect("a run").memory;
        assert_eq!((memory.planned_peak, memory.peak <= peak), (peak, true), "{memory:?}");
    }
}

#[test]
fn a_pictures_memory_waits_for_the_next_of_its_size() {
    let profile = |memory| NoopProfile { memory, ..NoopProfile::H200 };
    let request = |width| Request { steps: 3, width: Some(width), ..Default::default() };
    let large = pipeline(&profile(Some(8 << 30)));
    let gpu = large.gpu().clone();
    let weights = gpu.memory_in_use().0;
    let idle = |width| {
        let made = run(&large, &request(width)).expect("a run");
        assert_eq!(gpu.memory_in_use().0, weights, "{width}");
        assert!(made.memory.peak <= made.memory.planned_peak, "{width}: {:?}", made.memory);
        gpu.idle_bytes()
    };
    let first = idle(256);
    assert!(first > 16 << 20, "{first}");
    // What folded the weights is not needed any more.
    let again = idle(256);
    assert!(again <= first && first - again < 1 << 20, "{again} of {first}: the same buffers again");
    assert_eq!(idle(256), again, "the same buffers again");
    // What the last picture did not use is free.
    let other = idle(128);
    assert!(0 < other && other < first, "{other} of {first}");
    gpu.free_idle();
    assert_eq!(gpu.idle_bytes(), 0);
    assert_eq!(idle(256), first);
    drop(large);
    assert_eq!(gpu.idle_bytes(), 0, "nobody is left to use it");

    // Weights and what waits take half of the device at most; what a device has to spare nobody knows where it does not tell.
    let memory = 2 * (weights + first / 2);
    let small = pipeline(&profile(Some(memory)));
    run(&small, &request(256)).expect("a run");
    let idle = small.gpu().idle_bytes();
    assert!(0 < idle && weights + idle <= memory / 2, "{idle}");
    let silent = pipeline(&profile(None));
    run(&silent, &request(256)).expect("a run");
    assert_eq!(silent.gpu().idle_bytes(), 0);
    // Held part by part, the model needs the room itself.
    let gpu = block_on(Gpu::noop(&profile(Some(8 << 30)))).expect("noop");
    run(&load(&gpu, LoadOptions { lowmem: true, ..Default::default() }), &request(256)).expect("a run");
    assert_eq!(gpu.idle_bytes(), 0);
}

#[test]
fn odd_latents_are_planned() {
    let pipeline = pipeline(&NoopProfile::LAVAPIPE);
    for (width, height) in [(40, 40), (40, 56), (264, 72), (136, 200)] {
        let request = Request { steps: 1, width: Some(width), height: Some(height), ..Default::default() };
        run(&pipeline, &request).unwrap_or_else(|e| panic!("{width}x{height}: {e}"));
    }
}

#[test]
fn a_picture_that_does_not_fit_is_refused_before_anything_is_allocated() {
    let pipeline = pipeline(&NoopProfile::BROWSER);
    let before = pipeline.gpu().memory_in_use().0;
    pipeline.gpu().reset_peak();
    for (side, batch) in [(4096, 1), (16_384, 1), (16_384, 1024), (256, 1024)] {
        let request = Request { width: Some(side), height: Some(side), batch, ..Default::default() };
        let error = run(&pipeline, &request).err().expect("too large for bindings of 128 MiB");
        let Error::DoesNotFit { needed, available, .. } = &error else { panic!("{error}") };
        assert!(needed > available && *available == 128 << 20, "{error}");
        assert!(error.to_string().contains(&format!("{side}x{side} (batch {batch})")), "{error}");
    }
    assert_eq!(pipeline.gpu().memory_in_use(), (before, before));
}

#[test]
fn the_vae_cuts_a_picture_that_does_not_fit_whole() {
    let pipeline = pipeline(&NoopProfile::BROWSER);
    let request = Request { steps: 1, width: Some(1024), height: Some(1024), ..Default::default() };
    let foreseen = block_on(pipeline.foresee(&request)).expect("it fits in tiles");
    let tiling = foreseen.decode_tiling.expect("128 MiB do not hold 1024 x 1024 x 64 channels");
    assert!(tiling.tile < 1024, "{tiling:?}");
    let made = run(&pipeline, &request).expect("a run");
    assert_eq!((made.images[0].width, made.images[0].height), (1024, 1024));
    let memory = made.memory;
    assert!(memory.peak <= memory.planned_peak && memory.planned_peak < memory.peak / 100 * 115, "{memory:?}");
    let small = Request { width: Some(256), height: Some(256), ..request };
    assert_eq!(block_on(pipeline.foresee(&small)).expect("it fits").decode_tiling, None);
}

#[test]
fn one_part_at_a_time_needs_less_and_what_was_planned() {
    for profile in &PROFILES {
        let gpu = block_on(Gpu::noop(profile)).expect("noop");
        let low = load(&gpu, LoadOptions { lowmem: true, ..Default::default() });
        assert_eq!(gpu.memory_in_use().0, 0, "nothing is loaded before it is needed");
        let request = Request { steps: 2, ..Default::default() };
        let memory = run(&low, &request).expect("a run").memory;
        assert!(
            memory.peak <= memory.planned_peak && memory.planned_peak < memory.peak + (2 << 20),
            "{}: {memory:?}",
            profile.name
        );
        assert_eq!(gpu.memory_in_use().0, 0, "nothing stays");
    }
}

#[test]
fn a_device_that_is_too_small_hears_what_is_needed_and_what_to_do() {
    let open = |megabytes: u64| {
        let profile = NoopProfile { memory: Some(megabytes << 20), ..NoopProfile::H200 };
        block_on(Gpu::noop(&profile)).expect("noop")
    };
    let model = || Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("the embedded model");
    let whole = |gpu: &Gpu| block_on(Pipeline::load(gpu, model(), LoadOptions::default()));
    let low = LoadOptions { lowmem: true, ..Default::default() };
    let request = Request { steps: 1, ..Default::default() };

    // The model alone is 29 MB, and as much again on its way there.
    let small = open(48);
    let Err(Error::DoesNotFit { needed, available, hint, .. }) = whole(&small) else { panic!("it does not fit") };
    assert!(needed > available && available == 48 << 20 && hint.contains("--lowmem"), "{needed} {available} {hint}");
    assert_eq!(small.memory_in_use().0, 0, "nothing is loaded");

    // One part at a time fits where all at once do not, and there the VAE is cut.
    let middle = open(108);
    let pipeline = block_on(Pipeline::load(&middle, model(), low)).expect("planned");
    let foreseen = block_on(pipeline.foresee(&request)).expect("it fits");
    assert!(foreseen.peak <= 108 << 20, "{foreseen:?}");
    let memory = run(&pipeline, &request).expect("a run").memory;
    assert!(memory.peak <= memory.planned_peak && memory.planned_peak <= 108 << 20, "{memory:?}");
    let tiny = open(40);
    let pipeline = block_on(Pipeline::load(&tiny, model(), low)).expect("planned");
    assert!(matches!(run(&pipeline, &request), Err(Error::DoesNotFit { .. })));
}

#[test]
fn a_host_may_own_the_device() {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let gpu = Gpu::from_device(device, queue, &[]).expect("a device");
    let pipeline = load(&gpu, LoadOptions::default());
    assert!(!gpu.caps().f16, "the host asked for no f16, so no kernel may use it");
    run(&pipeline, &Request { steps: 1, ..Default::default() }).expect("a run on the host's device");
}

#[test]
fn an_unknown_variant_or_device_is_told_the_list() {
    let open = |device: Option<&str>, op: &str, name: &str| {
        let options = GpuOptions {
            device: device.map(Into::into),
            variants: vec![(op.into(), name.into())],
            ..Default::default()
        };
        block_on(Gpu::open(&options)).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(open(None, "conv3d", "tile").contains("conv2d"));
    assert!(open(None, "conv2d", "tiles").contains("portable"));
    assert!(open(Some("no such card"), "conv2d", "tile").contains("0: "));
}

#[test]
fn cancelling_between_steps_is_an_error_of_its_own() {
    let pipeline = pipeline(&NoopProfile::H200);
    let mut steps = 0;
    let mut stop = |progress| {
        if let scumble::Progress::Step { .. } = progress {
            steps += 1;
        }
        if steps == 2 { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) }
    };
    let error = block_on(pipeline.generate(&Request::default(), &mut stop)).err();
    assert!(matches!(error, Some(Error::Cancelled)));
    assert_eq!(steps, 2, "no step is begun after the cancellation is heard");
}
