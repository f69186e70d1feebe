//! The command line as a user meets it: what it writes, and one clear line for every mistake.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SMALL: &[&str] = &["--width", "64", "--height", "40", "--steps", "2", "--seed", "3"];

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

/// The program fails with one line that holds every one of `words`, and writes no file.
fn fails(folder: &Path, args: &[&str], words: &[&str]) {
    let before = files(folder);
    let out = scumble(folder, args);
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{args:?} should fail");
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{args:?}: {stderr}");
    for word in words {
        assert!(errors[0].contains(word), "{args:?}: {word:?} is not in {:?}", errors[0]);
    }
    assert_eq!(files(folder), before, "{args:?} left files behind");
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    all.sort();
    all
}

fn with(base: &[&'static str], more: &[&'static str]) -> Vec<&'static str> {
    [base, more].concat()
}

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// A copy of the embedded model, to be damaged.
fn model(folder: &Path) -> PathBuf {
    let root = folder.join("model");
    for (name, bytes) in scumble_model::FILES {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        std::fs::write(path, bytes).expect("written");
    }
    root
}

#[test]
fn a_prompt_becomes_a_picture_with_its_settings_inside() {
    let folder = temp();
    let args =
        with(&["a fox", "-o", "fox.png", "--latents-out", "l.safetensors", "--mask-out", "masks", "--json"], SMALL);
    let out = scumble(folder.path(), &args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).expect("one JSON object on stdout");
    assert_eq!(report["files"][0], "fox.png");
    assert!(report["timings_ms"]["total"].as_f64() > Some(0.0) && report["peak_gpu_bytes"].as_u64() > Some(1 << 20));
    assert_eq!(report["memory"]["planned_peak"], report["memory"]["peak"]);
    let png = std::fs::read(folder.path().join("fox.png")).expect("written");
    let texts = scumble::image::read_png_text(&png).expect("a PNG");
    let text = |keyword: &str| &texts.iter().find(|(k, _)| k == keyword).expect(keyword).1;
    let expected = "a fox\nSteps: 2, Sampler: Euler, Schedule type: Normal, CFG scale: 7, Seed: 3, Size: 64x40, Model: embedded, \
                    SAG scale: 0.75, SAG blur sigma: 3, SAG threshold: 1, Version: scumble ";
    assert!(text("parameters").starts_with(expected), "{}", text("parameters"));
    let request: scumble::Request = serde_json::from_str(text("scumble")).expect("the request as JSON");
    assert_eq!((request.seed, request.sag_scale, request.width), (3, 0.75, Some(64)));
    let names: Vec<String> = files(&folder.path().join("masks"))
        .iter()
        .map(|p| p.file_name().expect("a name").to_string_lossy().into())
        .collect();
    assert_eq!(names, ["mask-001.png", "mask-002.png", "mask-sum.png", "masks.safetensors"]);

    // The latents of the file are the noise of another run: shape and batch come with them.
    let args = ["again", "--latents-in", "l.safetensors", "-o", "b.png", "--steps", "1", "--no-sag"];
    let out = scumble(folder.path(), &args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    fails(folder.path(), &["x", "--latents-in", "l.safetensors", "--width", "128"], &["width", "64", "128"]);
    fails(folder.path(), &["x", "--latents-in", "masks/masks.safetensors"], &["latents is missing", "masks"]);
}

#[test]
fn compare_draws_three_pictures_side_by_side() {
    let folder = temp();
    let out = scumble(folder.path(), &with(&["compare", "a fox", "-o", "c.png"], SMALL));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let file = std::fs::File::open(folder.path().join("c.png")).expect("written");
    let reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
    assert!(reader.info().width >= 3 * 64 && reader.info().height >= 40);
    fails(folder.path(), &["compare", "a fox", "--no-sag"], &["sag-scale"]);
}

#[test]
fn a_batch_is_numbered_and_an_older_file_is_kept() {
    let folder = temp();
    let out = scumble(folder.path(), &with(&["", "--no-sag", "--batch", "2"], SMALL));
    assert!(out.status.success(), "an empty prompt works: {}", String::from_utf8_lossy(&out.stderr));
    let out = scumble(folder.path(), &with(&["generate", "", "--no-sag"], SMALL));
    assert!(out.status.success());
    let out = scumble(folder.path(), &with(&["", "--no-sag"], SMALL));
    assert!(out.status.success());
    let names: Vec<String> =
        files(folder.path()).iter().map(|p| p.file_name().expect("a name").to_string_lossy().into()).collect();
    assert_eq!(
        names,
        ["scumble-3-1.png", "scumble-3-2.png", "scumble-3-3.png", "scumble-3.png"][..names.len()],
        "{names:?}"
    );
}

#[test]
fn wrong_numbers_and_names_are_told() {
    let folder = temp();
    let f = folder.path();
    fails(f, &["x", "--steps", "0"], &["steps", "from 1", "found 0"]);
    fails(f, &["x", "--steps", "-5"], &["steps", "-5"]);
    fails(f, &["x", "--steps", "many"], &["--steps", "many"]);
    fails(f, &["x", "--width", "100"], &["width", "multiple of 8", "100"]);
    fails(f, &["x", "--height", "-64"], &["height", "-64"]);
    fails(f, &["x", "--height", "8"], &["height", "from 40", "8"]);
    fails(f, &["x", "--cfg", "NaN"], &["cfg", "NaN"]);
    fails(f, &["x", "--cfg", "inf"], &["cfg", "inf"]);
    fails(f, &["x", "--sag-scale", "nan"], &["sag-scale", "NaN"]);
    fails(f, &["x", "--sag-blur-sigma", "-1"], &["sag-blur-sigma", "-1"]);
    fails(f, &["x", "--sag-threshold", "nan"], &["sag-threshold", "NaN"]);
    fails(f, &["x", "--batch", "0"], &["batch", "0"]);
    fails(f, &["x", "--seed", "one"], &["seed", "one"]);
    fails(f, &["x", "--sampler", "eular"], &["sampler", "eular", "euler_ancestral", "dpmpp_2m"]);
    fails(f, &["x", "--scheduler", "linear"], &["scheduler", "linear", "karras", "ddim_uniform"]);
    fails(f, &["x", "--precision", "f64"], &["precision", "f64"]);
    fails(f, &["x", "--variant", "conv2d"], &["--variant", "OP=NAME"]);
    fails(f, &["x", "--device", "no such card"], &["--device", "no such card", "0: "]);
    fails(f, &["x", "--no-such-option"], &["--no-such-option", "--help"]);
    fails(f, &["generate"], &["PROMPT"]);
    fails(f, &["x", "--mask-out", "m", "--no-sag"], &["--mask-out", "SAG"]);
}

#[test]
fn a_picture_that_does_not_fit_is_told_in_bytes() {
    let folder = temp();
    let out = scumble(folder.path(), &["info", "--json"]);
    let info: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let room = info["chosen"]["max_binding"].as_u64().expect("a number");
    if room < 4 << 30 {
        fails(
            folder.path(),
            &["x", "--width", "16384", "--height", "16384"],
            &["16384x16384", "needs", "available", "bytes"],
        );
    }
}

#[test]
fn an_output_that_cannot_be_written_is_told_before_the_work() {
    let folder = temp();
    let f = folder.path();
    fails(f, &["x", "-o", "no/such/folder/x.png"], &["no/such/folder/x.png", "folder does not exist"]);
    std::fs::create_dir(f.join("dir")).expect("made");
    fails(f, &["x", "-o", "dir"], &["dir", "folder"]);
}

#[test]
fn no_adapter_says_how_to_get_one() {
    let folder = temp();
    let mut command = command(folder.path());
    command.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent");
    let out = command.args(["x", "--steps", "1"]).output().expect("the program runs");
    let stderr = String::from_utf8_lossy(&out.stderr);
    if cfg!(target_os = "linux") {
        assert!(
            !out.status.success() && stderr.contains("no GPU adapter") && stderr.contains("mesa-vulkan-drivers"),
            "{stderr}"
        );
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[test]
fn what_is_kept_between_runs_may_be_damaged_or_deleted() {
    let folder = temp();
    let f = folder.path();
    let run = |more: &[&'static str]| {
        let out = scumble(f, &[&with(&["a fox", "-o", "x.png", "--no-sag"], SMALL), more].concat());
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{more:?}: {stderr}");
        stderr
    };
    let tuned = ["--cache-dir", "kept", "--autotune"];
    run(&tuned);
    let device = files(&f.join("kept")).pop().expect("a folder for the device");
    let choices = device.join("tuning.json");
    let text = std::fs::read_to_string(&choices).expect("the choices are kept");
    let kept: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(kept["choices"].as_object().is_some_and(|map| map.len() > 10), "{text}");
    let pipelines = device.join("pipelines.bin");
    assert!(pipelines.is_file(), "Vulkan keeps pipelines");
    // What is known is not measured again.
    let before = std::fs::metadata(&choices).expect("there").modified().expect("a time");
    run(&tuned);
    assert_eq!(std::fs::metadata(&choices).expect("there").modified().expect("a time"), before);
    // Damaged files are made anew; a folder that cannot be made is a warning where nothing was asked, an error where it was.
    std::fs::write(&choices, &text[..text.len() / 2]).expect("written");
    std::fs::write(&pipelines, b"not a pipeline").expect("written");
    run(&["--cache-dir", "kept"]);
    assert_ne!(std::fs::read(&pipelines).expect("there"), b"not a pipeline");
    let stderr = run(&["--cache-dir", "x.png"]);
    assert!(stderr.contains("warning: ") && stderr.contains("--cache-dir"), "{stderr}");
    let args = with(&["a fox", "-o", "y.png", "--autotune", "--cache-dir", "x.png"], SMALL);
    fails(f, &args, &["tuning.json", "cannot be written", "--no-cache"]);
    std::fs::remove_dir_all(f.join("kept")).expect("deleted");
    run(&["--no-cache"]);
    assert!(!f.join("kept").exists());
}

#[test]
fn bench_tells_rates_and_shares_of_what_it_checked() {
    let folder = temp();
    let f = folder.path();
    let run = |args: &[&str]| -> serde_json::Value {
        let out = scumble(f, args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).expect("one JSON object on stdout")
    };
    let args = ["bench", "--kernels", "--shapes", "sd15", "--filter", "1280x64", "--seconds", "0", "--json"];
    let kernels = &run(&args)["kernels"];
    assert!(
        kernels["limits"]["copy_gb_s"].as_f64() > Some(0.0) && kernels["limits"]["product_tflops"].as_f64() > Some(0.0)
    );
    let rows = kernels["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 3, "group norm with and without SiLU, layer norm: {rows:?}");
    for row in rows {
        let times = &row["times"];
        assert!(
            times["median_ms"].as_f64() >= times["min_ms"].as_f64() && times["min_ms"].as_f64() > Some(0.0),
            "{row}"
        );
        assert!(
            row["gb_s"].as_f64() > Some(0.0) && row["share"].as_f64() > Some(0.0) && row["error"].as_f64() < Some(1e-4)
        );
    }
    let args = [
        "bench",
        "--step",
        "--image",
        "--batch",
        "1",
        "--width",
        "64",
        "--height",
        "40",
        "--steps",
        "1",
        "--repeats",
        "1",
    ];
    let found = run(&[&args[..], &["--json"]].concat());
    let rows = found["step"]["rows"].as_array().expect("rows");
    let dispatches: Vec<_> = rows.iter().map(|row| row["dispatches"].as_u64()).collect();
    assert!(rows.len() == 3 && dispatches[2] > dispatches[1] && dispatches[1] >= dispatches[0], "{dispatches:?}");
    assert!(rows.iter().all(|row| row["ops"].as_array().is_some_and(|ops| ops.len() > 10)));
    assert!(found["image"]["times"]["median_ms"].as_f64() > Some(0.0));
    fails(f, &["bench", "--kernels", "--filter", "no such op"], &["--filter", "no such op"]);
    fails(f, &["bench", "--kernels", "--shapes", "sd3"], &["--shapes", "sd15, sdxl, vae", "sd3"]);
    fails(f, &["bench", "--step", "--batch", "0"], &["batch", "1 to 1024", "0"]);
}

#[test]
fn a_long_prompt_is_read_to_its_end() {
    let folder = temp();
    let prompt = "fox ".repeat(10_000);
    let out = scumble(folder.path(), &[&[prompt.as_str(), "--no-sag", "-o", "x.png"][..], SMALL].concat());
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && !stderr.contains("warning"), "{stderr}");
    let out = scumble(folder.path(), &["probe", "tokens", "--prompt", &prompt]);
    let ids: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(ids["ids"].as_array().map(Vec::len), Some(134));
}

#[test]
fn damaged_models_are_told_by_file_and_tensor() {
    let folder = temp();
    let f = folder.path();
    let root = model(f);
    let unet = root.join("unet/diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&unet).expect("there");
    let try_with = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&unet, bytes).expect("written");
        fails(f, &["x", "-m", "model", "--steps", "1"], words);
    };
    try_with(b"", &["diffusion_pytorch_model.safetensors", "not a safetensors file"]);
    try_with(b"PK\x03\x04 this is a pickle, not a safetensors file", &["not a safetensors file"]);
    try_with(&whole[..whole.len() / 2], &["truncated or damaged"]);
    try_with(&whole[..20], &["truncated or damaged"]);

    let length = u64::from_le_bytes(whole[..8].try_into().expect("eight")) as usize;
    let header = String::from_utf8(whole[8..8 + length].to_vec()).expect("JSON");
    let edit = |from: &str, to: &str| {
        assert!(header.contains(from), "{from} in the header");
        let text = header.replacen(from, to, 1);
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &whole[8 + length..]].concat()
    };
    try_with(&edit("\"conv_in.weight\"", "\"conv_on.weight\""), &["tensor conv_in.weight is missing", "[96, 4, 3, 3]"]);
    try_with(
        &edit("\"shape\":[96,4,3,3]", "\"shape\":[96,3,4,3]"),
        &["conv_in.weight", "expected [96, 4, 3, 3]", "found [96, 3, 4, 3]"],
    );
    let mut json: serde_json::Value = serde_json::from_str(&header).expect("JSON");
    json["conv_in.weight"]["data_offsets"] = serde_json::json!([0, 99_999_999]);
    let text = json.to_string();
    let lying = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &whole[8 + length..]].concat();
    try_with(&lying, &["damaged", "offsets"]);

    std::fs::remove_file(&unet).expect("removed");
    fails(f, &["x", "-m", "model"], &["unet/diffusion_pytorch_model.safetensors", "no such file"]);
    std::fs::write(&unet, &whole).expect("written");
    std::fs::write(root.join("unet/config.json"), "{\"in_channels\": 4}").expect("written");
    fails(f, &["x", "-m", "model"], &["unet/config.json", "missing field"]);
    fails(f, &["x", "-m", "nowhere"], &["nowhere", "no such file or folder"]);
    std::fs::write(f.join("sd.ckpt"), "pickle").expect("written");
    fails(f, &["x", "-m", "sd.ckpt"], &["sd.ckpt", "pickle", "convert"]);
    std::fs::write(f.join("text.safetensors"), "no tensors").expect("written");
    fails(f, &["x", "-m", "text.safetensors"], &["text.safetensors", "not a safetensors file"]);
    fails(f, &["info", "-m", "nowhere"], &["nowhere"]);
}

#[test]
fn probes_answer_with_the_names_of_the_contract() {
    let folder = temp();
    let f = folder.path();
    let run = |args: &[&str]| {
        let out = scumble(f, args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("text")
    };
    let tokens: serde_json::Value =
        serde_json::from_str(&run(&["probe", "tokens", "--prompt", "a fox"])).expect("JSON");
    assert_eq!(tokens["ids"][0].as_array().map(Vec::len), Some(77));
    let schedule: serde_json::Value =
        serde_json::from_str(&run(&["probe", "schedule", "--scheduler", "karras", "--steps", "20"])).expect("JSON");
    assert_eq!(schedule["sigmas"].as_array().map(Vec::len), Some(21));
    assert_eq!(schedule["timesteps"][0], 999.0);
    run(&["probe", "noise", "--seed", "42", "--shape", "1,4,5,6", "--out", "n.safetensors"]);
    run(&["probe", "clip", "--prompt", "a fox", "--out", "c.safetensors"]);

    let read = |name: &str| std::fs::read(f.join(name)).expect("written");
    let shapes = |bytes: &[u8]| {
        let tensors = safetensors::SafeTensors::deserialize(bytes).expect("safetensors");
        let mut all: Vec<(String, Vec<usize>)> =
            tensors.tensors().into_iter().map(|(n, t)| (n, t.shape().to_vec())).collect();
        all.sort();
        all
    };
    assert_eq!(shapes(&read("n.safetensors")), [("noise".into(), vec![1, 4, 5, 6])]);
    assert_eq!(
        shapes(&read("c.safetensors")),
        [("hidden_states".into(), vec![1, 77, 192]), ("pooled".into(), vec![1, 192])]
    );

    let write = |name: &str, tensors: &[(&str, &[usize])]| {
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, s)| vec![0; s.iter().product::<usize>() * 4]).collect();
        let views = tensors.iter().zip(&bytes).map(|((n, s), b)| {
            (*n, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, s.to_vec(), b).expect("a view"))
        });
        std::fs::write(f.join(name), safetensors::serialize(views, None).expect("serialised")).expect("written");
    };
    write("u.safetensors", &[("sample", &[2, 4, 7, 5]), ("timestep", &[1]), ("encoder_hidden_states", &[2, 77, 192])]);
    run(&["probe", "unet", "--in", "u.safetensors", "--out", "v.safetensors", "--sag-map"]);
    assert_eq!(shapes(&read("v.safetensors")), [("mass".into(), vec![2, 4]), ("sample".into(), vec![2, 4, 7, 5])]);
    write("z.safetensors", &[("sample", &[1, 4, 5, 5])]);
    run(&["probe", "vae-decode", "--in", "z.safetensors", "--out", "p.safetensors"]);
    assert_eq!(shapes(&read("p.safetensors")), [("sample".into(), vec![1, 3, 40, 40])]);
    run(&["probe", "vae-encode", "--in", "p.safetensors", "--out", "m.safetensors"]);
    assert_eq!(
        shapes(&read("m.safetensors")),
        [("logvar".into(), vec![1, 4, 5, 5]), ("mean".into(), vec![1, 4, 5, 5])]
    );
    write("d.safetensors", &[("denoised", &[1, 4, 9, 5]), ("mass", &[1, 6])]);
    run(&[
        "probe",
        "degrade",
        "--in",
        "d.safetensors",
        "--out",
        "e.safetensors",
        "--mid",
        "2,3",
        "--blur-sigma",
        "2",
        "--threshold",
        "1",
    ]);
    assert_eq!(
        shapes(&read("e.safetensors")),
        [("degraded".into(), vec![1, 4, 9, 5]), ("mask".into(), vec![1, 1, 9, 5])]
    );

    fails(f, &["probe", "unet", "--in", "z.safetensors", "--out", "x.safetensors"], &["timestep is missing", "sample"]);
    fails(
        f,
        &["probe", "vae-decode", "--in", "p.safetensors", "--out", "x.safetensors"],
        &["sample", "[B, 4, H, W]", "[1, 3, 40, 40]"],
    );
    fails(
        f,
        &["probe", "degrade", "--in", "d.safetensors", "--out", "x.safetensors", "--mid", "2,2"],
        &["mass", "[1, 4]", "[1, 6]"],
    );
}
