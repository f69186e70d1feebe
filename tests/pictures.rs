//! Rung 5: what starts from a picture, and how prompts are weighed, against diffusers' pipelines and PyTorch
//! (tools/reference/pictures.py); the VAE in tiles against the VAE whole; one part at a time against all at once.

#[path = "common/networks.rs"]
mod networks;

use std::sync::OnceLock;

use networks::{Golden, model_folder, relative};
use pollster::block_on;
use scumble::files::Files;
use scumble::gpu::{Gpu, GpuOptions};
use scumble::image::Image;
use scumble::inpaint::Init;
use scumble::probe::{self, Reading};
use scumble::text::{Embeddings, Style};
use scumble::{Checkpoint, Generated, LoadOptions, Pipeline, Precision, Request};

const PROMPT: &str = "a fox in a pine forest at night";
const SIZE: [u32; 2] = [72, 96];

/// f32 on both sides, with the losses of six steps at cfg 7: PyTorch's own loop is 2e-5 from diffusers' pipeline.
const LIMIT: f64 = 1e-4;

fn gpu() -> &'static Gpu {
    static ONCE: OnceLock<Gpu> = OnceLock::new();
    ONCE.get_or_init(|| {
        let options = GpuOptions { device: std::env::var("SCUMBLE_DEVICE").ok(), ..Default::default() };
        block_on(Gpu::open(&options)).expect("a GPU or a software device")
    })
}

fn load(files: Files, lowmem: bool) -> Pipeline {
    let model = Checkpoint::open(&files.into()).expect("a model");
    block_on(Pipeline::load(gpu(), model, LoadOptions { precision: Precision::F32, lowmem })).expect("loaded")
}

fn embedded() -> &'static Pipeline {
    static ONCE: OnceLock<Pipeline> = OnceLock::new();
    ONCE.get_or_init(|| load(Files::Embedded(scumble_model::FILES), false))
}

fn run(pipeline: &Pipeline, request: &Request) -> Generated {
    block_on(pipeline.generate(request, &mut |_| std::ops::ControlFlow::Continue(()))).expect("a picture")
}

/// The picture of the reference script.
fn picture() -> Image {
    let [width, height] = SIZE;
    let value = |x: u32, y: u32, c: u32| ((x * 7 + y * 3 + c * 50 + x * y / 5) % 256) as u8;
    let pixel = |i: u32| [0, 1, 2].map(|c| value(i % width, i / width, c));
    Image { width, height, rgb: (0..width * height).flat_map(pixel).collect() }
}

/// Its mask.
fn mask() -> Vec<f32> {
    let [width, height] = SIZE;
    let block = |i: u32| (i % width / 8, i / width / 8);
    (0..width * height).map(|i| f32::from(u8::from((block(i).0 + block(i).1) % 3 == 0 || block(i).0 > 5))).collect()
}

fn request(masked: bool) -> Request {
    Request {
        prompt: PROMPT.into(),
        seed: 42,
        steps: 6,
        denoise: 0.6,
        scheduler: "simple".into(),
        init: Some(Init { image: picture(), mask: masked.then(mask), feather: 0.0 }),
        ..Default::default()
    }
}

/// With SAG against the reference's loop, without it against diffusers' pipeline.
fn check(pipeline: &Pipeline, request: &Request, name: &str) -> Generated {
    let golden = Golden::open("pictures/loops");
    let made = run(pipeline, request);
    let plain = run(pipeline, &Request { sag_scale: 0.0, ..request.clone() });
    for (name, latents) in [(name.to_owned(), &plain.latents), (format!("{name}_sag"), &made.latents)] {
        let error = relative(latents, &golden.take(&name).data);
        println!("{name}: {error:.1e}");
        assert!(error < LIMIT, "{name}: {error:.1e}");
    }
    assert!(!made.masks.is_empty() && plain.masks.is_empty());
    made
}

#[test]
fn image_to_image_equals_diffusers() {
    let made = check(embedded(), &request(false), "img2img");
    assert_eq!([made.images[0].width, made.images[0].height], SIZE);
}

#[test]
fn masked_latents_equal_diffusers_and_the_rest_of_the_picture_stays() {
    let made = check(embedded(), &request(true), "masked");
    let (before, mask) = (picture(), mask());
    let outside = (0..mask.len()).filter(|&i| mask[i] == 0.0);
    assert!(outside.clone().count() > 1000);
    assert!(outside.clone().all(|i| before.rgb[i * 3..][..3] == made.images[0].rgb[i * 3..][..3]));
    let changed = (0..mask.len()).filter(|&i| before.rgb[i * 3..][..3] != made.images[0].rgb[i * 3..][..3]).count();
    assert!(changed > 1000, "inside, it is repainted");
}

#[test]
fn a_batch_starts_from_one_picture() {
    let one = run(embedded(), &request(true));
    let noise = scumble::noise::randn(42, 4 * 12 * 9);
    let both = run(embedded(), &Request { batch: 2, latents: Some(noise.repeat(2)), ..request(true) });
    for half in both.latents.chunks_exact(noise.len()) {
        assert!(relative(half, &one.latents) < 1e-5);
    }
}

/// The embedded model with a UNet of nine channels and drawn weights.
fn nine() -> tempfile::TempDir {
    let folder = model_folder("unet", "../pictures/unet_nine");
    for (name, bytes) in scumble_model::FILES {
        let path = folder.path().join(name);
        if !name.starts_with("unet/") {
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            std::fs::write(path, bytes).expect("written");
        }
    }
    let unet = |name: &str| folder.path().join("unet").join(name);
    std::fs::rename(unet("weights.safetensors"), unet("diffusion_pytorch_model.safetensors")).expect("renamed");
    folder
}

#[test]
fn an_inpainting_model_sees_mask_and_picture() {
    let folder = nine();
    let pipeline = load(Files::open(folder.path()).expect("a model"), false);
    check(&pipeline, &request(true), "nine");
    // Without a picture everything is repainted.
    let request = Request { steps: 1, width: Some(40), height: Some(40), ..Default::default() };
    assert_eq!(run(&pipeline, &request).images.len(), 1);
}

#[test]
fn weights_are_applied_as_comfyui_and_a1111_do() {
    let model = Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("a model");
    let golden = Golden::open("pictures/weights");
    for (style, name) in [(Style::Comfy, "comfy"), (Style::A1111, "a1111")] {
        let reading = Reading { style, clip_skip: None };
        let made = block_on(probe::clip(gpu(), &model, &Embeddings::none(), "a (red:1.5) fox", reading)).expect("run");
        let error = relative(&made.0.data, &golden.take(name).data);
        assert!(error < 2e-5, "{name}: {error:.1e}");
    }
}

#[test]
fn a_context_twice_over_is_the_same() {
    // One chunk beside two: the shorter is repeated, which attention does not notice.
    let quick = Request { steps: 2, width: Some(72), height: Some(72), prompt: PROMPT.into(), ..Default::default() };
    let long = format!("{PROMPT} BREAK {PROMPT}");
    let one = run(embedded(), &quick);
    let twice = run(embedded(), &Request { prompt: long, ..quick });
    let error = relative(&twice.latents, &one.latents);
    assert!(error < 1e-5, "{error:.1e}");
}

#[test]
fn one_part_at_a_time_makes_the_same_picture() {
    let low = load(Files::Embedded(scumble_model::FILES), true);
    let request = Request { steps: 2, ..request(true) };
    let (made, expected) = (run(&low, &request), run(embedded(), &request));
    assert_eq!(made.latents, expected.latents);
    assert_eq!(made.images, expected.images);
}

/// Between two pictures, dB.
fn psnr(a: &Image, b: &Image) -> f64 {
    let squares = a.rgb.iter().zip(&b.rgb).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2));
    let mean = squares.sum::<f64>() / a.rgb.len() as f64;
    10.0 * (255.0f64.powi(2) / mean.max(1e-12)).log10()
}

#[test]
fn the_vae_in_tiles_leaves_no_seam() {
    let request = Request {
        prompt: PROMPT.into(),
        seed: 42,
        steps: 4,
        width: Some(512),
        height: Some(384),
        sag_scale: 0.0,
        ..Default::default()
    };
    let whole = run(embedded(), &request);
    let tiled = run(embedded(), &Request { vae_tile: Some(128), ..request.clone() });
    assert_eq!(tiled.latents, whole.latents);
    let quality = psnr(&tiled.images[0], &whole.images[0]);
    println!("decoded in tiles of 128: {quality:.1} dB from whole");
    assert!(quality > 60.0, "{quality:.1} dB");

    // And the way back.
    let init = Init { image: whole.images[0].clone(), mask: None, feather: 0.0 };
    let again = Request { init: Some(init), denoise: 0.25, steps: 1, ..request };
    let (a, b) = (run(embedded(), &again), run(embedded(), &Request { vae_tile: Some(128), ..again.clone() }));
    let error = relative(&b.latents, &a.latents);
    println!("encoded in tiles of 128: latents {error:.1e} from whole");
    assert!(error < 1e-5, "{error:.1e}");
}

#[test]
fn pictures_and_masks_of_other_sizes_are_told() {
    let fails = |request: Request, words: &str| {
        let made = block_on(embedded().generate(&request, &mut |_| std::ops::ControlFlow::Continue(())));
        let error = made.err().expect(words).to_string();
        assert!(error.contains(words), "{error}");
    };
    fails(Request { width: Some(64), ..request(false) }, "init: expected 64x96, found 72x96");
    fails(Request { init: None, ..request(false) }, "denoise");
    fails(Request { denoise: 0.0, ..request(false) }, "denoise");
    fails(Request { denoise: f32::NAN, ..request(false) }, "denoise");
    let short = Init { mask: Some(vec![0.0; 5]), ..request(true).init.expect("set") };
    fails(Request { init: Some(short), ..request(true) }, "mask");
    fails(Request { clip_skip: Some(9), ..request(false) }, "clip-skip");
}
