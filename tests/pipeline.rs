//! Rung 5: whole pictures. The 20-step loop against PyTorch (tools/reference/sag.py), the identities of SAG, the picture itself.

#[path = "common/networks.rs"]
mod networks;

use std::sync::OnceLock;

use networks::{Golden, data, relative};
use pollster::block_on;
use scumble::files::Files;
use scumble::gpu::{Gpu, GpuOptions};
use scumble::{Checkpoint, Generated, LoadOptions, Pipeline, Precision, Request};

const PROMPT: &str = "a fox in a pine forest at night";

fn pipeline() -> &'static Pipeline {
    static ONCE: OnceLock<Pipeline> = OnceLock::new();
    ONCE.get_or_init(|| {
        let options = GpuOptions { device: std::env::var("SCUMBLE_DEVICE").ok(), ..Default::default() };
        let gpu = block_on(Gpu::open(&options)).expect("a GPU or a software device");
        load(&gpu, Files::Embedded(scumble_model::FILES))
    })
}

fn load(gpu: &Gpu, files: Files) -> Pipeline {
    let model = Checkpoint::open(&files.into()).expect("a model");
    block_on(Pipeline::load(gpu, model, LoadOptions { precision: Precision::F32, lowmem: false })).expect("loaded")
}

fn run(request: &Request) -> Generated {
    block_on(pipeline().generate(request, &mut |_| std::ops::ControlFlow::Continue(()))).expect("a picture")
}

fn request() -> Request {
    Request { prompt: PROMPT.into(), seed: 42, ..Default::default() }
}

/// A smaller, shorter run for the identities.
fn quick() -> Request {
    Request { width: Some(72), height: Some(104), steps: 3, ..request() }
}

/// The limit is 1e-3; measured on lavapipe: 2e-6 for euler, 2e-4 for dpmpp_2m (PyTorch in f32 is itself 4e-5 from f64 there).
fn loop_equals_pytorch(golden: &str, request: &Request, limit: f64) -> Generated {
    let golden = Golden::open(golden);
    let made = run(request);
    let error = relative(&made.latents, &golden.take("latents").data);
    println!("{}/{}: latents {error:.1e} from PyTorch", request.sampler, request.scheduler);
    assert!(error < limit, "{error:.1e}");
    let masks = golden.take("masks").data;
    let different = made.masks.concat().iter().zip(&masks).filter(|(a, b)| a != b).count();
    assert_eq!(different, 0, "mask pixels that differ, of {}", masks.len());
    let plain = run(&Request { sag_scale: 0.0, ..request.clone() });
    assert!(relative(&plain.latents, &golden.take("latents_nosag").data) < limit, "without SAG");
    assert!(plain.masks.is_empty());
    made
}

#[test]
fn euler_with_cfg_and_sag_equals_pytorch_and_so_does_the_picture() {
    let made = loop_equals_pytorch("loop_euler", &request(), 1e-4);
    let file = std::fs::File::open(data("fox.png")).expect("fox.png");
    let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
    let mut expected = vec![0; reader.output_buffer_size().expect("a size")];
    reader.next_frame(&mut expected).expect("a picture");
    let worst = made.images[0].rgb.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(worst <= Some(2), "levels that differ from PyTorch's picture by up to {worst:?}");
}

#[test]
fn dpmpp_2m_karras_with_cfg_and_sag_equals_pytorch() {
    let request = Request { sampler: "dpmpp_2m".into(), scheduler: "karras".into(), ..request() };
    loop_equals_pytorch("loop_dpmpp_2m_karras", &request, 5e-4);
}

#[test]
fn given_latents_are_the_seeds_noise() {
    let seeded = run(&quick());
    let given = run(&Request { latents: Some(scumble::noise::randn(42, 4 * 13 * 9)), seed: 7, ..quick() });
    assert_eq!(seeded.latents, given.latents);
}

#[test]
fn scale_0_is_bit_identical_to_no_sag_whatever_the_other_settings() {
    let plain = run(&Request { sag_scale: 0.0, ..quick() });
    let other = run(&Request { sag_scale: 0.0, sag_blur_sigma: 0.5, sag_threshold: 0.1, ..quick() });
    assert_eq!(plain.latents, other.latents);
}

#[test]
fn an_empty_mask_and_a_blur_of_0_change_nothing_but_rounding() {
    // The third pass then sees x itself: degraded - D(x) is 0 but for the order of its sums.
    let plain = run(&Request { sag_scale: 0.0, ..quick() });
    let empty = run(&Request { sag_threshold: 1000.0, ..quick() });
    let sharp = run(&Request { sag_blur_sigma: 0.0, ..quick() });
    assert!(empty.masks.concat().iter().all(|&m| m == 0.0));
    assert!(sharp.masks.concat().contains(&1.0));
    for other in [&empty, &sharp] {
        let error = relative(&other.latents, &plain.latents);
        assert!(error < 1e-4, "{error:.1e}");
    }
    let acting = run(&quick());
    assert!(relative(&acting.latents, &plain.latents) > 1e-3, "SAG with a mask acts");
}

#[test]
fn a_batch_is_its_singles() {
    let noise = scumble::noise::randn(5, 2 * 4 * 13 * 9);
    let both = run(&Request { batch: 2, latents: Some(noise.clone()), ..quick() });
    let half = noise.len() / 2;
    for i in 0..2 {
        let one = run(&Request { latents: Some(noise[i * half..][..half].to_vec()), ..quick() });
        let error = relative(&both.latents[i * half..][..half], &one.latents);
        assert!(error < 1e-5, "image {i}: {error:.1e}");
        for (call, mask) in one.masks.iter().enumerate() {
            assert_eq!(&both.masks[call][i * mask.len()..][..mask.len()], mask, "image {i}, call {call}");
        }
    }
}

#[test]
fn cfg_1_works_with_and_without_sag() {
    let plain = run(&Request { cfg: 1.0, sag_scale: 0.0, ..quick() });
    let sag = run(&Request { cfg: 1.0, ..quick() });
    assert_eq!(sag.masks.len(), 3, "uncond is computed for SAG's map");
    assert!(relative(&sag.latents, &plain.latents) > 1e-4);
    // Without the third pass the same cond decides, with uncond beside it or not.
    let beside = run(&Request { cfg: 1.0 + f32::EPSILON, sag_scale: 0.0, ..quick() });
    assert!(relative(&beside.latents, &plain.latents) < 1e-4);
}

#[test]
fn an_empty_prompt_works_and_so_does_a_long_one() {
    let tiny = Request { width: Some(40), height: Some(40), steps: 1, ..request() };
    assert!(run(&Request { prompt: String::new(), ..tiny.clone() }).warnings.is_empty());
    // 2 chunks beside a negative prompt of 3: both become 6.
    let (two, three) = ("fox ".repeat(100), "blurry ".repeat(160));
    let long = run(&Request { prompt: two.clone(), negative_prompt: three, ..tiny.clone() });
    assert!(long.warnings.is_empty());
    // What is behind the 75th token counts.
    let shorter = run(&Request { prompt: "fox ".repeat(75), ..tiny.clone() });
    let other = run(&Request { prompt: two, ..tiny });
    assert!(relative(&other.latents, &shorter.latents) > 1e-6);
}

#[test]
fn every_sampler_and_scheduler_ends_in_a_picture() {
    for sampler in scumble::sampler::SAMPLERS {
        for scheduler in scumble::schedule::SCHEDULERS {
            let names = (sampler.name.to_owned(), scheduler.name.to_owned());
            let request = Request {
                width: Some(40),
                height: Some(40),
                steps: 2,
                sampler: names.0,
                scheduler: names.1,
                ..request()
            };
            assert_eq!(run(&request).images[0].width, 40);
        }
    }
}

#[test]
fn the_same_request_gives_the_same_picture() {
    assert_eq!(run(&quick()).images, run(&quick()).images);
}

#[test]
fn v_prediction_has_comfyuis_semantics() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, bytes) in scumble_model::FILES {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        let text = String::from_utf8_lossy(bytes)
            .replace("\"prediction_type\": \"epsilon\"", "\"prediction_type\": \"v_prediction\"");
        let bytes = if *name == "scheduler/scheduler_config.json" { text.into_bytes() } else { bytes.to_vec() };
        std::fs::write(path, bytes).expect("written");
    }
    let files = Files::open(folder.path()).expect("a model folder");
    let v = load(pipeline().gpu(), files);
    let request = Request { steps: 6, cfg: 3.0, sag_scale: 0.5, sag_blur_sigma: 2.0, ..request() };
    let made = block_on(v.generate(&request, &mut |_| std::ops::ControlFlow::Continue(()))).expect("a picture");
    let error = relative(&made.latents, &Golden::open("loop_v").take("latents").data);
    println!("v prediction: latents {error:.1e} from PyTorch");
    assert!(error < 1e-4, "{error:.1e}");
}
