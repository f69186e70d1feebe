//! The embedded model: a small Stable Diffusion 1.x (256 x 256 pixels, f16, 31.7 MB), in the binary, so that a program that
//! links this crate makes pictures in any folder and without a download.
//!
//! The bytes are those of a diffusers folder; this crate's own folder is one. README.md is the model's card. Whoever ships a
//! program with these weights in it ships [`NOTICES`] with it.

/// Every file of the diffusers folder: its path in the folder, with `/`, and its bytes. Give it to `scumble::files::Files::Embedded`.
///
/// `include_bytes!` aligns nothing: a tensor inside a safetensors file may start at any address, so copy it or read it
/// unaligned; do not cast its bytes to a slice of `f16`.
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

/// The notices of the material that the weights were learnt from, in Markdown: sources, licences and their full texts, but for
/// Apache-2.0's, which is [`APACHE`].
pub const NOTICES: &str = include_str!("NOTICES.md");

/// The full text of the Apache License 2.0.
pub const APACHE: &str = include_str!("licenses/Apache-2.0.txt");

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::FILES;

    /// A file that the folder has and the list lacks would be missed only by whoever needs it.
    #[test]
    fn the_list_is_the_folder() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut expected = BTreeSet::from(["model_index.json".to_owned()]);
        for part in ["scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
            for entry in root.join(part).read_dir().expect("the model's folders are in this crate") {
                let name = entry.expect("a readable folder").file_name();
                expected.insert(format!("{part}/{}", name.to_string_lossy()));
            }
        }
        let listed: BTreeSet<String> = FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
        assert_eq!(listed, expected, "FILES in lib.rs and the files of assets/ differ");
        assert_eq!(listed.len(), FILES.len(), "FILES names a file twice");
    }
}
