//! Rung 4: whole models of every family, opened by themselves from single files and from diffusers folders, against PyTorch
//! (tools/reference/families.py); pruned, mixed and foreign files; damaged ones (headers alone: hostile.rs).

#[path = "common/networks.rs"]
mod networks;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::OnceLock;

use half::{bf16, f16};
use networks::{Golden, data, draw, relative};
use pollster::block_on;
use safetensors::tensor::{Dtype, TensorView};
use scumble::files::Files;
use scumble::gpu::{Gpu, GpuOptions};
use scumble::noise::randn;
use scumble::probe::{self, HostTensor, Reading, UNetInput};
use scumble::schedule::Prediction;
use scumble::text::{Embeddings, Style};
use scumble::{Checkpoint, Error, LoadOptions, Pipeline, Precision, Source};

/// The limits: f32 files computed in f32, and anything with f16 in it.
const F32: f64 = 1e-4;
const F16: f64 = 5e-3;
/// bf16 has eight bits of mantissa where f16 has eleven.
const BF16: f64 = 2e-2;

const PROMPT: &str = "a fox in a pine forest at night, masterpiece!";

fn gpu() -> &'static Gpu {
    static ONCE: OnceLock<Gpu> = OnceLock::new();
    ONCE.get_or_init(open_gpu)
}

fn open_gpu() -> Gpu {
    let options = GpuOptions { device: std::env::var("SCUMBLE_DEVICE").ok(), ..Default::default() };
    block_on(Gpu::open(&options)).expect("a GPU or a software device")
}

/// A tensor of a family: canonical name, shape, name in the single file, how it lies there.
type Place = (String, Vec<usize>, String, String);

/// A part of a family.
struct PartOf {
    config: serde_json::Value,
    places: Vec<Place>,
    values: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

/// A family with its drawn weights.
struct Family {
    name: &'static str,
    parts: BTreeMap<String, PartOf>,
}

fn part(mut json: serde_json::Value, like: Option<&[Place]>) -> PartOf {
    let mut places: Vec<Place> = match like {
        Some(places) => places.to_vec(),
        None => serde_json::from_value(json["tensors"].take()).expect("places"),
    };
    if json["config"]["in_channels"] == 9 {
        for (_, shape, ..) in places.iter_mut().filter(|place| place.0 == "conv_in.weight") {
            shape[1] = 9;
        }
    }
    let shapes = places.iter().map(|(name, shape, ..)| (name.clone(), shape.clone())).collect();
    let values = draw(&shapes).into_iter().map(|(name, shape, values)| (name, (shape, values))).collect();
    PartOf { config: json["config"].take(), places, values }
}

fn read(name: &str) -> BTreeMap<String, serde_json::Value> {
    let text = std::fs::read_to_string(data(&format!("families/{name}.json"))).expect("a golden");
    serde_json::from_str(&text).expect("JSON")
}

fn family(name: &'static str) -> &'static Family {
    static ALL: OnceLock<Vec<Family>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let whole = |name: &'static str, file: &str| Family {
            name,
            parts: read(file).into_iter().map(|(key, json)| (key, part(json, None))).collect(),
        };
        let mut all =
            vec![whole("sd15", "sd15"), whole("sd21", "sd21"), whole("sd21-v", "sd21"), whole("sdxl", "sdxl")];
        let mut inpaint = whole("sd15-inpaint", "sd15");
        let json = read("sd15-inpaint").remove("unet").expect("a UNet");
        let like = inpaint.parts["unet"].places.clone();
        inpaint.parts.insert("unet".into(), part(json, Some(&like)));
        all.push(inpaint);
        all
    });
    all.iter().find(|family| family.name == name).expect("a family")
}

/// Numbers in a file's type.
fn bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// A tensor of a file under way: type, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// Tensors of a file under way.
type Tensors = BTreeMap<String, Stored>;

fn save(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(n, (t, s, b))| (n.as_str(), TensorView::new(*t, s.clone(), b).expect("a view")));
    std::fs::write(path, safetensors::serialize(views, None).expect("serialised")).expect("written");
}

/// What stands beside a text encoder's positions in old files, and no network reads.
fn left_over(name: &str) -> Option<(String, Stored)> {
    if let Some(prefix) = name.strip_suffix("position_embedding.weight") {
        let ids = (0..77i64).flat_map(i64::to_le_bytes).collect();
        return Some((format!("{prefix}position_ids"), (Dtype::I64, vec![1, 77], ids)));
    }
    let prefix = name.strip_suffix("positional_embedding")?;
    Some((format!("{prefix}logit_scale"), (Dtype::F32, vec![], bytes(&[4.6], Dtype::F32))))
}

/// A family's tensors as a single file of the original layout has them.
fn single(family: &Family, dtype: Dtype) -> Tensors {
    let mut out = Tensors::new();
    for part in family.parts.values() {
        let mut thirds: BTreeMap<&str, [Option<&str>; 3]> = BTreeMap::new();
        for (name, _, theirs, how) in &part.places {
            let (shape, values) = &part.values[name];
            match how.as_str() {
                "0" | "1" | "2" => {
                    thirds.entry(theirs).or_default()[how.parse::<usize>().expect("a third")] = Some(name);
                }
                "t" => {
                    let [n, k] = shape[..] else { panic!("a matrix") };
                    let turned: Vec<f32> = (0..n * k).map(|i| values[i % n * k + i / n]).collect();
                    out.insert(theirs.clone(), (dtype, vec![k, n], bytes(&turned, dtype)));
                }
                how => {
                    let mut shape = shape.clone();
                    if how == "4" {
                        shape.extend([1, 1]);
                    }
                    out.insert(theirs.clone(), (dtype, shape, bytes(values, dtype)));
                }
            }
        }
        for (theirs, three) in thirds {
            let all = three.map(|name| &part.values[name.expect("q, k and v")]);
            let mut shape = all[0].0.clone();
            shape[0] *= 3;
            let joined: Vec<f32> = all.iter().flat_map(|(_, values)| values.iter().copied()).collect();
            out.insert(theirs.to_owned(), (dtype, shape, bytes(&joined, dtype)));
        }
    }
    if family.name == "sd21-v" {
        out.insert("v_pred".into(), (Dtype::F32, vec![0], vec![]));
    }
    // What older versions of transformers and OpenCLIP wrote beside the weights.
    let beside: Tensors = out.keys().filter_map(|name| left_over(name)).collect();
    out.extend(beside);
    // What training files hold beside.
    out.insert("alphas_cumprod".into(), (Dtype::F32, vec![4], bytes(&[0.9, 0.8, 0.7, 0.6], Dtype::F32)));
    out.insert("model_ema.diffusion_modelinput_blocks00weight".into(), (Dtype::F32, vec![1], vec![0; 4]));
    out.insert("model_ema.num_updates".into(), (Dtype::I64, vec![1], vec![0; 8]));
    out
}

/// What diffusers before 0.12 called the layers of the VAE's attention; the hub's Stable Diffusion 1.5 still does.
fn old_name(name: &str) -> String {
    let pairs = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];
    pairs.iter().fold(name.to_owned(), |name, (new, old)| name.replace(new, old))
}

/// Tensors in two files and an index, which versions of diffusers call by different names.
fn save_shards(at: &Path, index: &str, all: Tensors) {
    let halves: (Tensors, Tensors) = all.into_iter().partition(|(name, _)| name.as_str() < "mid");
    let mut map = BTreeMap::new();
    for (file, tensors) in [("a-00001-of-00002.safetensors", halves.0), ("a-00002-of-00002.safetensors", halves.1)] {
        save(&at.join(file), &tensors);
        map.extend(tensors.into_keys().map(|name| (name, file)));
    }
    let text = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    std::fs::write(at.join(format!("diffusion_pytorch_model.{index}")), text).expect("written");
}

/// A family as a diffusers folder: the UNet in two shards, the VAE as its fp16 variant.
fn folder(family: &Family, root: &Path) {
    let put = |name: String, text: String| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        std::fs::write(path, text).expect("written");
    };
    put("model_index.json".into(), "{}".into());
    let prediction = if family.name == "sd21-v" { "v_prediction" } else { "epsilon" };
    put("scheduler/scheduler_config.json".into(), format!("{{\"prediction_type\": \"{prediction}\"}}"));
    for (name, part) in &family.parts {
        put(format!("{name}/config.json"), part.config.to_string());
        let stored = |(n, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            (n.clone(), (Dtype::F32, shape.clone(), bytes(values, Dtype::F32)))
        };
        let mut all: Tensors = part.values.iter().map(stored).collect();
        let at = root.join(name);
        match name.as_str() {
            "unet" => {
                let index = match family.name {
                    "sdxl" => "safetensors.index.fp16.json",
                    "sd15-inpaint" => "fp16.safetensors.index.json",
                    _ => "safetensors.index.json",
                };
                save_shards(&at, index, all);
            }
            "vae" => {
                if family.name.starts_with("sd15") {
                    all = all.into_iter().map(|(name, tensor)| (old_name(&name), tensor)).collect();
                }
                save(&at.join("diffusion_pytorch_model.fp16.safetensors"), &all);
            }
            _ => {
                let beside: Tensors = all.keys().filter_map(|name| left_over(name)).collect();
                all.extend(beside);
                save(&at.join("model.safetensors"), &all);
            }
        }
    }
}

fn open(path: &Path) -> scumble::Result<Checkpoint> {
    Checkpoint::open(&Files::open(path)?.into())
}

fn tensor(seed: u64, shape: &[usize]) -> HostTensor {
    HostTensor::new(shape, randn(seed, shape.iter().product()))
}

/// The UNet on an even and on an odd latent, one and two images, one and two chunks of context.
fn check_unet(model: &Checkpoint, golden: &Golden, precision: Precision, limit: f64, what: &str) {
    let config = &model.unet.config;
    for (case, h, w, batch, tokens) in [("even", 8, 8, 1, 77), ("odd", 11, 9, 2, 154)] {
        let added = config.added.map(|_| {
            let ids = [1024.0, 768.0, 0.0, 8.0, 1024.0, 1024.0];
            (tensor(3, &[batch, 64]), HostTensor::new([batch, 6], ids.repeat(batch)))
        });
        let input = UNetInput {
            sample: tensor(1, &[batch, config.in_channels, h, w]),
            timestep: HostTensor::new([1], vec![500.0]),
            encoder_hidden_states: tensor(2, &[batch, tokens, config.cross_dim]),
            added,
        };
        let (sample, mass) = block_on(probe::unet(gpu(), model, precision, &input, true)).expect(what);
        for (name, found) in [("out", sample), ("mass", mass.expect("asked for"))] {
            let error = relative(&found.data, &golden.take(&format!("{case}.{name}")).data);
            println!("{what} {case} {name}: {error:.1e}");
            assert!(error < limit, "{what} {case} {name}: {error:.1e}");
        }
    }
}

fn check_text(model: &Checkpoint, golden: &Golden, prefix: &str, limit: f64, what: &str) {
    let made = block_on(probe::clip(gpu(), model, &Embeddings::none(), PROMPT, Reading::default())).expect(what);
    for (name, found) in [("hidden_states", made.0), ("pooled", made.1)] {
        let error = relative(&found.data, &golden.take(&format!("{prefix}{name}")).data);
        println!("{what} {name}: {error:.1e}");
        assert!(error < limit, "{what} {name}: {error:.1e}");
    }
}

fn check_vae(model: &Checkpoint, golden: &Golden, limit: f64, what: &str) {
    let decoded = block_on(probe::vae_decode(gpu(), model, Precision::F32, &tensor(4, &[2, 4, 3, 5]))).expect(what);
    let (mean, logvar) = block_on(probe::vae_encode(gpu(), model, &tensor(5, &[1, 3, 40, 24]))).expect(what);
    for (name, found) in [("decoded", decoded), ("mean", mean), ("logvar", logvar)] {
        let error = relative(&found.data, &golden.take(name).data);
        println!("{what} {name}: {error:.1e}");
        assert!(error < limit, "{what} {name}: {error:.1e}");
    }
}

/// Is it the model that it should be?
fn check_kind(model: &Checkpoint, name: &str, kind: &str, size: u32, what: &str) {
    assert!(model.family.ends_with(kind), "{what}: {} for {kind}", model.family);
    assert_eq!(model.size(), size, "{what}");
    let prediction = if name == "sd21-v" { Prediction::V } else { Prediction::Epsilon };
    assert_eq!(model.schedule().1, prediction, "{what}");
    let config = &model.unet.config;
    assert_eq!(config.in_channels, if name == "sd15-inpaint" { 9 } else { 4 }, "{what}");
    assert_eq!(config.levels.len(), if name == "sdxl" { 3 } else { 4 }, "{what}");
}

/// A family in both layouts and in every type, against PyTorch.
fn check(name: &'static str, kind: &str, size: u32) {
    let family = family(name);
    let at = tempfile::tempdir().expect("a folder");
    let golden = Golden::open(&format!("families/{}", name.trim_end_matches("-v").trim_end_matches("-inpaint")));
    let unet_golden = Golden::open(&format!("families/{}", name.trim_end_matches("-v")));
    let prefix = if name.starts_with("sd21") { "single." } else { "" };
    let mut types = vec![(Dtype::F32, F32, "f32"), (Dtype::F16, F16, "f16"), (Dtype::BF16, BF16, "bf16")];
    if name != "sd15" && name != "sdxl" {
        types.truncate(1);
    }
    for (dtype, limit, called) in types {
        let path = at.path().join(format!("{called}.safetensors"));
        save(&path, &single(family, dtype));
        let model = open(&path).expect("a model");
        let what = format!("{name} {called}");
        check_kind(&model, name, kind, size, &what);
        check_unet(&model, &unet_golden, Precision::F32, limit, &what);
        check_text(&model, &golden, prefix, limit, &what);
        check_vae(&model, &golden, limit, &what);
        if dtype == Dtype::F32 && gpu().caps().f16 {
            check_unet(&model, &unet_golden, Precision::F16, F16, &format!("{what} as f16"));
        }
    }
    folder(family, at.path());
    let model = open(at.path()).expect("a model");
    let what = format!("{name} folder");
    // A folder's config says for which pictures it was trained; these say 64 latent pixels for SD 2.x.
    check_kind(&model, name, kind, model.size(), &what);
    check_unet(&model, &unet_golden, Precision::F32, F32, &what);
    check_text(&model, &golden, "", F32, &what);
    check_vae(&model, &golden, F32, &what);
}

#[test]
fn sd15() {
    check("sd15", "of another size", 512);
}

#[test]
fn sd15_inpainting() {
    check("sd15-inpaint", "of another size, inpainting", 512);
}

#[test]
fn sd21_base() {
    check("sd21", "of another size", 512);
}

#[test]
fn sd21_v() {
    check("sd21-v", "of another size, v-prediction", 768);
}

#[test]
fn sdxl() {
    check("sdxl", "SDXL", 1024);
}

/// Whole pictures of SDXL's kind: each prompt has its own row of pooled text and sizes, and SAG's third pass has uncond's.
#[test]
fn sdxl_from_prompt_to_latents() {
    let at = tempfile::tempdir().expect("a folder");
    let path = at.path().join("sdxl.safetensors");
    save(&path, &single(family("sdxl"), Dtype::F32));
    let options = LoadOptions { precision: Precision::F32, lowmem: false };
    let pipeline = block_on(Pipeline::load(gpu(), open(&path).expect("a model"), options)).expect("loaded");
    let request = scumble::Request {
        prompt: PROMPT.into(),
        seed: 42,
        steps: 3,
        scheduler: "simple".into(),
        width: Some(96),
        height: Some(72),
        original_size: Some([768, 1024]),
        crop: [8, 16],
        ..Default::default()
    };
    let run = |request: &scumble::Request| {
        block_on(pipeline.generate(request, &mut |_| std::ops::ControlFlow::Continue(()))).expect("a picture")
    };
    let made = run(&request);
    let error = relative(&made.latents, &Golden::open("families/sdxl").take("loop").data);
    println!("sdxl loop: {error:.1e}");
    assert!(error < F32, "{error:.1e}");
    let other = run(&scumble::Request { original_size: None, ..request.clone() });
    assert!(relative(&other.latents, &made.latents) > 1e-4, "the sizes count");
    let halves =
        block_on(Pipeline::load(gpu(), open(&path).expect("a model"), LoadOptions { lowmem: true, ..options }));
    let low = block_on(halves.expect("planned").generate(&request, &mut |_| std::ops::ControlFlow::Continue(())));
    assert_eq!(low.expect("a picture").latents, made.latents, "one part at a time");
}

#[test]
fn ids_are_padded_as_each_encoder_was_trained() {
    let at = tempfile::tempdir().expect("a folder");
    for (name, padding) in [("sd15", 49_407), ("sd21", 0), ("sdxl", 49_407)] {
        let path = at.path().join(format!("{name}.safetensors"));
        save(&path, &single(family(name), Dtype::F16));
        let ids =
            probe::tokens(&open(&path).expect("a model"), &Embeddings::none(), PROMPT, Style::Comfy).expect("ids");
        assert_eq!((ids.len(), ids[0].len()), (1, 77));
        assert_eq!(ids[0][..3], [Some(49_406), Some(320), Some(3240)]);
        assert_eq!(ids[0][12..14], [Some(49_407), Some(padding)], "{name}");
    }
}

/// A family whose context is as wide as a real one's, without its text encoders: what a model is called hangs on that number.
fn wide(name: &'static str, width: usize, markers: &[&str], path: &Path) -> Checkpoint {
    let mut tensors = single(family(name), Dtype::F16);
    tensors.retain(|name, _| !name.starts_with("cond_stage_model."));
    for (_, (_, shape, bytes)) in tensors
        .iter_mut()
        .filter(|(name, _)| name.ends_with("attn2.to_k.weight") || name.ends_with("attn2.to_v.weight"))
    {
        shape[1] = width;
        *bytes = vec![0; shape[0] * width * 2];
    }
    tensors.extend(markers.iter().map(|key| ((*key).to_owned(), (Dtype::F32, vec![0], vec![]))));
    save(path, &tensors);
    open(path).expect("a model without text encoders")
}

#[test]
fn families_are_called_by_their_names() {
    let at = tempfile::tempdir().expect("a folder");
    let path = at.path().join("wide.safetensors");
    assert_eq!(wide("sd15", 768, &[], &path).family, "SD 1.x");
    assert_eq!(wide("sd15", 768, &["v_pred"], &path).family, "SD 1.x, v-prediction");
    assert_eq!(wide("sd15-inpaint", 768, &[], &path).family, "SD 1.x, inpainting");
    assert!(wide("sd21", 1024, &[], &path).family.starts_with("SD 2.x"));
    let xl = wide("sdxl", 96, &["v_pred", "ztsnr"], &path);
    assert_eq!(xl.family, "SDXL, v-prediction");
    assert!(xl.noise.rescale_betas_zero_snr && xl.decided.contains("key v_pred"), "{}", xl.decided);
    let (schedule, prediction) = xl.schedule();
    assert!(prediction == Prediction::V && schedule.sigma_max() > 1000.0, "no signal at the last step");
}

/// SD 2.x's two models are told apart by how far one bias has grown.
#[test]
fn velocity_is_found_in_sd2_without_a_marker() {
    let at = tempfile::tempdir().expect("a folder");
    let path = at.path().join("two.safetensors");
    wide("sd21", 1024, &[], &path);
    let bytes_of = std::fs::read(&path).expect("written");
    let file = safetensors::SafeTensors::deserialize(&bytes_of).expect("a file");
    let stored =
        |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    let mut tensors: Tensors = file.tensors().into_iter().map(stored).collect();
    let key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias";
    for (deviation, size, velocity) in [(0.08f32, 512, false), (0.1, 768, true)] {
        let values: Vec<f32> = (0..64).map(|i| 0.5 + if i % 2 == 0 { deviation } else { -deviation }).collect();
        tensors.insert(key.into(), (Dtype::F32, vec![64], bytes(&values, Dtype::F32)));
        save(&path, &tensors);
        let model = open(&path).expect("a model");
        assert_eq!((model.size(), model.schedule().1 == Prediction::V), (size, velocity), "{}", model.decided);
        assert!(model.decided.contains("0.09"), "{}", model.decided);
    }
    tensors.insert(key.into(), (Dtype::F32, vec![64], bytes(&[f32::NAN; 64], Dtype::F32)));
    save(&path, &tensors);
    assert!(message(open(&path)).contains("norm1.bias"));
}

fn message<T>(result: scumble::Result<T>) -> String {
    match result {
        Ok(_) => "no error".into(),
        Err(error) => error.to_string(),
    }
}

/// Parts that a pruned file lacks are asked for by their option, and taken from there.
#[test]
fn pruned_files_take_their_parts_from_elsewhere() {
    let at = tempfile::tempdir().expect("a folder");
    let path = |name: &str| at.path().join(name);
    let whole = single(family("sdxl"), Dtype::F32);
    let (text, rest): (Tensors, Tensors) = whole.into_iter().partition(|(name, _)| name.starts_with("conditioner."));
    let (vae, unet): (Tensors, Tensors) = rest.into_iter().partition(|(name, _)| name.starts_with("first_stage"));
    let bare = |tensors: Tensors, prefix: &str| -> Tensors {
        let strip = |(name, tensor): (String, _)| Some((name.strip_prefix(prefix)?.to_owned(), tensor));
        tensors.into_iter().filter_map(strip).collect()
    };
    save(&path("unet.safetensors"), &unet);
    save(&path("vae.safetensors"), &bare(vae, "first_stage_model."));
    save(&path("l.safetensors"), &bare(text.clone(), "conditioner.embedders.0.transformer."));
    save(&path("g.safetensors"), &bare(text, "conditioner.embedders.1.model."));

    let files = Files::open(&path("unet.safetensors")).expect("a file");
    let alone = Checkpoint::open(&files.clone().into()).expect("a UNet is a model that lacks something");
    assert!(message(alone.vae().map(|_| ())).contains("--vae"));
    assert!(message(alone.texts().map(|_| ())).contains("2 text encoders"));
    let one = Source { clip: vec![path("g.safetensors")], ..files.clone().into() };
    assert!(message(Checkpoint::open(&one).and_then(|model| model.texts().map(|_| ()))).contains("--clip"));
    let load = |model: Checkpoint| message(block_on(Pipeline::load(gpu(), model, LoadOptions::default())));
    assert!(load(alone).contains("--clip"));

    let clip = vec![path("g.safetensors"), path("l.safetensors")];
    let source = Source { vae: Some(path("vae.safetensors")), clip, ..files.into() };
    let model = Checkpoint::open(&source).expect("whole again");
    let golden = Golden::open("families/sdxl");
    check_text(&model, &golden, "", F32, "parts");
    check_vae(&model, &golden, F32, "parts");
    folder(family("sdxl"), &path("folder"));
    let source = Source { vae: Some(path("folder")), ..source };
    check_vae(&Checkpoint::open(&source).expect("a folder's VAE"), &golden, F32, "a folder's part");
    let wrong = Source { vae: Some(path("l.safetensors")), ..source };
    assert!(message(Checkpoint::open(&wrong)).contains("no VAE"));
}

#[test]
fn mixed_types_are_read() {
    let at = tempfile::tempdir().expect("a folder");
    let path = at.path().join("mixed.safetensors");
    let (a, b) = (single(family("sd15"), Dtype::F16), single(family("sd15"), Dtype::F32));
    let mixed: Tensors = a.into_iter().zip(b).enumerate().map(|(i, (a, b))| if i % 2 == 0 { a } else { b }).collect();
    save(&path, &mixed);
    let golden = Golden::open("families/sd15");
    check_unet(&open(&path).expect("a model"), &golden, Precision::F32, F16, "mixed");
}

/// One small tensor of this name.
fn foreign(at: &Path, names: &[(&str, &[usize])]) -> String {
    let path = at.join("foreign.safetensors");
    let tensors = names
        .iter()
        .map(|(name, shape)| {
            ((*name).to_owned(), (Dtype::F32, shape.to_vec(), vec![0; shape.iter().product::<usize>() * 4]))
        })
        .collect();
    save(&path, &tensors);
    message(open(&path))
}

#[test]
fn what_is_no_stable_diffusion_model_is_told_by_the_key_that_decided() {
    let at = tempfile::tempdir().expect("a folder");
    for (key, words) in [
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "Stable Diffusion 3"),
        ("control_model.zero_convs.0.0.weight", "ControlNet"),
        ("lora_unet_mid_block.lora_down.weight", "--lora"),
        ("unet.mid_block.to_q.lora_A.weight", "--lora"),
        ("emb_params", "--embeddings"),
        ("down_blocks.0.resnets.0.norm1.weight", "diffusers folder"),
        ("model_ema.diffusion_modelinput_blocks00weight", "EMA"),
        ("text_model.embeddings.token_embedding.weight", "--clip"),
        ("decoder.conv_in.weight", "--vae"),
        ("something.else", "something.else"),
    ] {
        let error = foreign(at.path(), &[(key, &[2, 2])]);
        assert!(
            error.contains(words) && error.contains(key) && error.contains("foreign.safetensors"),
            "{key}: {error}"
        );
    }
    let first = "model.diffusion_model.input_blocks.0.0.weight";
    for (shape, words) in [([384, 4, 3, 3], "refiner"), ([320, 8, 3, 3], "8 in input_blocks"), ([320, 5, 3, 3], "5 in")]
    {
        let error = foreign(at.path(), &[(first, &shape)]);
        assert!(error.contains(words), "{error}");
    }
    let pickle = at.path().join("model.safetensors");
    std::fs::write(&pickle, b"PK\x03\x04 a zip of pickles").expect("written");
    assert!(message(open(&pickle)).contains("pickle"));
    let named = at.path().join("model.ckpt");
    std::fs::write(&named, b"anything").expect("written");
    assert!(message(open(&named)).contains("pickle"));
    assert!(message(open(&at.path().join("no.safetensors"))).contains("no such file"));
}

/// An index of shards names files of its own folder, all of them there.
#[test]
fn hostile_indexes_are_errors() {
    let at = tempfile::tempdir().expect("a folder");
    folder(family("sd15-inpaint"), at.path());
    let unet = at.path().join("unet");
    let index = unet.join("diffusion_pytorch_model.fp16.safetensors.index.json");
    for (shard, words) in [
        ("../../etc/passwd", "same folder"),
        ("/etc/passwd", "same folder"),
        ("..", "same folder"),
        ("b.safetensors", "no such file"),
    ] {
        let text = serde_json::json!({ "weight_map": { "conv_in.weight": shard } }).to_string();
        std::fs::write(&index, text).expect("written");
        let error = message(open(at.path()));
        assert!(error.contains(words), "{shard}: {error}");
    }
    std::fs::write(&index, "{\"weight_map\": 1}").expect("written");
    assert!(message(open(at.path())).contains("index.json"));
    let shard = unet.join("a-00001-of-00002.safetensors");
    std::fs::copy(&shard, unet.join("b.safetensors")).expect("copied");
    let map = serde_json::json!({ "a": "a-00001-of-00002.safetensors", "b": "b.safetensors" });
    std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).expect("written");
    assert!(message(open(at.path())).contains("in two of its files"));
    std::fs::remove_file(&index).expect("removed");
    assert!(message(open(at.path())).contains("no such file"));
    std::fs::write(unet.join("diffusion_pytorch_model.bin"), "a pickle").expect("written");
    assert!(message(open(at.path())).contains("pickle"));
}

/// The error of loading and running a model with one tensor changed.
fn broken(gpu: &Gpu, whole: &Tensors, at: &Path, name: &str, change: &dyn Fn(&mut Stored)) -> String {
    let path = at.join("broken.safetensors");
    let mut tensors = whole.clone();
    change(tensors.get_mut(name).expect(name));
    save(&path, &tensors);
    let load = |model: Checkpoint| {
        let pipeline = block_on(Pipeline::load(gpu, model, LoadOptions::default()))?;
        let request = scumble::Request { steps: 1, width: Some(40), height: Some(40), ..Default::default() };
        block_on(pipeline.generate(&request, &mut |_| std::ops::ControlFlow::Continue(()))).map(|_| ())
    };
    message(open(&path).and_then(load))
}

/// Loading names the tensor that is not finite, wherever it lies, and what no kernel reads.
#[test]
fn bad_weights_are_told_by_tensor() {
    let at = tempfile::tempdir().expect("a folder");
    let whole = single(family("sd15"), Dtype::F32);
    let gpu = open_gpu();
    let broken = |name: &str, change: &dyn Fn(&mut Stored)| broken(&gpu, &whole, at.path(), name, change);
    let poison = |value: f32| move |tensor: &mut Stored| tensor.2[4..8].copy_from_slice(&value.to_le_bytes());
    let unet = "model.diffusion_model.";
    for (name, told) in [
        (format!("{unet}middle_block.0.in_layers.2.weight"), "mid_block.resnets.0.conv1.weight"),
        (format!("{unet}middle_block.0.in_layers.0.weight"), "mid_block.resnets.0.norm1.weight"),
        ("first_stage_model.decoder.conv_in.bias".into(), "decoder.conv_in.bias"),
    ] {
        let error = broken(&name, &poison(f32::NAN));
        assert!(error.contains(told) && error.contains("broken.safetensors") && error.contains("finite"), "{error}");
    }
    // The row of the token that every prompt begins with.
    let table = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight";
    let error = broken(table, &|tensor| {
        let at = 49_406 * tensor.1[1] * 4;
        tensor.2[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    assert!(error.contains("token_embedding") && error.contains("finite"), "{error}");
    let error = broken(&format!("{unet}out.2.weight"), &|tensor| tensor.0 = Dtype::I32);
    assert!(error.contains("conv_out.weight") && error.contains("I32"), "{error}");
    let error = broken(&format!("{unet}out.2.bias"), &|tensor| {
        tensor.1 = vec![2];
        tensor.2.truncate(8);
    });
    assert!(error.contains("conv_out.bias") && error.contains("[4]") && error.contains("[2]"), "{error}");
    assert_eq!(gpu.memory_in_use().0, 0, "what was loaded before the error is gone");
}

/// Matrices of integers are refused by the loader; vectors and rows of tables come by another way.
#[test]
fn integers_are_no_weights_in_vectors_and_tables() {
    let at = tempfile::tempdir().expect("a folder");
    let whole = single(family("sd15"), Dtype::F32);
    let text = "cond_stage_model.transformer.text_model.embeddings";
    let names = [
        ("model.diffusion_model.out.0.weight".to_owned(), "conv_norm_out.weight"),
        ("model.diffusion_model.out.2.bias".to_owned(), "conv_out.bias"),
        (format!("{text}.token_embedding.weight"), "token_embedding.weight"),
    ];
    let wrong = names.iter().filter_map(|(name, told)| {
        let error = broken(gpu(), &whole, at.path(), name, &|tensor| tensor.0 = Dtype::I32);
        (!(error.contains(told) && error.contains("I32"))).then(|| format!("{name}: {error}"))
    });
    assert_eq!(wrong.collect::<Vec<_>>(), Vec::<String>::new());
}

/// Where a text encoder and a UNet of other models meet.
#[test]
fn parts_that_do_not_belong_together_are_told() {
    let at = tempfile::tempdir().expect("a folder");
    let mut tensors = single(family("sd15"), Dtype::F32);
    tensors.retain(|name, _| !name.starts_with("cond_stage_model."));
    let others = single(family("sd21"), Dtype::F32);
    tensors.extend(others.into_iter().filter(|(name, _)| name.starts_with("cond_stage_model.")));
    let path = at.path().join("chimera.safetensors");
    save(&path, &tensors);
    let error = open(&path).err().expect("they do not fit");
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("48"), "{error}");
}
