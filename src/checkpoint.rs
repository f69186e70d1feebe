//! A model opened: which parts it has, their configs and where their weights lie. Headers are read, no weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::files::{Files, map, refuse_pickle};
use crate::lora::{Lora, Part as LoraPart, Patches, resolve};
use crate::model::config::{ClipConfig, NoiseConfig, UNetConfig, VaeConfig};
use crate::model::detect::unet_prefix;
use crate::model::names::{Modules, below, open_clip, transformers_clip};
use crate::schedule::{BetaSchedule, Prediction, Schedule};
use crate::text::Tokenizer;
use crate::weights::Weights;

/// Which files make a model.
#[derive(Clone, Debug)]
pub struct Source {
    /// The model.
    pub files: Files,
    /// A VAE in place of the model's: a .safetensors file or a diffusers folder.
    pub vae: Option<PathBuf>,
    /// Text encoders in place of the model's.
    pub clip: Vec<PathBuf>,
    /// LoRA files and their strengths.
    pub loras: Vec<(PathBuf, f32)>,
}

impl From<Files> for Source {
    fn from(files: Files) -> Source {
        Source { files, vae: None, clip: vec![], loras: vec![] }
    }
}

/// A part of a model: its config, its weights under canonical names, and what LoRAs add to them.
pub struct Part<C> {
    /// What it is in numbers.
    pub config: C,
    /// Its tensors.
    pub weights: Arc<Weights>,
    /// LoRAs' share.
    pub patches: Patches,
}

impl<C> Part<C> {
    fn new(config: C, weights: Weights) -> Part<C> {
        Part { config, weights: Arc::new(weights), patches: Patches::none() }
    }
}

/// A text encoder and how this model reads it.
pub struct TextPart {
    /// Config and weights.
    pub part: Part<ClipConfig>,
    /// Text to ids.
    pub tokenizer: Tokenizer,
    /// Which layer's output is read, counted from the last: 1 the last, 2 the last but one.
    pub skip: usize,
    /// Is the final norm applied to that output?
    pub normed: bool,
}

/// A model opened.
pub struct Checkpoint {
    path: PathBuf,
    /// "SD 1.x", "SD 2.x", "SDXL", with what sets it apart.
    pub family: String,
    /// Which keys or configs decided that.
    pub decided: String,
    /// The UNet.
    pub unet: Part<UNetConfig>,
    /// One text encoder, two for SDXL; none if the file holds none.
    texts: Vec<TextPart>,
    vae: Option<Part<VaeConfig>>,
    /// The noise it was trained with.
    pub noise: NoiseConfig,
    /// What the user should know: LoRA keys that fit nothing.
    pub warnings: Vec<String>,
}

impl Checkpoint {
    /// Open a model by its files.
    ///
    /// # Errors
    /// Of the files: what is wrong with which, and what to do.
    pub fn open(source: &Source) -> Result<Checkpoint> {
        let mut checkpoint = match &source.files {
            Files::Single(path) => open_single(path, &source.clip)?,
            files => open_folder(files)?,
        };
        if !source.clip.is_empty() && !matches!(source.files, Files::Single(_)) {
            let encoders = source.clip.iter().map(|path| open_file(path)).collect::<Result<Vec<_>>>()?;
            checkpoint.texts = text_parts(&encoders.iter().collect::<Vec<_>>(), &checkpoint.unet.config)?;
        }
        if let Some(path) = &source.vae {
            checkpoint.vae = Some(open_vae(path, checkpoint.unet.config.added.is_some())?);
        }
        checkpoint.check()?;
        if !source.loras.is_empty() {
            checkpoint.patch(&source.loras)?;
        }
        Ok(checkpoint)
    }

    /// A single file's tensors, wherever they lie, as a model.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn of_weights(file: Weights) -> Result<Checkpoint> {
        let checkpoint = of_weights(file, &[])?;
        checkpoint.check()?;
        Ok(checkpoint)
    }

    /// The VAE.
    ///
    /// # Errors
    /// [`Error::File`] if the file holds none.
    pub fn vae(&self) -> Result<&Part<VaeConfig>> {
        let hint = "name one with --vae FILE";
        self.vae
            .as_ref()
            .ok_or_else(|| Error::file(&self.path, "the file holds no VAE (no decoder.conv_in.weight)", hint))
    }

    /// The text encoders, in the order in which the context joins them.
    ///
    /// # Errors
    /// [`Error::File`] if the file lacks one.
    pub fn texts(&self) -> Result<&[TextPart]> {
        let wanted = if self.unet.config.added.is_some() { 2 } else { 1 };
        if self.texts.len() == wanted {
            return Ok(&self.texts);
        }
        let problem = format!(
            "it needs {wanted} text encoder{} (their widths together {}), found {}",
            if wanted == 1 { "" } else { "s" },
            self.unet.config.cross_dim,
            self.texts.len()
        );
        Err(Error::file(&self.path, problem, "name what is missing with --clip FILE (once for each)"))
    }

    /// The schedule of its training, and what it predicts.
    pub fn schedule(&self) -> (Schedule, Prediction) {
        let n = &self.noise;
        let betas = if n.beta_schedule == "linear" { BetaSchedule::Linear } else { BetaSchedule::ScaledLinear };
        let prediction = if n.prediction_type == "v_prediction" { Prediction::V } else { Prediction::Epsilon };
        let schedule = Schedule::new(betas, n.beta_start, n.beta_end, n.num_train_timesteps);
        (if n.rescale_betas_zero_snr { schedule.zero_snr() } else { schedule }, prediction)
    }

    /// The model's own picture size in pixels, a side.
    pub fn size(&self) -> u32 {
        self.unet.config.sample_size as u32 * 8
    }

    /// Do the parts belong together?
    fn check(&self) -> Result<()> {
        let unsupported = |what: &str, expected: String, found: String| {
            Err(Error::Unsupported { path: self.path.clone(), what: what.into(), expected, found })
        };
        let config = &self.unet.config;
        let widths: Vec<usize> = self.texts.iter().map(|text| text.part.config.hidden_size).collect();
        let width: usize = widths.iter().sum();
        let complete = self.texts().is_ok();
        if complete && width != config.cross_dim {
            return unsupported(
                "the UNet's context (attn2.to_k.weight)",
                format!("{width}, as wide as the text encoder"),
                config.cross_dim.to_string(),
            );
        }
        if let (Some(added), true) = (config.added, complete) {
            let last = &self.texts[self.texts.len() - 1].part;
            let pooled =
                last.weights.shape("text_projection.weight").and_then(|shape| shape.first().copied()).unwrap_or(0);
            if pooled != added.pooled() {
                let found = format!("{pooled} (text_projection of the second text encoder)");
                return unsupported("the pooled text", format!("{} numbers", added.pooled()), found);
            }
        }
        let factor = self.vae.as_ref().map_or(8, |vae| vae.config.factor());
        if config.out_channels != 4 || factor != 8 || ![4, 9].contains(&config.in_channels) {
            let found = format!("{} in, {} out, factor {factor}", config.in_channels, config.out_channels);
            return unsupported(
                "a picture",
                "4 latent channels (9 in, to inpaint) and a VAE of factor 8".into(),
                found,
            );
        }
        Ok(())
    }

    /// Add LoRAs.
    fn patch(&mut self, loras: &[(PathBuf, f32)]) -> Result<()> {
        let loras = loras.iter().map(|(path, strength)| Lora::open(path, *strength)).collect::<Result<Vec<_>>>()?;
        let mut parts = vec![(LoraPart::UNet, &*self.unet.weights)];
        parts.extend(self.texts.iter().enumerate().map(|(i, text)| (LoraPart::Text(i), &*text.part.weights)));
        let (patches, warnings) = resolve(&loras, &parts, &Modules::unet(&self.unet.config))?;
        for (part, patches) in patches {
            match part {
                LoraPart::UNet => self.unet.patches = patches,
                LoraPart::Text(i) => self.texts[i].part.patches = patches,
            }
        }
        self.warnings.extend(warnings);
        Ok(())
    }
}

/// What people call a model of these numbers.
fn family(config: &UNetConfig, noise: &NoiseConfig) -> String {
    let base = match (config.added.is_some(), config.cross_dim) {
        (true, _) => "SDXL",
        (false, 768) => "SD 1.x",
        (false, 1024) => "SD 2.x",
        (false, _) => "Stable Diffusion of another size",
    };
    let inpaint = if config.in_channels == 9 { ", inpainting" } else { "" };
    let velocity = if noise.prediction_type == "v_prediction" { ", v-prediction" } else { "" };
    format!("{base}{inpaint}{velocity}")
}

fn open_file(path: &Path) -> Result<Weights> {
    refuse_pickle(path)?;
    Weights::new(path.to_owned(), map(path)?)
}

fn open_single(path: &Path, clips: &[PathBuf]) -> Result<Checkpoint> {
    let named = clips.iter().map(|path| open_file(path)).collect::<Result<Vec<_>>>()?;
    of_weights(open_file(path)?, &named)
}

/// A single file's tensors, and text encoders named beside it.
fn of_weights(file: Weights, named: &[Weights]) -> Result<Checkpoint> {
    let path = file.path();
    let prefix = unet_prefix(&file)?;
    let raw = below(&file, &prefix);
    let encoders: Vec<&Weights> = if named.is_empty() { vec![&file] } else { named.iter().collect() };
    let found = find_texts(&encoders);
    let pooled = found.iter().filter_map(|(w, _)| w.shape("text_projection.weight")?.first().copied()).next_back();
    let mut config = UNetConfig::of_weights(&raw, pooled)?;
    let unet = Modules::unet(&config).canonical(&raw);
    let (noise, why) = NoiseConfig::of_weights(&file, &unet, &config)?;
    if noise.prediction_type == "v_prediction" && config.added.is_none() {
        config.sample_size = 96;
    }
    let kind = if config.added.is_some() { "with" } else { "without" };
    let decided =
        format!("UNet at {prefix}input_blocks, {kind} label_emb, context of {}; prediction by {why}", config.cross_dim);
    let texts = text_parts(&encoders, &config)?;
    let vae = match find_vae(&file, config.added.is_some()) {
        Some(vae) => Some(vae?),
        None => None,
    };
    let family = family(&config, &noise);
    let warnings = Vec::new();
    Ok(Checkpoint {
        path: path.to_owned(),
        family,
        decided,
        unet: Part::new(config, unet),
        texts,
        vae,
        noise,
        warnings,
    })
}

/// The text encoders in these files, by their token embeddings: (canonical weights, in OpenCLIP's layout?), the narrowest first.
fn find_texts(files: &[&Weights]) -> Vec<(Weights, bool)> {
    let mut found = Vec::new();
    for file in files {
        let mut names: Vec<&str> = file.names().filter(|name| name.ends_with("token_embedding.weight")).collect();
        // Models have one or two; a file with thousands is nobody's, and must not cost time by the square.
        names.sort_by_key(|name| (name.len(), *name));
        for name in names.into_iter().take(4) {
            if let Some(prefix) = name.strip_suffix("embeddings.token_embedding.weight") {
                let prefix = prefix.strip_suffix("text_model.").unwrap_or(prefix);
                found.push((transformers_clip(&below(file, prefix)), false));
            } else if let Some(prefix) = name.strip_suffix("token_embedding.weight") {
                found.push((open_clip(&below(file, prefix)), true));
            }
        }
    }
    let width =
        |w: &Weights| w.shape("embeddings.token_embedding.weight").map_or(0, |s| s.last().copied().unwrap_or(0));
    found.sort_by_key(|(w, _)| width(w));
    found
}

fn text_parts(files: &[&Weights], unet: &UNetConfig) -> Result<Vec<TextPart>> {
    let xl = unet.added.is_some();
    let mut texts = Vec::new();
    for (weights, open_clip) in find_texts(files) {
        let config = ClipConfig::of_weights(&weights, open_clip)?;
        // SDXL's second and SD 2.x were trained with zeros behind the end, the others with ends.
        let zeros = config.hidden_act == "gelu";
        // SD 2.x reads the last layer but one; files of transformers for it have the last cut off already.
        let penultimate = xl || open_clip || (zeros && config.num_hidden_layers == 24);
        texts.push(TextPart {
            part: Part::new(config, weights),
            tokenizer: Tokenizer::clip(if zeros { 0 } else { 49_407 }),
            skip: if penultimate { 2 } else { 1 },
            normed: !xl,
        });
    }
    Ok(texts)
}

/// The VAE in a file, if there is one, in either layout.
fn find_vae(file: &Weights, xl: bool) -> Option<Result<Part<VaeConfig>>> {
    let first = "decoder.conv_in.weight";
    let mut prefixes: Vec<&str> = file.names().filter_map(|name| name.strip_suffix(first)).collect();
    prefixes.sort_by_key(|prefix| prefix.len());
    let raw = below(file, prefixes.first()?);
    let levels = (0..).find(|i| !raw.has(&format!("decoder.up.{i}.block.0.conv1.weight"))).unwrap_or(0);
    let weights = Modules::vae(levels).canonical(&raw);
    let scaling = if xl { 0.130_25 } else { 0.182_15 };
    Some(VaeConfig::of_weights(&weights, scaling).map(|config| Part::new(config, weights)))
}

fn open_vae(path: &Path, xl: bool) -> Result<Part<VaeConfig>> {
    if path.is_dir() {
        // A diffusers VAE by itself, or the folder of a whole model.
        let inner = if path.join("vae/config.json").is_file() { "vae" } else { "." };
        return folder_vae(&Files::Folder(path.to_owned()), inner);
    }
    let file = open_file(path)?;
    match find_vae(&file, xl) {
        Some(vae) => vae,
        None => {
            Err(Error::file(path, "the file holds no VAE (no key decoder.conv_in.weight)", "give --vae another file"))
        }
    }
}

fn folder_vae(files: &Files, folder: &str) -> Result<Part<VaeConfig>> {
    let config = format!("{folder}/config.json");
    let config = VaeConfig::parse(&files.path(&config), &files.text(&config)?)?;
    let weights = files.part(folder, "diffusion_pytorch_model")?;
    Ok(Part::new(config, weights))
}

fn open_folder(files: &Files) -> Result<Checkpoint> {
    let unet_json = "unet/config.json";
    let config = UNetConfig::parse(&files.path(unet_json), &files.text(unet_json)?)?;
    let unet = files.part("unet", "diffusion_pytorch_model")?;
    let name = "scheduler/scheduler_config.json";
    let noise = NoiseConfig::parse(&files.path(name), &files.text(name)?)?;
    let xl = config.added.is_some();
    let mut texts = Vec::new();
    for end in if xl { &["", "_2"][..] } else { &[""] } {
        let folder = format!("text_encoder{end}");
        let name = format!("{folder}/config.json");
        if !files.has(&name) {
            continue;
        }
        let config = ClipConfig::parse(&files.path(&name), &files.text(&name)?)?;
        let weights = transformers_clip(&files.part(&folder, "model")?);
        let tokenizer = folder_tokenizer(files, &format!("tokenizer{end}"), config.hidden_act == "gelu")?;
        let skip = if xl { 2 } else { 1 };
        texts.push(TextPart { part: Part::new(config, weights), tokenizer, skip, normed: !xl });
    }
    let vae = if files.has("vae/config.json") { Some(folder_vae(files, "vae")?) } else { None };
    let family = family(&config, &noise);
    let decided = format!("unet/config.json; prediction by prediction_type of {name}");
    let path = files.path("");
    Ok(Checkpoint { path, family, decided, unet: Part::new(config, unet), texts, vae, noise, warnings: vec![] })
}

/// The tokenizer in a folder; CLIP's own where the folder has none.
fn folder_tokenizer(files: &Files, folder: &str, zeros: bool) -> Result<Tokenizer> {
    #[derive(serde::Deserialize)]
    struct Map {
        #[serde(default)]
        pad_token: serde_json::Value,
    }
    let name = |file: &str| format!("{folder}/{file}");
    if !files.has(&name("vocab.json")) {
        return Ok(Tokenizer::clip(if zeros { 0 } else { 49_407 }));
    }
    // As transformers: the map decides, the config where there is no map.
    let said = [name("special_tokens_map.json"), name("tokenizer_config.json")];
    let map = match said.into_iter().find(|name| files.has(name)) {
        Some(name) => files.json::<Map>(&name)?,
        None => Map { pad_token: serde_json::Value::Null },
    };
    let pad = map.pad_token.as_str().or_else(|| map.pad_token.get("content")?.as_str()).unwrap_or("<|endoftext|>");
    let (vocab, merges) = (files.text(&name("vocab.json"))?, files.text(&name("merges.txt"))?);
    Tokenizer::new(&files.path(folder), &vocab, &merges, 77, pad)
}
