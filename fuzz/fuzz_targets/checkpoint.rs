//! Files of strangers: header, tensor table, family, and the same table as a LoRA and as a textual inversion. Inputs: [`table`].
#![no_main]

mod table;

use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Once};

use libfuzzer_sys::fuzz_target;
use scumble::Checkpoint;
use scumble::files::Bytes;
use scumble::lora::{Lora, Part, resolve};
use scumble::model::names::Modules;
use scumble::text::Embedding;
use scumble::weights::Weights;

/// What LoRAs are matched to where the input holds no model: tiny ones.
static MODELS: LazyLock<[Checkpoint; 2]> = LazyLock::new(|| {
    [include_str!("../models/sd1.table"), include_str!("../models/sdxl.table")].map(|table| {
        let weights = Weights::new("model".into(), Bytes::Owned(table::of_table(table))).expect("a file");
        let model = Checkpoint::of_weights(weights).expect("a model");
        assert!(model.texts().is_ok() && model.vae().is_ok(), "a whole model");
        model
    })
});

/// LoRAs are opened by path.
static LORA: LazyLock<PathBuf> = LazyLock::new(|| {
    let shm = Path::new("/dev/shm");
    let folder = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    folder.join(format!("scumble-fuzz-{}.safetensors", std::process::id()))
});

fn weights(bytes: Vec<u8>) -> Option<Weights> {
    Weights::new("fuzz.safetensors".into(), Bytes::Owned(bytes)).ok()
}

/// Every tensor is read, or refused, whole and by row.
fn read(weights: &Weights) {
    let _ = weights.sizes();
    for name in weights.names() {
        let shape = weights.shape(name).expect("it is listed");
        if let Ok(values) = weights.f32(name, shape) {
            assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
        }
        let _ = weights.finite(name, shape);
    }
}

fn patch(model: &Checkpoint) {
    let Ok(lora) = Lora::open(&LORA, 0.7) else { return };
    let mut parts = vec![(Part::UNet, &*model.unet.weights)];
    let texts = model.texts().unwrap_or_default();
    parts.extend(texts.iter().enumerate().map(|(i, text)| (Part::Text(i), &*text.part.weights)));
    let Ok((patches, _)) = resolve(&[lora], &parts, &Modules::unet(&model.unet.config)) else { return };
    for ((_, weights), (_, patches)) in parts.iter().zip(&patches) {
        for name in weights.names().filter(|name| patches.has(name)) {
            let [n, rest @ ..] = weights.shape(name).expect("it is listed") else { continue };
            let k: usize = rest.iter().product();
            // The loader asks for what the config says, which is never nothing.
            if n * k == 0 {
                continue;
            }
            if let Ok(Some(product)) = patches.product(name, *n, k) {
                assert_eq!((product.up.len(), product.down.len()), (n * product.rank, product.rank * k), "{name}");
            }
        }
    }
}

fn delete_lora() {
    static ONCE: Once = Once::new();
    extern "C" fn delete() {
        let _ = std::fs::remove_file(&*LORA);
    }
    unsafe extern "C" {
        fn atexit(f: extern "C" fn()) -> i32;
    }
    // SAFETY: it takes nothing, returns nothing and touches only a path that is never dropped.
    ONCE.call_once(|| _ = unsafe { atexit(delete) });
}

fuzz_target!(|input: &[u8]| {
    let (file, lora) = table::files(input);
    let Some(parsed) = weights(file.clone()) else { return };
    read(&parsed);
    if let Ok(embedding) = Embedding::new("fox", &parsed) {
        for width in embedding.widths() {
            let rows = embedding.for_encoder(width).expect("it is listed");
            assert_eq!(rows.len(), embedding.rows());
        }
        let _ = embedding.for_encoder(768);
    }
    let looks_like_lora = parsed.names().any(|name| name.contains("lora"));
    let model = Checkpoint::of_weights(parsed);
    if let Ok(model) = &model {
        read(&model.unet.weights);
        model.texts().unwrap_or_default().iter().for_each(|text| read(&text.part.weights));
        if let Ok(vae) = model.vae() {
            read(&vae.weights);
            vae.config.factor();
        }
        let _ = (model.size(), model.schedule(), model.unet.config.mid_size(64, 64));
    }
    if lora.is_some() || looks_like_lora {
        delete_lora();
        std::fs::write(&*LORA, lora.unwrap_or(file)).expect("room for a file");
        match &model {
            Ok(model) => patch(model),
            Err(_) => MODELS.iter().for_each(patch),
        }
    }
});
