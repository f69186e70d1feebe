//! What waits between pictures: for which, and that it makes the same.

use pollster::block_on;

use super::*;
use crate::files::Files;
use crate::gpu::noop::NoopProfile;

fn pipeline(gpu: &Gpu) -> Pipeline {
    let model = Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("the embedded model");
    block_on(Pipeline::load(gpu, model, LoadOptions::default())).expect("loaded")
}

fn job_of(pipeline: &Pipeline, request: &Request) -> (Request, Job, Text) {
    let request = pipeline.whole(request).expect("a request");
    let job = pipeline.job(&request).expect("a job");
    let text = block_on(pipeline.text(&request, job.passes, None)).expect("a text");
    (request, job, text)
}

fn small() -> Request {
    Request { steps: 3, width: Some(64), height: Some(64), ..Default::default() }
}

fn with(change: impl FnOnce(&mut Request)) -> Request {
    let mut request = small();
    change(&mut request);
    request
}

#[test]
fn loop_and_decoder_wait_for_pictures_of_their_kind() {
    let gpu = block_on(Gpu::noop(&NoopProfile { memory: Some(8 << 30), ..NoopProfile::H200 })).expect("noop");
    let [one, other] = [(); 2].map(|()| pipeline(&gpu));
    let key = |request: &Request| {
        let (request, job, _) = job_of(&one, request);
        let forecast = block_on(one.forecast(&request, &job, false)).expect("it fits");
        one.kept_key(&request, &job, &forecast)
    };
    let run = |pipeline: &Pipeline, request: &Request| {
        block_on(pipeline.generate(request, &mut |_| ControlFlow::Continue(()))).expect("a run");
    };
    let waits = |key: &str| gpu.take::<Kept>(key).is_some();
    let first = key(&small());
    for same in [
        with(|r| r.seed = 7),
        with(|r| r.prompt = "a hen".into()),
        with(|r| r.cfg = 3.0),
        with(|r| r.sag_scale = 0.3),
        with(|r| r.latents = Some(vec![0.5; 4 * 8 * 8])),
    ] {
        assert_eq!(key(&same), first, "{same:?}");
    }
    for another in [
        with(|r| r.steps = 4),
        with(|r| r.sag_scale = 0.0),
        with(|r| (r.cfg, r.sag_scale) = (1.0, 0.0)),
        with(|r| r.batch = 2),
        with(|r| r.width = Some(128)),
        with(|r| r.sampler = "heun".into()),
        with(|r| r.scheduler = "karras".into()),
        with(|r| r.negative_prompt = "(long) ".repeat(80)),
    ] {
        assert_ne!(key(&another), first, "{another:?}");
        run(&one, &small());
        run(&one, &another);
        assert!(!waits(&first), "{another:?}");
    }
    run(&one, &small());
    run(&one, &with(|r| r.seed = 7));
    assert!(waits(&first) && !waits(&first), "it waits, once");
    run(&other, &small());
    assert!(!waits(&first), "another model's");
    run(&one, &small());
    run(&one, &with(|r| r.profile = true));
    assert!(!waits(&first), "what is timed takes apart what waits");
    run(&one, &small());
    assert!(gpu.idle_bytes() > 0);
    gpu.free_idle();
    assert_eq!(gpu.idle_bytes(), 0);
    run(&one, &small());
    drop((one, other));
    assert_eq!((gpu.memory_in_use().0, gpu.idle_bytes()), (0, 0), "nothing is left of them");
}

/// On this machine's device, where nothing is kept by itself if that is the processor.
#[test]
fn a_kept_loop_ends_in_the_same_latents() {
    let gpu = block_on(Gpu::open(&Default::default())).expect("a GPU or a software device");
    let pipeline = pipeline(&gpu);
    let unet = block_on(pipeline.unet()).expect("loaded");
    let other = with(|r| {
        (r.prompt, r.negative_prompt) = ("a red fox in the snow".into(), "blurry".into());
        (r.cfg, r.sag_scale, r.seed) = (4.0, 1.5, 9);
    });
    let [first, second] = [small(), other].map(|request| job_of(&pipeline, &request));
    let given = Given::default();
    let fresh = |(request, job, text): &(Request, Job, Text)| {
        let unit = Generator::new(request.seed).randn(job.shape.iter().product());
        let sampling = Sampling::new(&gpu, &unet, pipeline.dtype, job, text, &given, &unit, None);
        block_on(sampling).expect("recorded")
    };
    let latents = |sampling: &mut Sampling, (request, job, _): &(Request, Job, Text)| {
        let mut generator = Generator::new(request.seed);
        let unit = generator.randn(job.shape.iter().product());
        sampling.start(job, &given, &unit, pipeline.start_scale(job));
        let observe = &mut |_: Progress| ControlFlow::Continue(());
        block_on(async {
            let running = sampling.run(job, &mut generator, None, observe, pin!(async {})).await?;
            running.finish(observe).await?;
            sampling.results(job).await?.finish(job).await
        })
        .expect("a run")
    };
    let expected = latents(&mut fresh(&second), &second);
    let mut kept = fresh(&first);
    assert_ne!(latents(&mut kept, &first), expected);
    block_on(kept.again(&unet, pipeline.dtype, &second.1, &second.2)).expect("again");
    assert_eq!(latents(&mut kept, &second), expected);
}

/// Kernels are tuned with the first picture of a kind; the others are made as fast as without.
#[test]
fn pictures_after_tuning_are_like_others() {
    let gpu = block_on(Gpu::noop(&NoopProfile { memory: Some(8 << 30), ..NoopProfile::H200 })).expect("noop");
    let pipeline = pipeline(&gpu);
    let tuned = with(|r| r.autotune = true);
    let mut trials = 0;
    let mut run = |request: &Request| {
        let mut observe = |progress| {
            trials += u32::from(matches!(progress, Progress::Tuned { .. }));
            ControlFlow::Continue(())
        };
        let made = block_on(pipeline.generate(request, &mut observe)).expect("a run");
        (std::mem::take(&mut trials) > 0, made.request.autotune)
    };
    let waits = || {
        let (request, job, _) = job_of(&pipeline, &small());
        let forecast = block_on(pipeline.forecast(&request, &job, false)).expect("it fits");
        gpu.take::<Kept>(&pipeline.kept_key(&request, &job, &forecast)).is_some()
    };
    assert_eq!(run(&tuned), (true, true));
    assert!(!waits());
    assert_eq!(run(&tuned), (false, false));
    assert!(waits(), "its loop waits for the next, as others do");
    let (another, _) = run(&with(|r| (r.autotune, r.width) = (true, Some(128))));
    assert!(another, "another kind is tuned, too");
}
