//! What the keys of a LoRA file mean: which factor of which of the model's weights.

use std::collections::{BTreeMap, HashMap};

use super::Part;
use crate::error::{Error, Result};
use crate::model::names::Modules;
use crate::weights::Weights;

/// What a tensor is to its module.
#[derive(Clone, Copy)]
enum Role {
    Up,
    Down,
    Mid,
    Alpha,
}

/// How keys end, after the module's name.
const ENDS: &[(&str, Role)] = &[
    // kohya, LyCORIS
    (".lora_up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_mid.weight", Role::Mid),
    (".alpha", Role::Alpha),
    // PEFT, and diffusers since
    (".lora_B.weight", Role::Up),
    (".lora_A.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    // diffusers before PEFT: attention's, text encoders', all others'
    ("_lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
];

/// The keys of one module's tensors.
#[derive(Default)]
pub(super) struct Keys {
    pub up: Option<String>,
    pub down: Option<String>,
    /// Tucker's core, between the two.
    pub mid: Option<String>,
    pub alpha: Option<String>,
}

impl Keys {
    fn of(&mut self, role: Role) -> &mut Option<String> {
        match role {
            Role::Up => &mut self.up,
            Role::Down => &mut self.down,
            Role::Mid => &mut self.mid,
            Role::Alpha => &mut self.alpha,
        }
    }
}

/// A file's modules by name, and the keys that belong to none.
///
/// # Errors
/// [`Error::File`] for what is no LoRA, or another kind than we run, by the key that decides.
pub(super) fn modules(weights: &Weights) -> Result<(BTreeMap<String, Keys>, Vec<String>)> {
    let mut names: Vec<&str> = weights.names().collect();
    names.sort_unstable();
    let (mut modules, mut others) = (BTreeMap::<String, Keys>::new(), Vec::new());
    for &key in &names {
        if let Some(kind) = refused(key) {
            let hint = "export it as a plain LoRA or LoCon, or merge it into the checkpoint with its own trainer";
            return Err(Error::file(weights.path(), format!("this is {kind}, by its key {key}; it is not run"), hint));
        }
        let Some((module, role)) = ENDS.iter().find_map(|(end, role)| Some((key.strip_suffix(end)?, *role))) else {
            others.push(key.to_owned());
            continue;
        };
        if let Some(first) = modules.entry(module.to_owned()).or_default().of(role).replace(key.to_owned()) {
            let problem = format!("{first} and {key} are both the same factor of {module}, expected one of them");
            return Err(Error::file(weights.path(), problem, "save it again in one naming"));
        }
    }
    if modules.values().all(|keys| keys.up.is_none() && keys.down.is_none()) {
        let found = names.first().map_or("no tensors".to_owned(), |key| format!("keys such as {key}"));
        let problem =
            format!("this is no LoRA: expected keys that end in lora_up.weight or lora_B.weight, found {found}");
        return Err(Error::file(weights.path(), problem, "give a LoRA for Stable Diffusion as .safetensors"));
    }
    Ok((modules, others))
}

/// Relatives of LoRA that are no product of two factors added to a weight.
fn refused(key: &str) -> Option<&'static str> {
    let end = key.strip_suffix(".weight").unwrap_or(key);
    let end = end.strip_suffix(".default").unwrap_or(end);
    match end.rsplit('.').next().unwrap_or(end) {
        "dora_scale" | "lora_magnitude_vector" => Some("a DoRA"),
        "a1" | "a2" | "b1" | "b2" => Some("a GLoRA"),
        "diff" | "diff_b" | "w_norm" | "b_norm" | "set_weight" => Some("a whole difference of weights, not a LoRA"),
        "on_input" => Some("an (IA)³"),
        "bias" if key.contains("lora_") => Some("a LoRA with biases"),
        end if end.starts_with("hada_") => Some("a LoHa"),
        end if end.starts_with("lokr_") => Some("a LoKr"),
        end if end.starts_with("oft_") || end.starts_with("boft_") => Some("an OFT"),
        end if end.starts_with("ia3_") => Some("an (IA)³"),
        _ => None,
    }
}

/// What stands before modules' names, dots as underscores, and the part that it means.
const PREFIXES: &[(&str, Option<Part>)] = &[
    ("base_model_model_", None),
    ("lycoris_", None),
    ("lora_", None),
    ("unet_", Some(Part::UNet)),
    ("model_diffusion_model_", Some(Part::UNet)),
    ("diffusion_model_", Some(Part::UNet)),
    ("te_", Some(Part::Text(0))),
    ("te1_", Some(Part::Text(0))),
    ("te2_", Some(Part::Text(1))),
    ("text_encoder_2_", Some(Part::Text(1))),
    ("text_encoder_", Some(Part::Text(0))),
    ("text_encoders_clip_l_transformer_", Some(Part::Text(0))),
    ("text_encoders_clip_g_transformer_", Some(Part::Text(1))),
    ("text_model_", None),
];

/// The part that a module of a file belongs to, if it says so, and its name as [`Names`] has it.
pub(super) fn locate(module: &str) -> (Option<Part>, String) {
    let flat = flat(&module.replace(".processor.", "."));
    let (mut part, mut rest) = (None, flat.as_str());
    while let Some((end, of)) = PREFIXES.iter().find_map(|(prefix, of)| Some((rest.strip_prefix(prefix)?, *of))) {
        rest = end;
        part = part.or(of);
    }
    (part, rest.to_owned())
}

/// kohya's names have underscores for dots, which cannot be undone: so names are compared with underscores only.
fn flat(name: &str) -> String {
    name.replace('.', "_")
}

/// The model's matrices under all names that files have for them.
pub(super) struct Names(Vec<(Part, HashMap<String, String>)>);

impl Names {
    /// From the parts' own weights; `unet` knows the names of the original checkpoints.
    pub fn new(parts: &[(Part, &Weights)], unet: &Modules) -> Names {
        let table = |(part, weights): &(Part, &Weights)| {
            let mut table = HashMap::new();
            for name in weights.names() {
                // Norms are vectors; embeddings are looked up, not multiplied.
                let matrix = weights.shape(name).is_some_and(|shape| shape.len() >= 2);
                let Some(module) = name.strip_suffix(".weight") else { continue };
                if !matrix || module.starts_with("embeddings.") {
                    continue;
                }
                for alias in aliases(*part, module, unet) {
                    table.insert(flat(&alias), name.to_owned());
                }
            }
            (*part, table)
        };
        Names(parts.iter().map(table).collect())
    }

    /// The weight that a module of a file means: its part's index, and its canonical name.
    pub fn find(&self, module: &str) -> Option<(usize, &str)> {
        let (wanted, name) = locate(module);
        let texts = self.0.iter().filter(|(part, _)| *part != Part::UNet).count();
        let may = |part: Part| match wanted {
            Some(wanted) => part == wanted,
            // A text encoder's module that does not say whose it is can only be a single one's.
            None => part == Part::UNet || texts == 1,
        };
        let parts = self.0.iter().enumerate().filter(|(_, (part, _))| may(*part));
        parts.into_iter().find_map(|(at, (_, table))| Some((at, table.get(&name)?.as_str())))
    }
}

/// A module's canonical name and its others.
fn aliases(part: Part, module: &str, unet: &Modules) -> Vec<String> {
    let mut all = vec![module.to_owned()];
    if part == Part::UNet {
        all.push(unet.original(module));
        // diffusers before PEFT: to_out_lora
        all.extend(module.strip_suffix(".to_out.0").map(|attention| format!("{attention}.to_out")));
    } else if let Some((attention, "q_proj" | "k_proj" | "v_proj" | "out_proj")) = module.rsplit_once('.') {
        // The same for text encoders: to_q_lora for q_proj
        let which = module[attention.len() + 1..].trim_end_matches("_proj");
        all.push(format!("{attention}.to_{which}"));
    }
    all
}
