//! LoRA files: low-rank products to add to a model's matrices.
//!
//! A file is matched to the model by its header alone ([`resolve`]: names, shapes, scales); the factors are decoded when a
//! matrix is loaded ([`Patches::product`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::files::{Bytes, map, refuse_pickle};
use crate::model::names::Modules;
use crate::weights::Weights;

mod keys;
#[cfg(test)]
mod tests;

use keys::{Keys, Names};

/// A LoRA file and how strongly it acts.
pub struct Lora {
    strength: f32,
    file: Arc<File>,
}

struct File {
    weights: Weights,
    /// What the training wrote about scales beside the tensors, as PEFT's LoraConfig.
    config: Map<String, Value>,
}

/// The part of a model that a LoRA patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The UNet.
    UNet,
    /// The first text encoder (0) or the second (1).
    Text(usize),
}

/// What LoRAs add to one matrix W \[n, k\]: up · down. A convolution's W is \[n, c · taps\], taps last, as PyTorch has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// Columns of `up`, rows of `down`.
    pub rank: usize,
    /// \[n, rank\], with strength · alpha / rank in it.
    pub up: Vec<f32>,
    /// \[rank, k\].
    pub down: Vec<f32>,
}

/// What LoRAs add to one part of a model, by canonical name of the weight.
#[derive(Default)]
pub struct Patches(HashMap<String, Vec<Factors>>);

/// The share of one file in one weight.
struct Factors {
    file: Arc<File>,
    up: String,
    down: String,
    mid: Option<String>,
    rank: usize,
    /// strength · alpha / rank.
    scale: f32,
}

impl Lora {
    /// Open a LoRA; its header is checked, no factor is read.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a strength beyond ±100, [`Error::File`] for a file that is not safetensors.
    pub fn open(path: &Path, strength: f32) -> Result<Lora> {
        refuse_pickle(path)?;
        let config = path.with_file_name("adapter_config.json");
        Lora::new(path.to_owned(), map(path)?, std::fs::read_to_string(config).ok().as_deref(), strength)
    }

    /// From a file's bytes, and the adapter_config.json beside it if there is one.
    fn new(path: PathBuf, bytes: Bytes, adapter: Option<&str>, strength: f32) -> Result<Lora> {
        if !(-100.0..=100.0).contains(&strength) {
            return Err(Error::invalid("LoRA strength", "a number from -100 to 100", strength));
        }
        // A header that does not parse is told by Weights.
        let header = SafeTensors::read_metadata(&bytes).ok();
        let written = header.and_then(|(_, header)| header.metadata().as_ref()?.get("lora_adapter_metadata").cloned());
        let weights = Weights::new(path, bytes)?;
        // PEFT's own files keep their scale beside them; others in the same folder have nothing to do with that config.
        let own = weights.names().any(|name| name.starts_with("base_model.model."));
        let config = written.as_deref().or(adapter.filter(|_| own));
        let config = config.and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default();
        Ok(Lora { strength, file: Arc::new(File { weights, config }) })
    }
}

impl Patches {
    /// No LoRAs.
    pub fn none() -> Patches {
        Patches::default()
    }

    /// Is nothing patched?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Is this weight patched?
    pub fn has(&self, weight: &str) -> bool {
        self.0.contains_key(weight)
    }

    /// All LoRAs' products for a weight of `n` rows of `k` numbers, their ranks side by side; none if nobody patches it.
    ///
    /// # Errors
    /// [`Error::File`] for factors of another shape, or values that are not finite.
    pub fn product(&self, weight: &str, n: usize, k: usize) -> Result<Option<Product>> {
        let Some(all) = self.0.get(weight) else { return Ok(None) };
        let rank = all.iter().map(|factors| factors.rank).sum();
        let (mut up, mut down) = (vec![0.0; n * rank], Vec::with_capacity(rank * k));
        let mut first = 0;
        for factors in all {
            factors.check(weight, n, k)?;
            for (row, values) in up.chunks_exact_mut(rank).zip(factors.up()?.chunks_exact(factors.rank)) {
                row[first..first + factors.rank].copy_from_slice(values);
            }
            down.extend(factors.down()?);
            first += factors.rank;
        }
        Ok(Some(Product { rank, up, down }))
    }
}

impl Factors {
    /// A module's factors, if both are there and fit a weight of that shape.
    fn new(lora: &Lora, module: &str, keys: Keys, part: Part, weight: &str, shape: &[usize]) -> Result<Factors> {
        let weights = &lora.file.weights;
        let (up, down) = match (keys.up, keys.down) {
            (Some(up), Some(down)) => (up, down),
            (up, down) => {
                let found = up.or(down).unwrap_or_else(|| "its other tensors".into());
                let problem = format!("module {module} is incomplete: expected its up and down factors, found {found}");
                return Err(Error::file(weights.path(), problem, "fetch the file again"));
            }
        };
        let rank = weights.shape(&down).and_then(|shape| shape.first().copied()).unwrap_or(0);
        let alpha = match &keys.alpha {
            None => lora.file.scale(part, weight.strip_suffix(".weight").unwrap_or(weight), rank),
            Some(key) => {
                let shape = weights.shape(key).unwrap_or_default().to_vec();
                if shape.iter().any(|&d| d != 1) {
                    let problem = format!("tensor {key} has shape {shape:?}, expected one number");
                    return Err(Error::file(weights.path(), problem, "fetch the file again"));
                }
                // A whole number in some trainers' files.
                let value = weights.f32(key, &shape)?.first().copied().unwrap_or(f32::NAN);
                if !value.is_finite() {
                    return Err(weights.not_finite(key, value));
                }
                Some(f64::from(value) / rank as f64)
            }
        };
        let scale = (f64::from(lora.strength) * alpha.unwrap_or(1.0)) as f32;
        let factors = Factors { file: lora.file.clone(), up, down, mid: keys.mid, rank, scale };
        factors.check(weight, shape[0], volume(&shape[1..]))?;
        Ok(factors)
    }

    fn shape(&self, key: &str) -> &[usize] {
        self.file.weights.shape(key).unwrap_or_default()
    }

    /// Are these the factors of a matrix [n, k]? A 1x1 convolution's have two more dimensions of 1.
    fn check(&self, weight: &str, n: usize, k: usize) -> Result<()> {
        let rank = self.rank;
        let wrong = |key: &str, expected: String| {
            let found = self.shape(key);
            let problem = format!("tensor {key} has shape {found:?}, expected {expected} for {weight} [{n}, {k}]");
            Err(Error::file(self.file.weights.path(), problem, "use a LoRA made for this kind of model"))
        };
        let taps = match self.mid.as_deref().map(|mid| (mid, self.shape(mid))) {
            None => 1,
            Some((_, [i, j, taps @ ..])) if (*i, *j) == (rank, rank) && rank > 0 => volume(taps),
            Some((mid, _)) => return wrong(mid, format!("[{rank}, {rank}, height, width]")),
        };
        match self.shape(&self.down) {
            [_, width @ ..] if rank > 0 && volume(width).saturating_mul(taps) == k => {}
            _ if self.mid.is_none() => return wrong(&self.down, format!("[rank, {k}], its taps apart if it has any,")),
            _ => return wrong(&self.down, format!("[{rank}, {k} / {taps} taps of its core, 1, 1]")),
        }
        match self.shape(&self.up) {
            [rows, columns, ones @ ..] if (*rows, *columns) == (n, rank) && ones.iter().all(|&d| d == 1) => Ok(()),
            _ => wrong(&self.up, format!("[{n}, {rank}]")),
        }
    }

    fn values(&self, key: &str) -> Result<Vec<f32>> {
        self.file.weights.finite(key, self.shape(key))
    }

    /// [n, rank], scaled.
    fn up(&self) -> Result<Vec<f32>> {
        let mut up = self.values(&self.up)?;
        for value in &mut up {
            *value *= self.scale;
            if !value.is_finite() {
                return Err(self.file.weights.not_finite(&self.up, format!("{value} after scaling by {}", self.scale)));
            }
        }
        Ok(up)
    }

    /// [rank, k]: with a core (Tucker), [i, (c, t)] is Σ_j core[i, j, t] · down[j, c].
    fn down(&self) -> Result<Vec<f32>> {
        let down = self.values(&self.down)?;
        let Some(mid) = &self.mid else { return Ok(down) };
        let core = self.values(mid)?;
        let (rank, channels) = (self.rank, down.len() / self.rank);
        let taps = core.len() / (rank * rank);
        let mut out = vec![0.0; rank * channels * taps];
        for (row, core) in out.chunks_exact_mut(channels * taps).zip(core.chunks_exact(rank * taps)) {
            for (down, core) in down.chunks_exact(channels).zip(core.chunks_exact(taps)) {
                for (filter, value) in row.chunks_exact_mut(taps).zip(down) {
                    filter.iter_mut().zip(core).for_each(|(sum, core)| *sum += core * value);
                }
            }
        }
        Ok(out)
    }
}

/// Numbers in a tensor of these dimensions; a header may claim any.
fn volume(shape: &[usize]) -> usize {
    shape.iter().fold(1, |all, &d| all.saturating_mul(d))
}

impl File {
    /// alpha / rank of a module, where the file's metadata says it: diffusers writes the parts' configs side by side.
    fn scale(&self, part: Part, module: &str, rank: usize) -> Option<f64> {
        let prefix = match part {
            Part::UNet => "unet.",
            Part::Text(0) => "text_encoder.",
            Part::Text(_) => "text_encoder_2.",
        };
        let get = |key: &str| self.config.get(&format!("{prefix}{key}")).or_else(|| self.config.get(key));
        // PEFT's patterns are ends of modules' names; diffusers writes a ^ where it means all of it.
        let means = |pattern: &str| {
            let end = pattern.trim_start_matches('^').trim_start_matches("text_model.");
            let start = module.strip_suffix(end);
            start.is_some_and(|start| start.is_empty() || (start.ends_with('.') && !pattern.starts_with('^')))
        };
        let patterns = get("alpha_pattern").and_then(Value::as_object);
        let matching = patterns.into_iter().flatten().filter(|(pattern, _)| means(pattern));
        let own = matching.max_by_key(|(pattern, _)| pattern.len());
        let alpha = own.map(|(_, alpha)| alpha).or_else(|| get("lora_alpha"))?.as_f64()?;
        let stabilised = get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        Some(alpha / if stabilised { (rank as f64).sqrt() } else { rank as f64 })
    }
}

/// The patches of each part, and what the user should know: what fits nothing.
pub type Resolved = (Vec<(Part, Patches)>, Vec<String>);

/// Match files to a model: `parts` are its parts with their weights under canonical names, `unet` the modules of its UNet.
///
/// # Errors
/// [`Error::File`] for a file that is no LoRA, of a kind that is not run, incomplete, or of other shapes;
/// [`Error::Unsupported`] for one that was made for another kind of model.
pub fn resolve(loras: &[Lora], parts: &[(Part, &Weights)], unet: &Modules) -> Result<Resolved> {
    let names = Names::new(parts, unet);
    let mut patches: Vec<(Part, Patches)> = parts.iter().map(|(part, _)| (*part, Patches::none())).collect();
    let mut warnings = Vec::new();
    for lora in loras {
        let path = lora.file.weights.path();
        let (modules, mut unmatched) = keys::modules(&lora.file.weights)?;
        let model = model_context(parts);
        check_family(&lora.file.weights, &modules, model)?;
        let all = modules.len() + unmatched.len();
        let mut taken = HashSet::new();
        // Flux and SD 3 share the text encoders: a file whose other modules all fit nothing is not for this model.
        let (mut fits, mut stranger) = (false, None);
        for (module, keys) in modules {
            let text = matches!(keys::locate(&module).0, Some(Part::Text(_)));
            let Some((at, weight)) = names.find(&module) else {
                stranger = stranger.or_else(|| (!text).then(|| module.clone()));
                unmatched.push(module);
                continue;
            };
            fits |= !text;
            if !taken.insert((at, weight)) {
                unmatched.push(format!("{module} (the file names {weight} twice)"));
                continue;
            }
            let (part, weights) = parts[at];
            let shape = weights.shape(weight).unwrap_or_default();
            let factors = Factors::new(lora, &module, keys, part, weight, shape)?;
            if lora.strength != 0.0 {
                patches[at].1.0.entry(weight.to_owned()).or_default().push(factors);
            }
        }
        if taken.is_empty() || (stranger.is_some() && !fits) {
            let example = stranger.as_ref().or(unmatched.last()).map_or("", String::as_str);
            let found = format!("{} entries that fit nothing, such as {example}", unmatched.len());
            return Err(unsupported(path, model, found));
        }
        if !unmatched.is_empty() {
            warnings.push(left_out(path, &unmatched, all));
        }
    }
    Ok((patches, warnings))
}

/// What a file holds that fits nothing, some of it by name.
fn left_out(path: &Path, unmatched: &[String], all: usize) -> String {
    let some = unmatched.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if unmatched.len() > 8 { ", …" } else { "" };
    let (path, count) = (path.display(), unmatched.len());
    format!("{path}: {count} of its {all} entries fit nothing in this model and are left out: {some}{more}")
}

/// Width of the context that the model attends to.
fn model_context(parts: &[(Part, &Weights)]) -> Option<usize> {
    let (_, unet) = parts.iter().find(|(part, _)| *part == Part::UNet)?;
    let key = unet.names().find(|name| name.ends_with(".attn2.to_k.weight"))?;
    unet.shape(key)?.get(1).copied()
}

/// Was the file made for a model of that context? Told by shapes, since SD 1, SD 2 and SDXL share names of modules.
fn check_family(weights: &Weights, modules: &BTreeMap<String, Keys>, model: Option<usize>) -> Result<()> {
    let attends = |(module, keys): (&String, &Keys)| {
        let down = keys.down.clone().filter(|_| keys::locate(module).1.ends_with("attn2_to_k"))?;
        Some((weights.shape(&down)?.get(1).copied()?, down))
    };
    match modules.iter().find_map(attends) {
        Some((width, key)) if model.is_some_and(|model| model != width) => {
            Err(unsupported(weights.path(), model, format!("one for {}, by its key {key}", family(width))))
        }
        _ => Ok(()),
    }
}

fn unsupported(path: &Path, model: Option<usize>, found: String) -> Error {
    let expected = match model {
        Some(width) => format!("a LoRA for {}, as the model is", family(width)),
        None => "a LoRA for this model".into(),
    };
    Error::Unsupported { path: path.to_owned(), what: "this LoRA".into(), expected, found }
}

/// What people call models whose context is that wide.
fn family(context: usize) -> String {
    let name = match context {
        768 => "SD 1.x",
        1024 => "SD 2.x",
        1280 => "SDXL's refiner",
        2048 => "SDXL",
        _ => "another Stable Diffusion",
    };
    format!("{name} (a context of {context})")
}
