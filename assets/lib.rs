//! The embedded model: a small Stable Diffusion, in the binary, so that a program that links this crate works in any folder.

/// Every file of the diffusers folder, by its path in it. Give it to `scumble::weights::Files::Embedded`.
pub const FILES: &[(&str, &[u8])] = &[
    ("model_index.json", include_bytes!("model_index.json")),
    ("scheduler/scheduler_config.json", include_bytes!("scheduler/scheduler_config.json")),
    ("text_encoder/config.json", include_bytes!("text_encoder/config.json")),
    ("text_encoder/model.safetensors", include_bytes!("text_encoder/model.safetensors")),
    ("tokenizer/merges.txt", include_bytes!("tokenizer/merges.txt")),
    ("tokenizer/special_tokens_map.json", include_bytes!("tokenizer/special_tokens_map.json")),
    ("tokenizer/tokenizer_config.json", include_bytes!("tokenizer/tokenizer_config.json")),
    ("tokenizer/vocab.json", include_bytes!("tokenizer/vocab.json")),
    ("unet/config.json", include_bytes!("unet/config.json")),
    ("unet/diffusion_pytorch_model.safetensors", include_bytes!("unet/diffusion_pytorch_model.safetensors")),
    ("vae/config.json", include_bytes!("vae/config.json")),
    ("vae/diffusion_pytorch_model.safetensors", include_bytes!("vae/diffusion_pytorch_model.safetensors")),
];
