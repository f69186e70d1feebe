//! The options that bring files along: pictures to start from, LoRAs, textual inversions, parts of a model; and their mistakes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::{Dtype, TensorView};

const SMALL: &[&str] = &["--width", "64", "--height", "48", "--steps", "2", "--seed", "3"];

/// The program in a folder. What it keeps between runs stays out of the user's own cache; the driver's cache is the usual one.
fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_scumble"));
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    if let Some(usual) = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home) {
        command.env("MESA_SHADER_CACHE_DIR", usual);
    }
    command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache")).current_dir(folder);
    command
}

fn scumble(folder: &Path, args: &[&str]) -> Output {
    command(folder).args(args).output().expect("the program runs")
}

fn works(folder: &Path, args: &[&str]) -> String {
    let out = scumble(folder, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// One line that holds every one of `words`.
fn fails(folder: &Path, args: &[&str], words: &[&str]) {
    let out = scumble(folder, args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(!out.status.success() && errors.len() == 1 && !stderr.contains("panicked"), "{args:?}: {stderr}");
    for word in words {
        assert!(errors[0].contains(word), "{args:?}: {word:?} is not in {:?}", errors[0]);
    }
}

fn write(path: &Path, tensors: &[(&str, &[usize], f32)]) {
    let values: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape, scale)| {
            let count = shape.iter().product::<usize>();
            (0..count).flat_map(|i| ((i as f32 * 0.7).sin() * scale).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors
        .iter()
        .zip(&values)
        .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("a view")));
    std::fs::write(path, safetensors::serialize(views, None).expect("serialised")).expect("written");
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("there")
}

#[test]
fn a_picture_is_begun_from_another() {
    let folder = tempfile::tempdir().expect("a folder");
    let f = folder.path();
    works(f, &[&["a fox", "-o", "a.png"][..], SMALL].concat());
    let from = ["a bear", "--init", "a.png", "--denoise", "0.5", "--steps", "2", "--seed", "4", "-o", "b.png"];
    let json: serde_json::Value = serde_json::from_str(&works(f, &[&from[..], &["--json"]].concat())).expect("JSON");
    assert_eq!((json["request"]["width"].as_u64(), json["request"]["height"].as_u64()), (Some(64), Some(48)));
    assert!(json["timings_ms"]["encode"].as_f64() > Some(0.0));
    let png = String::from_utf8_lossy(&read(&f.join("b.png"))).into_owned();
    assert!(png.contains("Denoising strength: 0.5"));

    // A mask in JPEG's place: any format is read; here white on the right half.
    let mask = image::GrayImage::from_fn(64, 48, |x, _| image::Luma([if x < 32 { 0 } else { 255 }]));
    mask.save(f.join("mask.png")).expect("written");
    works(f, &[&from[..10], &["c.png", "--mask", "mask.png", "--mask-feather", "0"]].concat());
    let open = |name: &str| image::open(f.join(name)).expect(name).to_rgb8();
    let (a, c) = (open("a.png"), open("c.png"));
    assert!((0..48).all(|y| (0..32).all(|x| a.get_pixel(x, y) == c.get_pixel(x, y))), "outside the mask it stays");
    assert!((0..48).any(|y| (32..64).any(|x| a.get_pixel(x, y) != c.get_pixel(x, y))), "inside it is repainted");

    // Scaled where a size is asked for; the other side follows.
    let args = [&from[..], &["--width", "96", "--json"]].concat();
    let json: serde_json::Value = serde_json::from_str(&works(f, &args)).expect("JSON");
    assert_eq!(json["request"]["height"].as_u64(), Some(72));

    std::fs::write(f.join("text.png"), "no picture").expect("written");
    image::GrayImage::new(40, 40).save(f.join("small.png")).expect("written");
    image::GrayImage::new(24, 40).save(f.join("tiny.png")).expect("written");
    fails(f, &["x", "--init", "no.png"], &["no.png", "no such file"]);
    fails(f, &["x", "--init", "text.png"], &["text.png", "not a picture"]);
    fails(f, &["x", "--init", "tiny.png"], &["tiny.png", "24x40", "at least 40x40"]);
    fails(f, &["x", "--init", "a.png", "--mask", "small.png"], &["small.png", "40x40", "64x48"]);
    fails(f, &["x", "--init", "a.png", "--denoise", "1.5"], &["denoise", "above 0, at most 1", "1.5"]);
    fails(f, &["x", "--init", "a.png", "--denoise", "0"], &["denoise"]);
    fails(f, &["x", "--denoise", "0.5"], &["denoise", "--init"]);
    fails(f, &["x", "--init", "a.png", "--mask", "mask.png", "--mask-feather", "-1"], &["mask-feather"]);
    assert!(!scumble(f, &["x", "--mask", "mask.png"]).status.success(), "a mask of nothing");
}

#[test]
fn loras_are_merged() {
    let folder = tempfile::tempdir().expect("a folder");
    let f = folder.path();
    let name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q";
    let (up, down) = (format!("{name}.lora_up.weight"), format!("{name}.lora_down.weight"));
    write(
        &f.join("style.safetensors"),
        &[(&up, &[192, 2], 0.5), (&down, &[2, 192], 0.5), ("other.lora_up.weight", &[1, 1], 1.0)],
    );
    let run = |more: &[&str], out: &str| {
        let args = [&["a fox", "-o", out, "--latents-out", "l.safetensors"][..], SMALL, more].concat();
        let stderr = String::from_utf8_lossy(&scumble(f, &args).stderr).into_owned();
        (read(&f.join("l.safetensors")), stderr)
    };
    let (plain, _) = run(&[], "a.png");
    let (styled, told) = run(&["--lora", "style.safetensors:0.8"], "b.png");
    assert!(plain != styled && told.contains("warning") && told.contains("other"), "{told}");
    assert!(String::from_utf8_lossy(&read(&f.join("b.png"))).contains("style: 0.8"));
    assert_eq!(run(&["--lora", "style.safetensors:0"], "c.png").0, plain, "strength 0 is none");
    let (whole, _) = run(&["--lora", "style.safetensors"], "d.png");
    let (halves, _) = run(&["--lora", "style.safetensors:0.5", "--lora", "style.safetensors:0.5"], "e.png");
    assert_ne!(whole, styled, "the strength counts, 1 by itself");
    assert_eq!(whole.len(), halves.len());

    write(&f.join("loha.safetensors"), &[(&format!("{name}.hada_w1_a"), &[192, 2], 0.1)]);
    write(&f.join("wrong.safetensors"), &[(&up, &[100, 2], 0.5), (&down, &[2, 192], 0.5)]);
    fails(f, &["x", "--lora", "no.safetensors"], &["no.safetensors", "no such file"]);
    fails(f, &["x", "--lora", "loha.safetensors"], &["loha.safetensors", "LoHa"]);
    fails(f, &["x", "--lora", "wrong.safetensors"], &["wrong.safetensors", "192", "100"]);
    fails(f, &["x", "--lora", "style.safetensors:1e9"], &["strength", "100"]);
    fails(f, &["x", "-m", "style.safetensors"], &["style.safetensors", "LoRA", "--lora"]);
}

#[test]
fn textual_inversions_are_found_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let f = folder.path();
    std::fs::create_dir(f.join("words")).expect("made");
    write(&f.join("words/glow.safetensors"), &[("emb_params", &[2, 192], 0.5)]);
    write(&f.join("words/wide.safetensors"), &[("emb_params", &[2, 768], 0.5)]);
    let ids = |prompt: &str| -> serde_json::Value {
        let text = works(f, &["probe", "tokens", "--prompt", prompt, "--embeddings", "words"]);
        serde_json::from_str(&text).expect("JSON")
    };
    let found = ids("a embedding:glow fox");
    let row = found["ids"][0].as_array().expect("a chunk");
    assert!(row.len() == 77 && row[2].is_null() && row[3].is_null() && row[4].is_u64(), "{found}");
    assert_eq!(ids("one BREAK two")["ids"].as_array().map(Vec::len), Some(2));
    works(f, &[&["embedding:glow", "--embeddings", "words", "-o", "a.png"][..], SMALL].concat());
    fails(f, &["embedding:glitter", "--embeddings", "words"], &["glitter", "glow"]);
    fails(f, &["embedding:wide", "--embeddings", "words"], &["wide", "768", "192"]);
    fails(f, &["x", "--prompt-style", "midjourney"], &["comfy", "a1111"]);
}

#[test]
fn less_memory_gives_the_same_picture() {
    let folder = tempfile::tempdir().expect("a folder");
    let f = folder.path();
    let run = |more: &[&str], out: &str| {
        works(f, &[&["a fox", "-o", out][..], SMALL, more].concat());
        image::open(f.join(out)).expect("a picture").to_rgb8()
    };
    let plain = run(&[], "a.png");
    assert_eq!(run(&["--lowmem"], "b.png"), plain);
    let tiled = run(&["--vae-tile", "64"], "c.png");
    let worst = plain.as_raw().iter().zip(tiled.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(worst <= Some(1), "{worst:?}");
    assert_ne!(run(&["--clip-skip", "2"], "d.png"), plain);
    fails(f, &["x", "--vae-tile", "63"], &["vae-tile", "63"]);
    fails(f, &["x", "--clip-skip", "5"], &["clip-skip", "4"]);
    fails(f, &["x", "--original-size", "big"], &["original-size", "1024x1024", "big"]);
}

#[test]
fn info_tells_what_a_model_is_and_what_it_needs() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = works(folder.path(), &["info"]);
    for word in ["family", "decided by", "weights", "--lowmem", "F16", "predicts"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&works(folder.path(), &["info", "--json"])).expect("JSON");
    let bytes = &json["model"]["gpu_bytes"];
    assert!(bytes["weights"].as_u64() > Some(10_000_000), "{json}");
    assert!(bytes["lowmem_peak"].as_u64() < bytes["peak"].as_u64(), "{json}");
}
