//! Each way to name a module, the products against loops in f64, and every refusal.

use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::model::config::UNetConfig;

const CONFIG: &str = r#"{"in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12, "attention_head_dim": 2}"#;
const BLOCK: &str = "down_blocks.0.attentions.0.transformer_blocks.0";
/// The model's matrices, and what is none.
const UNET: &[(&str, &[usize])] = &[
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", &[8, 8]),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight", &[8, 8]),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", &[8, 12]),
    ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", &[16, 8]),
    ("down_blocks.0.attentions.0.transformer_blocks.0.norm1.weight", &[8]),
    ("down_blocks.0.attentions.0.proj_in.weight", &[8, 8, 1, 1]),
    ("down_blocks.0.resnets.0.conv1.weight", &[8, 4, 3, 3]),
    ("down_blocks.0.resnets.0.time_emb_proj.weight", &[8, 6]),
    ("down_blocks.0.downsamplers.0.conv.weight", &[8, 8, 3, 3]),
    ("mid_block.attentions.0.proj_out.weight", &[8, 8]),
    ("up_blocks.1.resnets.1.conv_shortcut.weight", &[8, 4, 1, 1]),
    ("add_embedding.linear_1.weight", &[8, 10]),
    ("conv_in.weight", &[8, 4, 3, 3]),
];
const TEXT: &[(&str, &[usize])] = &[
    ("encoder.layers.0.self_attn.q_proj.weight", &[6, 6]),
    ("encoder.layers.0.self_attn.out_proj.weight", &[6, 6]),
    ("encoder.layers.0.mlp.fc1.weight", &[10, 6]),
    ("embeddings.token_embedding.weight", &[20, 6]),
    ("text_projection.weight", &[6, 6]),
];

/// Tensors of these names and shapes, of numbers that differ everywhere.
type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

fn bytes(tensors: &Tensors, metadata: Option<(&str, &str)>) -> Bytes {
    let data: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&data).map(|((name, shape, _), data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).expect("a view"))
    });
    let metadata = metadata.map(|(key, value)| HashMap::from([(key.to_owned(), value.to_owned())]));
    Bytes::Owned(safetensors::serialize(views, metadata).expect("serialised"))
}

fn tensor(name: impl Into<String>, shape: &[usize]) -> (String, Vec<usize>, Vec<f32>) {
    let name = name.into();
    let start = name.len() + shape.iter().sum::<usize>();
    let values = (0..volume(shape)).map(|i| ((start + i * 7) % 23) as f32 / 8.0 - 1.25).collect();
    (name, shape.to_vec(), values)
}

fn weights(shapes: &[(&str, &[usize])]) -> Weights {
    let tensors = shapes.iter().map(|(name, shape)| tensor(*name, shape)).collect();
    Weights::new("model.safetensors".into(), bytes(&tensors, None)).expect("a model")
}

fn lora(tensors: &Tensors, strength: f32) -> Lora {
    Lora::new("it.safetensors".into(), bytes(tensors, None), None, strength).expect("a LoRA")
}

/// Match to the UNet above and that many text encoders.
fn resolved(loras: &[Lora], texts: usize) -> Result<Resolved> {
    let (unet, text) = (weights(UNET), weights(TEXT));
    let mut parts = vec![(Part::UNet, &unet)];
    parts.extend((0..texts).map(|i| (Part::Text(i), &text)));
    resolve(loras, &parts, &Modules::unet(&UNetConfig::parse(Path::new("config.json"), CONFIG)?))
}

/// The delta that these LoRAs make of a weight of the model, [n, k] in f64.
fn delta(loras: &[Lora], part: Part, weight: &str, [n, k]: [usize; 2]) -> Vec<f64> {
    let (patches, warnings) = resolved(loras, 2).expect("resolved");
    assert!(warnings.is_empty(), "{warnings:?}");
    let (_, patches) = patches.iter().find(|(p, _)| *p == part).expect("the part");
    let Product { rank, up, down } = patches.product(weight, n, k).expect("a product").expect("patched");
    matmul(&up, &down, [n, rank, k])
}

/// a [m, r] · b [r, k]
fn matmul(a: &[f32], b: &[f32], [m, r, k]: [usize; 3]) -> Vec<f64> {
    let dot = |i: usize, j: usize| (0..r).map(|x| f64::from(a[i * r + x]) * f64::from(b[x * k + j])).sum();
    (0..m * k).map(|at| dot(at / k, at % k)).collect()
}

fn assert_close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{i}: {a}, expected {b}");
    }
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string(),
    }
}

/// A file of one module with these ends of keys.
fn pair(module: &str, [up, down]: [&str; 2], [n, r, k]: [usize; 3]) -> Tensors {
    vec![tensor(format!("{module}{up}"), &[n, r]), tensor(format!("{module}{down}"), &[r, k])]
}

const KOHYA: [&str; 2] = [".lora_up.weight", ".lora_down.weight"];
const PEFT: [&str; 2] = [".lora_B.weight", ".lora_A.weight"];
const OLD: [&str; 2] = ["_lora.up.weight", "_lora.down.weight"];
const LAYER: [&str; 2] = [".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"];

#[test]
fn each_form_of_key_finds_its_weight() {
    let (q, out) = (format!("{BLOCK}.attn1.to_q.weight"), format!("{BLOCK}.attn1.to_out.0.weight"));
    let flat = BLOCK.replace('.', "_");
    let default = [".lora_B.default.weight", ".lora_A.default.weight"];
    for (module, ends, weight) in [
        (format!("lora_unet_{flat}_attn1_to_q"), KOHYA, &q),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q".into(), KOHYA, &q),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0".into(), KOHYA, &out),
        (format!("lycoris_{flat}_attn1_to_q"), KOHYA, &q),
        (format!("unet.{BLOCK}.attn1.processor.to_q"), OLD, &q),
        (format!("unet.{BLOCK}.attn1.processor.to_out"), OLD, &out),
        (format!("{BLOCK}.attn1.processor.to_q"), OLD, &q),
        (format!("unet.{BLOCK}.attn1.to_q"), [".lora.up.weight", ".lora.down.weight"], &q),
        (format!("unet.{BLOCK}.attn1.to_q"), PEFT, &q),
        (format!("unet.{BLOCK}.attn1.to_out.0"), PEFT, &out),
        (format!("unet.{BLOCK}.attn1.to_q"), default, &q),
        (format!("base_model.model.{BLOCK}.attn1.to_q"), PEFT, &q),
        (format!("unet.base_model.model.{BLOCK}.attn1.to_q"), PEFT, &q),
        (format!("{BLOCK}.attn1.to_q"), PEFT, &q),
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q".into(), PEFT, &q),
    ] {
        let file = pair(&module, ends, [8, 2, 8]);
        let expected = matmul(&file[0].2, &file[1].2, [8, 2, 8]);
        assert_close(&delta(&[lora(&file, 1.0)], Part::UNet, weight, [8, 8]), &expected);
    }
}

#[test]
fn original_names_reach_what_lies_outside_the_transformers() {
    for (module, weight, [n, k]) in [
        ("lora_unet_label_emb_0_0", "add_embedding.linear_1.weight", [8, 10]),
        ("lora_unet_middle_block_1_proj_out", "mid_block.attentions.0.proj_out.weight", [8, 8]),
        ("lora_unet_input_blocks_1_0_emb_layers_1", "down_blocks.0.resnets.0.time_emb_proj.weight", [8, 6]),
        ("lora_unet_down_blocks_0_resnets_0_time_emb_proj", "down_blocks.0.resnets.0.time_emb_proj.weight", [8, 6]),
    ] {
        let file = pair(module, KOHYA, [n, 3, k]);
        assert_close(
            &delta(&[lora(&file, 1.0)], Part::UNet, weight, [n, k]),
            &matmul(&file[0].2, &file[1].2, [n, 3, k]),
        );
    }
}

#[test]
fn text_encoders_are_told_apart() {
    let (q, fc1) = ("encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.mlp.fc1.weight");
    let out = "encoder.layers.0.self_attn.out_proj.weight";
    for (module, ends, part, weight, n) in [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", KOHYA, 0, q, 6),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA, 0, fc1, 10),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", KOHYA, 1, q, 6),
        ("lora_te2_text_projection", KOHYA, 1, "text_projection.weight", 6),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", LAYER, 0, q, 6),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_q", OLD, 0, q, 6),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out", OLD, 0, out, 6),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", PEFT, 0, fc1, 10),
        ("text_encoder.encoder.layers.0.mlp.fc1", PEFT, 0, fc1, 10),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", LAYER, 1, fc1, 10),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj", PEFT, 1, out, 6),
    ] {
        let file = pair(module, ends, [n, 2, 6]);
        let expected = matmul(&file[0].2, &file[1].2, [n, 2, 6]);
        assert_close(&delta(&[lora(&file, 1.0)], Part::Text(part), weight, [n, 6]), &expected);
    }
    // Nobody says which: the only one, or none.
    let file = pair("base_model.model.text_model.encoder.layers.0.mlp.fc1", PEFT, [10, 2, 6]);
    let (patches, _) = resolved(&[lora(&file, 1.0)], 1).expect("resolved");
    assert!(patches[0].1.is_empty() && !patches[1].1.is_empty());
    assert!(message(resolved(&[lora(&file, 1.0)], 2)).contains("fit nothing"));
}

#[test]
fn alpha_and_strength_scale_and_files_add_up() {
    let (module, weight) = ("lora_unet_mid_block_attentions_0_proj_out", "mid_block.attentions.0.proj_out.weight");
    let mut first = pair(module, KOHYA, [8, 2, 8]);
    first.push((format!("{module}.alpha"), vec![], vec![1.0]));
    let second = pair("unet.mid_block.attentions.0.proj_out", PEFT, [8, 3, 8]);
    let products = [matmul(&first[0].2, &first[1].2, [8, 2, 8]), matmul(&second[0].2, &second[1].2, [8, 3, 8])];
    let sum =
        |a: f64, b: f64| -> Vec<f64> { products[0].iter().zip(&products[1]).map(|(x, y)| a * x + b * y).collect() };
    let both = [lora(&first, 0.5), lora(&second, -2.0)];
    assert_close(&delta(&both, Part::UNet, weight, [8, 8]), &sum(0.25, -2.0));
    let twice = [lora(&first, 1.0), lora(&first, 1.0)];
    assert_close(&delta(&twice, Part::UNet, weight, [8, 8]), &sum(1.0, 0.0));
    let (patches, _) = resolved(&[lora(&first, 0.0)], 0).expect("resolved");
    assert!(patches[0].1.is_empty());
    assert!(Patches::none().product(weight, 8, 8).expect("nothing").is_none());
}

#[test]
fn metadata_scales_where_no_tensor_does() {
    let weight = "mid_block.attentions.0.proj_out.weight";
    let file = pair("unet.mid_block.attentions.0.proj_out", PEFT, [8, 4, 8]);
    let expected = |scale: f64| matmul(&file[0].2, &file[1].2, [8, 4, 8]).iter().map(|v| v * scale).collect::<Vec<_>>();
    for (json, scale) in [
        (r#"{"unet.lora_alpha": 8, "unet.r": 4}"#, 2.0),
        (r#"{"unet.lora_alpha": 8, "unet.use_rslora": true}"#, 4.0),
        (r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attentions.0.proj_out": 1}}"#, 0.25),
        (r#"{"unet.lora_alpha": 8, "unet.alpha_pattern": {"^proj_out": 1, "to_q": 2}}"#, 2.0),
        (r#"{"text_encoder.lora_alpha": 8}"#, 1.0),
        ("not JSON", 1.0),
    ] {
        let bytes = bytes(&file, Some(("lora_adapter_metadata", json)));
        let lora = Lora::new("it.safetensors".into(), bytes, None, 1.0).expect("a LoRA");
        assert_close(&delta(&[lora], Part::UNet, weight, [8, 8]), &expected(scale));
    }
    // The config beside a file is for PEFT's own alone.
    let adapter = Some(r#"{"lora_alpha": 2}"#);
    let other = Lora::new("it.safetensors".into(), bytes(&file, None), adapter, 1.0).expect("a LoRA");
    assert_close(&delta(&[other], Part::UNet, weight, [8, 8]), &expected(1.0));
    let mut own = file.clone();
    own.iter_mut().for_each(|(name, ..)| *name = name.replace("unet.", "base_model.model."));
    let own = Lora::new("it.safetensors".into(), bytes(&own, None), adapter, 1.0).expect("a LoRA");
    assert_close(&delta(&[own], Part::UNet, weight, [8, 8]), &expected(0.5));
}

#[test]
fn convolutions_plain_and_with_a_core() {
    let (module, weight) = ("lora_unet_down_blocks_0_resnets_0_conv1", "down_blocks.0.resnets.0.conv1.weight");
    let up = tensor(format!("{module}.lora_up.weight"), &[8, 2, 1, 1]);
    let down = tensor(format!("{module}.lora_down.weight"), &[2, 4, 3, 3]);
    let plain = vec![up.clone(), down.clone()];
    assert_close(&delta(&[lora(&plain, 1.0)], Part::UNet, weight, [8, 36]), &matmul(&up.2, &down.2, [8, 2, 36]));

    let down = tensor(format!("{module}.lora_down.weight"), &[2, 4, 1, 1]);
    let mid = tensor(format!("{module}.lora_mid.weight"), &[2, 2, 3, 3]);
    let mut expected = vec![0.0; 8 * 36];
    for (at, sum) in expected.iter_mut().enumerate() {
        let (n, c, t) = (at / 36, at % 36 / 9, at % 9);
        for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            *sum += f64::from(up.2[n * 2 + i]) * f64::from(mid.2[(i * 2 + j) * 9 + t]) * f64::from(down.2[j * 4 + c]);
        }
    }
    let tucker = vec![up, down, mid];
    assert_close(&delta(&[lora(&tucker, 1.0)], Part::UNet, weight, [8, 36]), &expected);

    // A linear pair on a 1x1 convolution and the other way round.
    let (module, weight) =
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "down_blocks.0.attentions.0.proj_in.weight");
    let file = pair(module, KOHYA, [8, 2, 8]);
    assert_close(&delta(&[lora(&file, 1.0)], Part::UNet, weight, [8, 8]), &matmul(&file[0].2, &file[1].2, [8, 2, 8]));
    let op = tensor("lora_unet_input_blocks_2_0_op.lora_down.weight", &[2, 8, 3, 3]);
    let up = tensor("lora_unet_input_blocks_2_0_op.lora_up.weight", &[8, 2, 1, 1]);
    let expected = matmul(&up.2, &op.2, [8, 2, 72]);
    let weight = "down_blocks.0.downsamplers.0.conv.weight";
    assert_close(&delta(&[lora(&vec![up, op], 1.0)], Part::UNet, weight, [8, 72]), &expected);
}

#[test]
fn other_kinds_are_refused_by_name() {
    let good = pair(&format!("lora_unet_{}_attn1_to_q", BLOCK.replace('.', "_")), KOHYA, [8, 2, 8]);
    for (end, kind) in [
        ("dora_scale", "a DoRA"),
        ("lora_magnitude_vector.default.weight", "a DoRA"),
        ("hada_w1_a", "a LoHa"),
        ("lokr_w1", "a LoKr"),
        ("a1.weight", "a GLoRA"),
        ("oft_blocks", "an OFT"),
        ("diff", "a whole difference"),
        ("diff_b", "a whole difference"),
        ("on_input", "an (IA)³"),
        ("lora_B.bias", "a LoRA with biases"),
    ] {
        let mut file = good.clone();
        file.push(tensor(format!("lora_unet_x.{end}"), &[1]));
        let e = message(resolved(&[lora(&file, 1.0)], 0));
        let all = ["it.safetensors", kind, &format!("lora_unet_x.{end}"), "export it as a plain LoRA or LoCon"];
        assert!(all.iter().all(|part| e.contains(part)), "{e}");
    }
}

#[test]
fn what_fits_nothing_is_told() {
    let flat = BLOCK.replace('.', "_");
    let mut file = pair(&format!("lora_unet_{flat}_attn1_to_q"), KOHYA, [8, 2, 8]);
    for i in 0..9 {
        file.extend(pair(&format!("lora_unet_nowhere_{i}"), KOHYA, [8, 2, 8]));
    }
    file.push(tensor("lora_te_text_model_embeddings_token_embedding.alpha", &[1]));
    let (_, warnings) = resolved(&[lora(&file, 1.0)], 1).expect("resolved");
    assert_eq!(warnings.len(), 1);
    let (warning, last) = (&warnings[0], "lora_unet_nowhere_7");
    assert!(warning.contains("10 of its 11 entries") && warning.ends_with(", …"), "{warning}");
    assert!(warning.contains("token_embedding") && !warning.contains(last), "{warning}");

    // The same weight under two names: one of them acts.
    let mut file = pair(&format!("lora_unet_{flat}_attn1_to_q"), KOHYA, [8, 2, 8]);
    file.extend(pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", KOHYA, [8, 2, 8]));
    let (patches, warnings) = resolved(&[lora(&file, 1.0)], 0).expect("resolved");
    let product = patches[0].1.product(&format!("{BLOCK}.attn1.to_q.weight"), 8, 8).expect("a product");
    assert_eq!(product.map(|product| product.rank), Some(2));
    assert!(warnings[0].contains("twice"), "{warnings:?}");
}

#[test]
fn files_for_other_models_are_refused() {
    // SD 1.x on this model, whose context is 12 wide.
    let file = pair(&format!("lora_unet_{}_attn2_to_k", BLOCK.replace('.', "_")), KOHYA, [8, 2, 768]);
    let e = message(resolved(&[lora(&file, 1.0)], 2));
    assert!(e.contains("a context of 12") && e.contains("SD 1.x (a context of 768)") && e.contains("to_k"), "{e}");
    // Flux has our first text encoder too.
    let mut file = pair("lora_unet_double_blocks_0_img_attn_proj", KOHYA, [8, 2, 8]);
    let flux = message(resolved(&[lora(&file, 1.0)], 2));
    assert!(flux.contains("such as lora_unet_double_blocks_0_img_attn_proj"), "{flux}");
    file.extend(pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA, [10, 2, 6]));
    let flux = message(resolved(&[lora(&file, 1.0)], 2));
    assert!(flux.contains("expected a LoRA for another Stable Diffusion (a context of 12)"), "{flux}");
    // A checkpoint.
    let e = message(resolved(&[lora(&vec![tensor("model.diffusion_model.out.0.weight", &[3])], 1.0)], 0));
    assert!(e.contains("this is no LoRA") && e.contains("model.diffusion_model.out.0.weight"), "{e}");
    let e = message(resolved(&[lora(&vec![], 1.0)], 0));
    assert!(e.contains("no tensors"), "{e}");
}

#[test]
fn factors_that_do_not_fit_are_refused() {
    let module = "unet.mid_block.attentions.0.proj_out";
    let (up, down) = (format!("{module}.lora_B.weight"), format!("{module}.lora_A.weight"));
    let conv = "lora_unet_conv_in";
    let keys = |end: &str| format!("{conv}.lora_{end}.weight");
    let alpha = |shape: &[usize], value| (format!("{module}.alpha"), shape.to_vec(), vec![value; volume(shape)]);
    let good = || vec![tensor(&*up, &[8, 2]), tensor(&*down, &[2, 8])];
    let with = |more| good().into_iter().chain([more]).collect::<Tensors>();
    for (file, parts) in [
        (vec![tensor(&*up, &[8, 2])], vec!["incomplete", "lora_B.weight"]),
        (vec![tensor(&*down, &[2, 8])], vec!["incomplete", "lora_A.weight"]),
        (vec![tensor(&*up, &[8, 3]), tensor(&*down, &[2, 8])], vec!["lora_B.weight has shape [8, 3], expected [8, 2]"]),
        (vec![tensor(&*up, &[9, 2]), tensor(&*down, &[2, 8])], vec!["lora_B.weight has shape [9, 2], expected [8, 2]"]),
        (
            vec![tensor(&*up, &[8, 2]), tensor(&*down, &[2, 9])],
            vec!["lora_A.weight has shape [2, 9], expected [rank, 8]"],
        ),
        (vec![tensor(&*up, &[8, 0]), tensor(&*down, &[0, 8])], vec!["lora_A.weight has shape [0, 8]"]),
        (vec![tensor(&*up, &[8, 2]), tensor(&*down, &[])], vec!["lora_A.weight has shape []"]),
        (
            vec![
                tensor(keys("up"), &[8, 2, 1, 1]),
                tensor(keys("down"), &[2, 4, 1, 1]),
                tensor(keys("mid"), &[2, 3, 3, 3]),
            ],
            vec!["lora_mid.weight has shape [2, 3, 3, 3], expected [2, 2, height, width]"],
        ),
        (
            vec![
                tensor(keys("up"), &[8, 2, 1, 1]),
                tensor(keys("down"), &[2, 4, 1, 1]),
                tensor(keys("mid"), &[2, 2, 5, 5]),
            ],
            vec!["lora_down.weight has shape [2, 4, 1, 1], expected [2, 36 / 25 taps of its core, 1, 1]"],
        ),
        (with(alpha(&[2], 1.0)), vec!["alpha has shape [2], expected one number"]),
        (with(alpha(&[], f32::NAN)), vec!["alpha holds NaN"]),
        (with(tensor(format!("{module}.lora_up.weight"), &[8, 2])), vec!["both the same factor"]),
    ] {
        let e = message(resolved(&[lora(&file, 1.0)], 0));
        assert!(e.starts_with("it.safetensors: ") && parts.iter().all(|part| e.contains(part)), "{e}");
    }
}

#[test]
fn values_must_be_finite() {
    let weight = "mid_block.attentions.0.proj_out.weight";
    let file = |bad: usize, value: f32, strength| {
        let mut file = pair("unet.mid_block.attentions.0.proj_out", PEFT, [8, 2, 8]);
        file[bad].2[5] = value;
        let (patches, _) = resolved(&[lora(&file, strength)], 0)?;
        patches[0].1.product(weight, 8, 8)
    };
    assert!(message(file(0, f32::NAN, 1.0)).contains("lora_B.weight holds NaN"));
    assert!(message(file(1, f32::INFINITY, 1.0)).contains("lora_A.weight holds inf"));
    assert!(message(file(0, 3e38, 100.0)).contains("after scaling by 100"));
    for strength in [f32::NAN, f32::INFINITY, 101.0] {
        let it = Lora::new("it.safetensors".into(), bytes(&vec![], None), None, strength);
        assert!(message(it).contains("LoRA strength: expected a number from -100 to 100"));
    }
    let product = |n, k| {
        let (patches, _) = resolved(&[lora(&pair("unet.mid_block.attentions.0.proj_out", PEFT, [8, 2, 8]), 1.0)], 0)?;
        patches[0].1.product(weight, n, k)
    };
    assert!(message(product(8, 9)).contains("expected [rank, 9]"));
    assert!(message(product(9, 8)).contains("expected [9, 2]"));
}

#[test]
fn files_are_opened_by_path() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("own.safetensors");
    let file = pair("base_model.model.mid_block.attentions.0.proj_out", PEFT, [8, 2, 8]);
    std::fs::write(&path, &*bytes(&file, None)).expect("written");
    std::fs::write(folder.path().join("adapter_config.json"), r#"{"lora_alpha": 6}"#).expect("written");
    let expected: Vec<f64> = matmul(&file[0].2, &file[1].2, [8, 2, 8]).iter().map(|v| v * 3.0).collect();
    let opened = Lora::open(&path, 1.0).expect("a LoRA");
    assert_close(&delta(&[opened], Part::UNet, "mid_block.attentions.0.proj_out.weight", [8, 8]), &expected);
    assert!(message(Lora::open(&folder.path().join("none.safetensors"), 1.0)).contains("no such file"));
    let pickle = folder.path().join("it.pt");
    std::fs::write(&pickle, b"PK").expect("written");
    assert!(message(Lora::open(&pickle, 1.0)).contains("pickle"));
    let torn = folder.path().join("torn.safetensors");
    std::fs::write(&torn, &bytes(&file, None)[..50]).expect("written");
    assert!(message(Lora::open(&torn, 1.0)).contains("truncated"));
}
