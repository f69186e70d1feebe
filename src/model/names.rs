//! Names of parameters: the layout of the original checkpoints (CompVis, Stability AI, OpenCLIP) to diffusers' and transformers',
//! which are the canonical ones here.

use std::collections::HashMap;

use super::config::UNetConfig;
use crate::weights::{Slice, Weights};

/// Prefixes of modules, in one layout and in the other; both without a dot at the end.
pub struct Modules(Vec<(String, String)>);

impl Modules {
    /// The modules of a UNet, (original, canonical), down to where the layouts agree.
    pub fn unet(config: &UNetConfig) -> Modules {
        let mut all = Modules(Vec::new());
        for (theirs, ours) in [
            ("time_embed.0", "time_embedding.linear_1"),
            ("time_embed.2", "time_embedding.linear_2"),
            ("label_emb.0.0", "add_embedding.linear_1"),
            ("label_emb.0.2", "add_embedding.linear_2"),
            ("input_blocks.0.0", "conv_in"),
            ("out.0", "conv_norm_out"),
            ("out.2", "conv_out"),
            ("middle_block.1", "mid_block.attentions.0"),
        ] {
            all.add(theirs, ours);
        }
        all.resnet("middle_block.0", "mid_block.resnets.0");
        all.resnet("middle_block.2", "mid_block.resnets.1");
        let last = config.levels.len() - 1;
        let mut block = 1;
        for (i, level) in config.levels.iter().enumerate() {
            for j in 0..level.layers {
                all.resnet(&format!("input_blocks.{block}.0"), &format!("down_blocks.{i}.resnets.{j}"));
                all.add(format!("input_blocks.{block}.1"), format!("down_blocks.{i}.attentions.{j}"));
                block += 1;
            }
            if i < last {
                all.add(format!("input_blocks.{block}.0.op"), format!("down_blocks.{i}.downsamplers.0.conv"));
                block += 1;
            }
        }
        let mut block = 0;
        for (i, level) in config.levels.iter().rev().enumerate() {
            for j in 0..=level.layers {
                all.resnet(&format!("output_blocks.{block}.0"), &format!("up_blocks.{i}.resnets.{j}"));
                let attends = level.up_depth.is_some();
                if attends {
                    all.add(format!("output_blocks.{block}.1"), format!("up_blocks.{i}.attentions.{j}"));
                }
                if j == level.layers && i < last {
                    let at = 1 + usize::from(attends);
                    all.add(format!("output_blocks.{block}.{at}.conv"), format!("up_blocks.{i}.upsamplers.0.conv"));
                }
                block += 1;
            }
        }
        all
    }

    /// The modules of an autoencoder with that many levels.
    pub fn vae(levels: usize) -> Modules {
        let mut all = Modules(Vec::new());
        for side in ["encoder", "decoder"] {
            for (theirs, ours) in [("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1")] {
                all.add(format!("{side}.{theirs}"), format!("{side}.{ours}"));
            }
            for (theirs, ours) in
                [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]
            {
                all.add(format!("{side}.mid.attn_1.{theirs}"), format!("{side}.mid_block.attentions.0.{ours}"));
            }
            all.add(format!("{side}.norm_out"), format!("{side}.conv_norm_out"));
        }
        for i in 0..levels {
            let up = levels - 1 - i;
            all.add(
                format!("encoder.down.{i}.downsample.conv"),
                format!("encoder.down_blocks.{i}.downsamplers.0.conv"),
            );
            all.add(format!("decoder.up.{up}.upsample.conv"), format!("decoder.up_blocks.{i}.upsamplers.0.conv"));
            // Real ones have two or three blocks a level.
            for j in 0..8 {
                for (theirs, ours) in [
                    (format!("encoder.down.{i}.block.{j}"), format!("encoder.down_blocks.{i}.resnets.{j}")),
                    (format!("decoder.up.{up}.block.{j}"), format!("decoder.up_blocks.{i}.resnets.{j}")),
                ] {
                    all.add(format!("{theirs}.nin_shortcut"), format!("{ours}.conv_shortcut"));
                    all.add(theirs, ours);
                }
            }
        }
        all
    }

    fn add(&mut self, theirs: impl Into<String>, ours: impl Into<String>) {
        self.0.push((theirs.into(), ours.into()));
    }

    fn resnet(&mut self, theirs: &str, ours: &str) {
        for (a, b) in [
            ("in_layers.0", "norm1"),
            ("in_layers.2", "conv1"),
            ("out_layers.0", "norm2"),
            ("out_layers.3", "conv2"),
            ("emb_layers.1", "time_emb_proj"),
            ("skip_connection", "conv_shortcut"),
        ] {
            self.add(format!("{theirs}.{a}"), format!("{ours}.{b}"));
        }
    }

    /// The original name of a canonical one (a parameter's or a module's); the name itself where the layouts agree.
    pub fn original(&self, name: &str) -> String {
        let longest = self.0.iter().map(|(_, ours)| ours.len()).max().unwrap_or(0);
        replace(name, longest, |prefix| {
            self.0.iter().find(|(_, ours)| ours == prefix).map(|(theirs, _)| theirs.as_str())
        })
    }

    /// Weights in the original layout under their canonical names.
    pub(crate) fn canonical(&self, weights: &Weights) -> Weights {
        let table: HashMap<&str, &str> = self.0.iter().map(|(theirs, ours)| (theirs.as_str(), ours.as_str())).collect();
        let longest = table.keys().map(|name| name.len()).max().unwrap_or(0);
        weights.renamed(|name| vec![(replace(name, longest, |prefix| table.get(prefix).copied()), Slice::Whole)])
    }
}

/// `name` with its longest prefix that `find` knows replaced; prefixes end at dots, `find` knows none longer than `longest`.
fn replace<'a>(name: &str, longest: usize, find: impl Fn(&str) -> Option<&'a str>) -> String {
    // A name of a million dots must not cost time by the square.
    let mut end = match name.as_bytes().get(..=longest) {
        None => name.len(),
        Some(start) => match start.iter().rposition(|&byte| byte == b'.') {
            Some(dot) => dot,
            None => return name.to_owned(),
        },
    };
    loop {
        if let Some(new) = find(&name[..end]) {
            return format!("{new}{}", &name[end..]);
        }
        match name[..end].rfind('.') {
            Some(dot) => end = dot,
            None => return name.to_owned(),
        }
    }
}

/// Tensors whose names begin with `prefix`, without it.
pub(crate) fn below(weights: &Weights, prefix: &str) -> Weights {
    weights.renamed(|name| match name.strip_prefix(prefix) {
        Some(rest) => vec![(rest.to_owned(), Slice::Whole)],
        None => vec![],
    })
}

/// A text model of OpenCLIP under transformers' names: q, k and v are thirds of one matrix, the projection lies transposed.
pub(crate) fn open_clip(weights: &Weights) -> Weights {
    weights.renamed(|name| {
        let one = |new: String| vec![(new, Slice::Whole)];
        match name {
            "positional_embedding" => return one("embeddings.position_embedding.weight".into()),
            "token_embedding.weight" => return one("embeddings.token_embedding.weight".into()),
            "text_projection" => return vec![("text_projection.weight".into(), Slice::Transposed)],
            "text_projection.weight" => return one(name.into()),
            "ln_final.weight" => return one("final_layer_norm.weight".into()),
            "ln_final.bias" => return one("final_layer_norm.bias".into()),
            _ => {}
        }
        let Some((layer, rest)) = name.strip_prefix("transformer.resblocks.").and_then(|n| n.split_once('.')) else {
            return vec![];
        };
        let ours = format!("encoder.layers.{layer}");
        if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
            let third = |(i, w)| (format!("{ours}.self_attn.{w}_proj.{kind}"), Slice::Block(i, 3));
            return ["q", "k", "v"].into_iter().enumerate().map(third).collect();
        }
        for (theirs, new) in [
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ] {
            if let Some(end) = rest.strip_prefix(theirs) {
                return one(format!("{ours}.{new}{end}"));
            }
        }
        vec![]
    })
}

/// A text model of transformers without the prefix that older versions gave it.
pub fn transformers_clip(weights: &Weights) -> Weights {
    weights.renamed(|name| vec![(name.strip_prefix("text_model.").unwrap_or(name).to_owned(), Slice::Whole)])
}
