//! Rung 4: the networks against PyTorch. Goldens by tools/reference/networks.py; limits are relative errors in f32.

#[path = "common/networks.rs"]
mod networks;

use std::path::Path;
use std::sync::Arc;

use networks::{Golden, model_folder, relative};
use pollster::block_on;
use scumble::Precision;
use scumble::files::Files;
use scumble::gpu::{DType, Gpu, GpuOptions};
use scumble::loader::Loader;
use scumble::lora::{Lora, Part, Patches, resolve};
use scumble::model::clip::Clip;
use scumble::model::config::{ClipConfig, UNetConfig, VaeConfig};
use scumble::model::names::{Modules, transformers_clip};
use scumble::model::unet::UNet;
use scumble::model::vae::{Decoder, Encoder};
use scumble::probe::{self, Reading, UNetInput};
use scumble::text::Embeddings;
use scumble::{Checkpoint, weights::Weights};

/// f32 sums in another order than PyTorch's.
const F32: f64 = 2e-5;
/// f16 weights' inputs and activations.
const F16: f64 = 1e-2;

fn gpu() -> Gpu {
    forcing(&[])
}

fn forcing(variants: &[(&str, &str)]) -> Gpu {
    let variants = variants.iter().map(|(op, variant)| ((*op).to_owned(), (*variant).to_owned())).collect();
    let options = GpuOptions { device: std::env::var("SCUMBLE_DEVICE").ok(), variants, ..Default::default() };
    block_on(Gpu::open(&options)).expect("a GPU or a software device")
}

fn file(folder: &Path, part: &str) -> (Weights, std::path::PathBuf, String) {
    let files = Files::open(folder).expect("a folder");
    let name = format!("{part}/weights.safetensors");
    let weights = Weights::new(files.path(&name), files.read(&name).expect("weights")).expect("weights");
    let path = files.path(&format!("{part}/config.json"));
    let text = files.text(&format!("{part}/config.json")).expect("a config");
    (weights, path, text)
}

fn load_unet(gpu: &Gpu, folder: &Path, dtype: DType) -> scumble::Result<UNet> {
    let (weights, path, text) = file(folder, "unet");
    block_on(UNet::load(&mut Loader::new(gpu, &weights, dtype), UNetConfig::parse(&path, &text)?))
}

/// A small UNet against its golden, in f32 and where the device has it in f16.
fn unet(case: &str) {
    let folder = model_folder("unet", case);
    let golden = Golden::open(&format!("networks/{case}"));
    let gpu = gpu();
    let input = UNetInput {
        sample: golden.take("sample"),
        timestep: golden.take("timestep"),
        encoder_hidden_states: golden.take("encoder_hidden_states"),
        added: None,
    };
    let types: &[(DType, f64)] =
        if gpu.caps().f16 { &[(DType::F32, F32), (DType::F16, F16)] } else { &[(DType::F32, F32)] };
    for &(dtype, limit) in types {
        let unet = load_unet(&gpu, folder.path(), dtype).expect("loaded");
        let (sample, mass) = block_on(probe::run_unet(&gpu, &unet, dtype, &input, true)).expect("run");
        let error = relative(&sample.data, &golden.take("out").data);
        let mass_error = relative(&mass.expect("asked for").data, &golden.take("mass").data);
        println!("{case} {dtype:?}: sample {error:.1e}, mass {mass_error:.1e}");
        assert!(error < limit && mass_error < limit, "{case} {dtype:?}: sample {error:.1e}, mass {mass_error:.1e}");
    }
}

#[test]
fn unet_with_linear_projections_and_odd_sizes() {
    unet("unet_linear");
}

#[test]
fn unet_with_convolutional_projections_and_a_short_context() {
    unet("unet_conv");
}

#[test]
fn unet_of_four_levels_on_a_5x5_latent() {
    unet("unet_deep");
}

#[test]
fn unet_with_nine_channels() {
    unet("unet_inpaint");
}

fn vae(case: &str) {
    let parse = |folder: &Path| {
        let (weights, path, text) = file(folder, "vae");
        (weights, VaeConfig::parse(&path, &text).expect("a config"))
    };
    let load = |gpu: &Gpu, folder: &Path| {
        let (weights, config) = parse(folder);
        let decoder = block_on(Decoder::load(&mut Loader::new(gpu, &weights, DType::F32), &config))?;
        let encoder = block_on(Encoder::load(&mut Loader::new(gpu, &weights, DType::F32), &config))?;
        Ok::<_, scumble::Error>((decoder, encoder, config))
    };
    let folder = model_folder("vae", case);
    let golden = Golden::open(&format!("networks/{case}"));
    let gpu = gpu();
    let (decoder, encoder, config) = load(&gpu, folder.path()).expect("loaded");
    let decoded = block_on(probe::run_decoder(&gpu, &decoder, &config, &golden.take("latent"))).expect("decoded");
    let (mean, logvar) = block_on(probe::run_encoder(&gpu, &encoder, &config, &golden.take("image"))).expect("encoded");
    for (name, found) in [("decoded", &decoded), ("mean", &mean), ("logvar", &logvar)] {
        let expected = golden.take(name);
        assert_eq!(found.shape, expected.shape, "{case} {name}");
        let error = relative(&found.data, &expected.data);
        assert!(error < F32, "{case} {name}: {error:.1e}");
    }
}

#[test]
fn vae_of_two_levels() {
    vae("vae_two");
}

#[test]
fn vae_of_four_levels_without_quant_convolutions() {
    vae("vae_four");
}

fn clip(case: &str) {
    let load = |gpu: &Gpu, folder: &Path| {
        let (weights, path, text) = file(folder, "text_encoder");
        let weights = Arc::new(transformers_clip(&weights));
        let mut l = Loader::new(gpu, &weights, DType::F32);
        block_on(Clip::load(&mut l, &weights, ClipConfig::parse(&path, &text)?))
    };
    let folder = model_folder("text_encoder", case);
    let golden = Golden::open(&format!("networks/{case}"));
    let gpu = gpu();
    let clip = load(&gpu, folder.path()).expect("loaded");
    let ids: Vec<u32> = golden.take("ids").data.iter().map(|&id| id as u32).collect();
    let (hidden, pooled) = block_on(probe::clip_ids(&gpu, &clip, &ids)).expect("run");
    let errors =
        [("hidden_states", hidden), ("pooled", pooled)].map(|(name, t)| relative(&t.data, &golden.take(name).data));
    assert!(errors.iter().all(|&e| e < F32), "{case}: {errors:?}");
}

#[test]
fn clip_with_quick_gelu() {
    clip("clip_quick");
}

#[test]
fn clip_with_gelu() {
    clip("clip_gelu");
}

fn embedded() -> Checkpoint {
    Checkpoint::open(&Files::Embedded(scumble_model::FILES).into()).expect("the embedded model")
}

#[test]
fn the_embedded_text_encoder() {
    let golden = Golden::open("networks/embedded_clip");
    let prompt = "a fox in a pine forest at night";
    let (hidden, pooled) =
        block_on(probe::clip(&gpu(), &embedded(), &Embeddings::none(), prompt, Reading::default())).expect("run");
    assert!(relative(&hidden.data, &golden.take("hidden_states").data) < F32);
    let width = pooled.data.len();
    assert!(relative(&pooled.data, &golden.take("pooled").data[width..2 * width]) < F32);
}

/// What it gave.
fn embedded_unet(gpu: &Gpu, precision: Precision, limit: f64) -> Vec<f32> {
    let golden = Golden::open("networks/embedded_unet");
    let input = UNetInput {
        sample: golden.take("sample"),
        timestep: golden.take("timestep"),
        encoder_hidden_states: golden.take("encoder_hidden_states"),
        added: None,
    };
    let (sample, mass) = block_on(probe::unet(gpu, &embedded(), precision, &input, true)).expect("run");
    let mass = mass.expect("asked for");
    let errors =
        [(&sample.data, "out"), (&mass.data, "mass")].map(|(data, name)| relative(data, &golden.take(name).data));
    println!("embedded UNet {precision:?}: {errors:?}");
    assert!(errors.iter().all(|error| *error < limit), "{precision:?}: {errors:?}");
    let mean = mass.data.iter().sum::<f32>() / mass.data.len() as f32;
    assert!((mean - 1.0).abs() < 1e-5, "the mean mass is 1, found {mean}");
    sample.data
}

#[test]
fn the_embedded_unet() {
    embedded_unet(&gpu(), Precision::F32, F32);
}

/// The picture that it gave.
fn embedded_vae(gpu: &Gpu) -> Vec<f32> {
    let golden = Golden::open("networks/embedded_vae");
    let decoded =
        block_on(probe::vae_decode(gpu, &embedded(), Precision::F32, &golden.take("latent"))).expect("decoded");
    let (mean, logvar) = block_on(probe::vae_encode(gpu, &embedded(), &golden.take("image"))).expect("encoded");
    for (found, name) in [(&decoded, "decoded"), (&mean, "mean"), (&logvar, "logvar")] {
        let error = relative(&found.data, &golden.take(name).data);
        println!("embedded VAE {name}: {error:.1e}");
        assert!(error < F32, "{name}: {error:.1e}");
    }
    decoded.data
}

#[test]
fn the_embedded_vae() {
    embedded_vae(&gpu());
}

/// With convolutions in Winograd's tiles, after norms by one workgroup and by several, by multiply-adds.
#[test]
fn the_embedded_networks_in_winograd_tiles() {
    let on = |norm, winograd| forcing(&[("winograd", winograd), ("group_norm", norm), ("conv2d", "tile")]);
    let direct = embedded_unet(&on("chunks", "none"), Precision::F32, F32);
    for (norm, tiles) in [("workgroup", "f2x2"), ("chunks", "f2x2"), ("chunks", "f2")] {
        let gpu = on(norm, tiles);
        assert!(embedded_unet(&gpu, Precision::F32, F32) != direct, "{norm}, {tiles}: nothing was convolved in tiles");
        if gpu.caps().f16 {
            embedded_unet(&gpu, Precision::F16, F16);
        }
    }
    for tiles in ["f2x2", "f2"] {
        embedded_vae(&on("chunks", tiles));
    }
}

/// A LoRA on a network with drawn weights: (its files and strengths) → the part's patches.
fn patches(part: Part, weights: &Weights, config: Option<&UNetConfig>, files: &[(&str, f32)]) -> Patches {
    let open = |(name, strength): &(&str, f32)| {
        Lora::open(&networks::data(&format!("lora/{name}.lora.safetensors")), *strength).expect("a LoRA")
    };
    let loras: Vec<Lora> = files.iter().map(open).collect();
    // A text encoder's LoRAs name none of the UNet's modules.
    let modules = config.map_or_else(|| Modules::vae(0), Modules::unet);
    let (mut found, warnings) = resolve(&loras, &[(part, weights)], &modules).expect("they fit");
    assert!(warnings.is_empty(), "{warnings:?}");
    found.pop().expect("patches").1
}

/// A UNet with LoRAs against diffusers' merge (or the formula's, where diffusers cannot): tools/reference/lora.py.
fn unet_with_lora(case: &str, network: &str, inputs: &str, files: &[(&str, f32)]) {
    let folder = model_folder("unet", network);
    let (golden, given) = (Golden::open(&format!("lora/{case}")), Golden::open(inputs));
    let (weights, path, text) = file(folder.path(), "unet");
    let config = UNetConfig::parse(&path, &text).expect("a config");
    let patches = patches(Part::UNet, &weights, Some(&config), files);
    let gpu = gpu();
    let mut loader = Loader::new(&gpu, &weights, DType::F32).with(&patches);
    let unet = block_on(UNet::load(&mut loader, config)).expect("loaded");
    let added = unet.config.added.map(|_| (given.take("text_embeds"), given.take("time_ids")));
    let input = UNetInput {
        sample: given.take("sample"),
        timestep: given.take("timestep"),
        encoder_hidden_states: given.take("encoder_hidden_states"),
        added,
    };
    let (sample, _) = block_on(probe::run_unet(&gpu, &unet, DType::F32, &input, false)).expect("run");
    let error = relative(&sample.data, &golden.take("out").data);
    println!("{case}: {error:.1e}");
    assert!(error < F32, "{case}: {error:.1e}");
}

#[test]
fn lora_of_kohya_with_convolutions() {
    unet_with_lora("kohya", "unet_conv", "networks/unet_conv", &[("kohya", 0.8)]);
}

#[test]
fn locon_with_a_tucker_core() {
    unet_with_lora("tucker", "unet_conv", "networks/unet_conv", &[("tucker", -1.5)]);
}

#[test]
fn lora_of_peft() {
    unet_with_lora("peft", "unet_linear", "networks/unet_linear", &[("peft", 1.0)]);
}

#[test]
fn lora_of_diffusers_attention_processors() {
    unet_with_lora("processors", "unet_linear", "networks/unet_linear", &[("processors", 1.0)]);
}

#[test]
fn two_loras_at_once() {
    unet_with_lora("two", "unet_linear", "networks/unet_linear", &[("peft", 0.75), ("processors", -1.25)]);
}

/// Also the network of SDXL's kind against diffusers: its added embedding is patched too.
#[test]
fn lora_in_the_original_names_of_sdxl() {
    unet_with_lora("original", "../lora/unet_xl", "lora/original", &[("original", 0.9)]);
}

fn text_with_lora(case: &str, strength: f32) {
    let folder = model_folder("text_encoder", "clip_quick");
    let golden = Golden::open(&format!("lora/{case}"));
    let (weights, path, text) = file(folder.path(), "text_encoder");
    let weights = Arc::new(transformers_clip(&weights));
    let patches = patches(Part::Text(0), &weights, None, &[(case, strength)]);
    let gpu = gpu();
    let mut loader = Loader::new(&gpu, &weights, DType::F32).with(&patches);
    let config = ClipConfig::parse(&path, &text).expect("a config");
    let clip = block_on(Clip::load(&mut loader, &weights, config)).expect("loaded");
    let ids: Vec<u32> = golden.take("ids").data.iter().map(|&id| id as u32).collect();
    let (hidden, _) = block_on(probe::clip_ids(&gpu, &clip, &ids)).expect("run");
    let error = relative(&hidden.data, &golden.take("hidden_states").data);
    assert!(error < F32, "{case}: {error:.1e}");
}

#[test]
fn lora_of_a_text_encoder() {
    text_with_lora("text_kohya", 0.7);
    text_with_lora("text_layers", 0.7);
}
