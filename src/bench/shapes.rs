//! The heavy ops of a forward of SD 1.5's and SDXL's UNets and of the VAE's decoder, found by walking their numbers as the networks do.

use std::collections::BTreeMap;

/// One op at one size; all sizes are of one image, channels last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "op")]
pub enum Case {
    /// A product with weights, [m, k] by [k, n].
    Linear {
        /// Rows of an image.
        m: u32,
        /// Columns of the weights.
        n: u32,
        /// Depth.
        k: u32,
        /// Half of the columns gate the other half.
        geglu: bool,
    },
    /// A convolution of [h, w, c + c2] to n channels.
    Conv {
        /// Height of the input.
        h: u32,
        /// Width of the input.
        w: u32,
        /// Channels of the first source.
        c: u32,
        /// Of the second; 0 for none.
        c2: u32,
        /// Channels of the output.
        n: u32,
        /// Taps a side.
        kernel: u32,
        /// Of the output.
        stride: u32,
        /// After doubling by nearest neighbour.
        doubled: bool,
    },
    /// Group norm, SiLU and a 3x3 convolution of [h, w, c] to n channels, as residual blocks run them: in Winograd's tiles where those should be
    /// faster.
    Normed {
        /// Height.
        h: u32,
        /// Width.
        w: u32,
        /// Channels.
        c: u32,
        /// Channels of the output.
        n: u32,
    },
    /// Attention of `tokens` to `keys`.
    Attention {
        /// Queries.
        tokens: u32,
        /// Keys.
        keys: u32,
        /// Heads.
        heads: u32,
        /// Channels of a head.
        d: u32,
        /// Keys are the tokens' own, in one tensor with queries and values.
        own: bool,
    },
    /// Group norm and SiLU over [pixels, c + c2], 32 groups.
    GroupNorm {
        /// Pixels.
        pixels: u32,
        /// Channels of the first source.
        c: u32,
        /// Of the second; 0 for none.
        c2: u32,
        /// Followed by SiLU.
        silu: bool,
    },
    /// Layer norm of [tokens, c].
    LayerNorm {
        /// Rows.
        tokens: u32,
        /// Channels.
        c: u32,
    },
}

impl Case {
    /// Floating-point operations for one image, as the definition has them: a convolution counts all nine taps, and nothing of the norm before it.
    pub fn flops(&self) -> u64 {
        let product = |factors: &[u32]| factors.iter().map(|&f| u64::from(f)).product::<u64>();
        match *self {
            Case::Linear { m, n, k, .. } => 2 * product(&[m, n, k]),
            Case::Conv { h, w, c, c2, n, kernel, stride, doubled } => {
                let [h, w] = [h, w].map(|s| if doubled { 2 * s } else { s.div_ceil(stride) });
                2 * product(&[h, w, n, kernel * kernel, c + c2])
            }
            Case::Normed { h, w, c, n } => 18 * product(&[h, w, c, n]),
            Case::Attention { tokens, keys, heads, d, .. } => 4 * product(&[tokens, keys, heads, d]),
            Case::GroupNorm { pixels, c, c2, .. } => 5 * product(&[pixels, c + c2]),
            Case::LayerNorm { tokens, c } => 7 * product(&[tokens, c]),
        }
    }

    /// Elements that are read and written at least once for `batch` images: activations, and weights.
    pub fn elements(&self, batch: u32) -> [u64; 2] {
        let product = |factors: &[u32]| factors.iter().map(|&f| u64::from(f)).product::<u64>();
        match *self {
            Case::Linear { m, n, k, geglu } => {
                [product(&[batch, m, k]) + product(&[batch, m, if geglu { n / 2 } else { n }]), product(&[k, n])]
            }
            Case::Conv { h, w, c, c2, n, kernel, stride, doubled } => {
                let [oh, ow] = [h, w].map(|s| if doubled { 2 * s } else { s.div_ceil(stride) });
                let moved = product(&[batch, h, w, c + c2]) + product(&[batch, oh, ow, n]);
                [moved, product(&[kernel * kernel, c + c2, n])]
            }
            Case::Normed { h, w, c, n } => [product(&[batch, h, w, c + n]), product(&[9, c, n])],
            Case::Attention { tokens, keys, heads, d, .. } => {
                [2 * product(&[batch, tokens, heads, d]) + 2 * product(&[batch, keys, heads, d]), 0]
            }
            Case::GroupNorm { pixels, c, c2, .. } => [2 * product(&[batch, pixels, c + c2]), 0],
            Case::LayerNorm { tokens, c } => [2 * product(&[batch, tokens, c]), 0],
        }
    }

    /// In words: `conv2d 3x3 320+0 to 320 at 64x64`.
    pub fn name(&self) -> String {
        match *self {
            Case::Linear { m, n, k, geglu } => format!("linear{} {m}x{n}x{k}", if geglu { " geglu" } else { "" }),
            Case::Conv { h, w, c, c2, n, kernel, stride, doubled } => {
                let from = if c2 > 0 { format!("{c}+{c2}") } else { c.to_string() };
                let how = match (stride, doubled) {
                    (_, true) => " doubled",
                    (2, _) => " stride 2",
                    _ => "",
                };
                format!("conv {kernel}x{kernel}{how} {from}->{n} at {h}x{w}")
            }
            Case::Normed { h, w, c, n } => format!("norm silu conv 3x3 {c}->{n} at {h}x{w}"),
            Case::Attention { tokens, keys, heads, d, .. } => format!("attention {tokens} to {keys}, {heads}x{d}"),
            Case::GroupNorm { pixels, c, c2, silu } => {
                format!("group norm{} {}x{pixels}", if silu { " silu" } else { "" }, c + c2)
            }
            Case::LayerNorm { tokens, c } => format!("layer norm {c}x{tokens}"),
        }
    }
}

/// A network at one size: its ops, and how often a forward of one image runs each.
pub struct Network {
    /// Its name, as `--shapes` takes it.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// The ops.
    pub cases: Vec<(Case, u32)>,
    /// Images of a call: 2 for a UNet under CFG.
    pub batch: u32,
}

/// All networks that are measured.
pub fn networks() -> Vec<Network> {
    let sd15 =
        Unet { channels: &[320, 640, 1280, 1280], depths: &[1, 1, 1, 0], mid: 1, heads: Heads::Of(8), cross: 768 };
    let sdxl = Unet { channels: &[320, 640, 1280], depths: &[0, 2, 10], mid: 10, heads: Heads::Wide(64), cross: 2048 };
    vec![
        Network { name: "sd15", title: "SD 1.5 UNet, 512x512", cases: sd15.cases([64, 64]), batch: 2 },
        Network { name: "sdxl", title: "SDXL UNet, 1024x1024", cases: sdxl.cases([128, 128]), batch: 2 },
        Network { name: "vae", title: "VAE decoder, 512x512", cases: decoder([64, 64]), batch: 1 },
    ]
}

enum Heads {
    /// So many at every level.
    Of(u32),
    /// As many as the channels have of this width.
    Wide(u32),
}

struct Unet {
    channels: &'static [u32],
    depths: &'static [u32],
    mid: u32,
    heads: Heads,
    cross: u32,
}

/// Tokens of a prompt.
const TOKENS: u32 = 77;

#[derive(Default)]
struct Walk(BTreeMap<Case, u32>);

impl Walk {
    fn add(&mut self, case: Case) {
        *self.0.entry(case).or_default() += 1;
    }

    fn conv(&mut self, [h, w]: [u32; 2], [c, c2]: [u32; 2], n: u32, kernel: u32) {
        self.add(Case::Conv { h, w, c, c2, n, kernel, stride: 1, doubled: false });
    }

    fn linear(&mut self, m: u32, n: u32, k: u32) {
        self.add(Case::Linear { m, n, k, geglu: false });
    }

    fn resnet(&mut self, size: [u32; 2], [c, c2]: [u32; 2], n: u32) {
        let pixels = size[0] * size[1];
        self.add(Case::GroupNorm { pixels, c, c2, silu: true });
        self.conv(size, [c + c2, 0], n, 3);
        self.add(Case::GroupNorm { pixels, c: n, c2: 0, silu: true });
        self.conv(size, [n, 0], n, 3);
        // Both once more, as they run together.
        for c in [c + c2, n] {
            self.add(Case::Normed { h: size[0], w: size[1], c, n });
        }
        if c + c2 != n {
            self.conv(size, [c, c2], n, 1);
        }
    }

    fn transformer(&mut self, [h, w]: [u32; 2], c: u32, heads: u32, depth: u32, cross: u32) {
        let (m, d) = (h * w, c / heads);
        self.add(Case::GroupNorm { pixels: m, c, c2: 0, silu: false });
        self.linear(m, c, c);
        for _ in 0..depth {
            for _ in 0..3 {
                self.add(Case::LayerNorm { tokens: m, c });
            }
            self.linear(m, 3 * c, c);
            self.add(Case::Attention { tokens: m, keys: m, heads, d, own: true });
            self.linear(m, c, c);
            self.linear(m, c, c);
            // Once for a prompt, not for a step.
            self.linear(TOKENS, 2 * c, cross);
            self.add(Case::Attention { tokens: m, keys: TOKENS, heads, d, own: false });
            self.linear(m, c, c);
            self.add(Case::Linear { m, n: 8 * c, k: c, geglu: true });
            self.linear(m, c, 4 * c);
        }
        self.linear(m, c, c);
    }

    fn cases(self) -> Vec<(Case, u32)> {
        self.0.into_iter().collect()
    }
}

impl Unet {
    fn heads(&self, channels: u32) -> u32 {
        match self.heads {
            Heads::Of(heads) => heads,
            Heads::Wide(d) => channels / d,
        }
    }

    fn cases(&self, [h, w]: [u32; 2]) -> Vec<(Case, u32)> {
        let mut walk = Walk::default();
        let size = |level: usize| [h >> level, w >> level];
        let (channels, last) = (self.channels, self.channels.len() - 1);
        let mut c = channels[0];
        walk.conv([h, w], [4, 0], c, 3);
        let mut skips = vec![c];
        for (level, &n) in channels.iter().enumerate() {
            for _ in 0..2 {
                walk.resnet(size(level), [c, 0], n);
                c = n;
                self.attend(&mut walk, level, size(level), c);
                skips.push(c);
            }
            if level < last {
                let [h, w] = size(level);
                walk.add(Case::Conv { h, w, c, c2: 0, n: c, kernel: 3, stride: 2, doubled: false });
                skips.push(c);
            }
        }
        walk.resnet(size(last), [c, 0], c);
        walk.transformer(size(last), c, self.heads(c), self.mid, self.cross);
        walk.resnet(size(last), [c, 0], c);
        for (level, &n) in channels.iter().enumerate().rev() {
            for _ in 0..3 {
                walk.resnet(size(level), [c, skips.pop().unwrap_or(0)], n);
                c = n;
                self.attend(&mut walk, level, size(level), c);
            }
            if level > 0 {
                let [h, w] = size(level);
                walk.add(Case::Conv { h, w, c, c2: 0, n: c, kernel: 3, stride: 1, doubled: true });
            }
        }
        walk.add(Case::GroupNorm { pixels: h * w, c, c2: 0, silu: true });
        walk.conv([h, w], [c, 0], 4, 3);
        walk.cases()
    }

    fn attend(&self, walk: &mut Walk, level: usize, size: [u32; 2], c: u32) {
        if self.depths[level] > 0 {
            walk.transformer(size, c, self.heads(c), self.depths[level], self.cross);
        }
    }
}

/// The decoder of both models' VAEs, for latents of [h, w].
fn decoder([h, w]: [u32; 2]) -> Vec<(Case, u32)> {
    let mut walk = Walk::default();
    let channels = [512, 512, 256, 128];
    let (mut c, m) = (512, h * w);
    walk.conv([h, w], [4, 0], c, 3);
    walk.resnet([h, w], [c, 0], c);
    walk.add(Case::GroupNorm { pixels: m, c, c2: 0, silu: false });
    walk.linear(m, 3 * c, c);
    walk.add(Case::Attention { tokens: m, keys: m, heads: 1, d: c, own: true });
    walk.linear(m, c, c);
    walk.resnet([h, w], [c, 0], c);
    for (level, n) in channels.into_iter().enumerate() {
        let size @ [h, w] = [h << level, w << level];
        for _ in 0..3 {
            walk.resnet(size, [c, 0], n);
            c = n;
        }
        if level < 3 {
            walk.add(Case::Conv { h, w, c, c2: 0, n: c, kernel: 3, stride: 1, doubled: true });
        }
    }
    walk.add(Case::GroupNorm { pixels: 64 * m, c, c2: 0, silu: true });
    walk.conv([8 * h, 8 * w], [c, 0], 4, 3);
    walk.cases()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A forward's FLOPs as they were counted elsewhere, without norms (the fourth channel of pictures is ours).
    #[test]
    fn a_forward_has_the_flops_that_others_count() {
        let expected = [("sd15", 0.803e12), ("sdxl", 6.76e12), ("vae", 2.515e12)];
        for (network, (name, flops)) in networks().iter().zip(expected) {
            let other =
                |case: &Case| matches!(case, Case::GroupNorm { .. } | Case::LayerNorm { .. } | Case::Normed { .. });
            let heavy = |case: &Case| !other(case);
            let cases = network.cases.iter().filter(|(case, _)| heavy(case));
            let sum: u64 = cases.map(|(case, count)| case.flops() * u64::from(*count)).sum();
            assert_eq!(network.name, name);
            assert!((sum as f64 / flops - 1.0).abs() < 0.01, "{name}: {sum:e}, expected {flops:e}");
        }
    }
}
