//! Records every op in every form that changes its kernel's text, on devices of every kind.

use std::collections::BTreeSet;

use pollster::block_on;
use scumble::gpu::noop::NoopProfile;
use scumble::gpu::{DType, Gpu, Graph, Tensor};
use scumble::ops::attention::{Attention, attention, attention_with_mass};
use scumble::ops::blend::{Kept, blend};
use scumble::ops::chain::{chain, fold as fold_layers};
use scumble::ops::conv2d::{Taps, conv2d, doubled, fold};
use scumble::ops::cross::{cross, fold as fold_context};
use scumble::ops::degrade::degrade;
use scumble::ops::fma::fma;
use scumble::ops::group_norm::{group_norm, group_norm_to_tiles};
use scumble::ops::guidance::{Degraded, guidance};
use scumble::ops::layer_norm::layer_norm;
use scumble::ops::levels::levels;
use scumble::ops::lincomb::{MAX_TERMS, lincomb};
use scumble::ops::matmul::{TYPES, matmul};
use scumble::ops::narrow::narrow;
use scumble::ops::pack::pack;
use scumble::ops::repack::{FileType, LowRank, Repack, repack};
use scumble::ops::repeat::repeat;
use scumble::ops::row_sums::{Normed, fold as fold_norm, folds};
use scumble::ops::take::take;
use scumble::ops::time_embedding::{Rows, time_embedding};
use scumble::ops::touch::touch;
use scumble::ops::winograd::{fits, fold as fold_taps, winograd};
use scumble::ops::{Activation, BiasRows, Conv, Epilogue, Linear, Norm, Param, tables};

/// Variants forced on a device, (op, variant).
type Forced = &'static [(&'static str, &'static str)];

/// None forced, so that the tables choose; then each variant's name, forced for every op that has one of it.
fn forced() -> Vec<Forced> {
    let tables = tables();
    let has =
        |op: &'static str, name| tables.iter().any(|(o, rows)| *o == op && rows.iter().any(|(row, _)| *row == name));
    let names: BTreeSet<&'static str> =
        tables.iter().flat_map(|(_, rows)| rows.iter().map(|(name, _)| *name)).collect();
    let set = |name| tables.iter().filter(|(op, _)| has(op, name)).map(|(op, _)| (*op, name)).collect::<Vec<_>>();
    // A profile is a constant, so what it refers to lives as long as the program.
    [Vec::new()].into_iter().chain(names.into_iter().map(set)).map(|set| &*set.leak()).collect()
}

/// Channels of a head in the models that we know, and the awkward ones that the kernel tests use.
const HEAD_DIMS: [u32; 10] = [4, 8, 12, 32, 40, 64, 80, 96, 160, 512];

fn profiles() -> [NoopProfile; 5] {
    use NoopProfile as P;
    [P::BROWSER, P::LAVAPIPE, P::LAVAPIPE_26, P::APPLE, P::H200]
}

/// Records every op in every form that changes its kernel's text.
struct Recorder<'a> {
    gpu: &'a Gpu,
    g: Graph,
    weights: DType,
}

impl Recorder<'_> {
    fn param(&self, dims: [u32; 4], dtype: DType) -> Param {
        let bytes = dims.iter().map(|&d| u64::from(d)).product::<u64>() * dtype.bytes();
        Param { buffer: block_on(self.gpu.storage("parameter", bytes)).expect("a small buffer"), dims, dtype }
    }

    fn linear(&self, k: u32, n: u32, bias: bool) -> Linear {
        let bias = bias.then(|| self.param([1, 1, 1, n], DType::F32));
        Linear { weight: self.param([1, 1, k, n], self.weights), bias }
    }

    fn norm(&self, channels: u32) -> Norm {
        let vector = || self.param([1, 1, 1, channels], DType::F32);
        Norm { gamma: vector(), beta: vector(), eps: 1e-5 }
    }

    fn input(&mut self, dims: [u32; 4]) -> Tensor {
        self.g.activation("input", dims)
    }

    /// Every bias, residual and output type, with one activation.
    fn epilogues(&mut self, activation: Activation, out: [u32; 4]) -> Vec<(bool, Epilogue)> {
        let rows = self.g.activation_f32("bias rows", [1, 1, 2, out[3] + 4]);
        let residual = self.input(out);
        let mut all = Vec::new();
        for (own_bias, bias_rows, residual) in
            [(false, None, None), (true, None, Some(residual)), (true, None, None), (false, Some(rows), Some(residual))]
        {
            let bias_rows = bias_rows.map(|tensor| BiasRows { tensor, offset: 4, rows: 9 });
            for f32_out in [false, true] {
                all.push((own_bias, Epilogue { activation, residual, bias_rows, f32_out, normed: None }));
            }
        }
        all
    }

    fn matmuls(&mut self) {
        use Activation as A;
        // What matrix units do not take, what one workgroup multiplies on them, and what several share.
        for depth in [12, 64, 2048] {
            let a = self.input([2, 1, 9, depth]);
            for activation in [A::None, A::Silu, A::Gelu, A::QuickGelu, A::Geglu] {
                let geglu = activation == A::Geglu;
                for (bias, epilogue) in self.epilogues(activation, [2, 1, 9, if geglu { 8 } else { 16 }]) {
                    // GEGLU has no residual: the halves meet in one output.
                    if !geglu || epilogue.residual.is_none() {
                        let layer = self.linear(depth, 16, bias);
                        matmul(&mut self.g, a, &layer, epilogue);
                    }
                }
            }
        }
    }

    fn convolutions(&mut self) {
        let sources = [[8, 4], [64, 32], [512, 256]].map(|c| c.map(|c| self.input([2, 3, 3, c])));
        let forms = sources.map(|[x, y]| [(1, x, None), (1, x, Some(y)), (3, x, None), (3, x, Some(y))]);
        for (kernel, x, second) in forms.into_iter().flatten() {
            let channels = x.channels() + second.map_or(0, |y: Tensor| y.channels());
            for (bias, epilogue) in self.epilogues(Activation::None, [2, 3, 3, 16]) {
                let Linear { weight, bias } = self.linear(kernel * kernel * channels, 16, bias);
                let layer = Conv { weight, bias, kernel };
                conv2d(&mut self.g, x, second, &layer, Taps::same(kernel), epilogue);
                if kernel == 3 && epilogue.residual.is_none() {
                    conv2d(&mut self.g, x, second, &layer, Taps::resized([6, 6]), epilogue);
                    conv2d(&mut self.g, x, second, &layer, Taps::half(), epilogue);
                    if let Some(folded) = fold(&mut self.g, &layer, 18).filter(|_| second.is_none()) {
                        doubled(&mut self.g, x, &layer, folded, epilogue);
                    }
                }
            }
        }
    }

    fn attentions(&mut self) {
        for d in HEAD_DIMS {
            let qkv = self.input([2, 1, 18, 2 * 3 * d]);
            for causal in [false, true] {
                let a = Attention { causal, ..Attention::fused(qkv, 2) };
                attention(&mut self.g, &a);
                attention_with_mass(&mut self.g, &a, 1);
            }
        }
        // One picture's, whose keys are shared where matrix units multiply, by many subgroups and by few.
        for (tokens, d) in [(4096, 40), (1024, 80)] {
            let qkv = self.input([1, 1, tokens, 8 * 3 * d]);
            attention(&mut self.g, &Attention::fused(qkv, 8));
        }
        // The VAE's.
        if self.gpu.caps().f16 {
            let whole = std::mem::replace(&mut self.g.operands, DType::F16);
            let qkv = self.input([1, 8, 8, 3 * 512]);
            attention(&mut self.g, &Attention::fused(qkv, 1));
            self.g.operands = whole;
        }
    }

    /// A prompt of one chunk, its projections folded into it where matrix units multiply.
    fn prompts(&mut self) {
        let kv = self.input([2, 1, 77, 128]);
        let (q, out) = (self.linear(64, 64, false), self.linear(64, 64, true));
        if let Some(folded) = fold_context(&mut self.g, &q, &out, kv, 2) {
            for tokens in [64, 70] {
                let [x, rest] = [0; 2].map(|_| self.input([2, 1, tokens, 64]));
                cross(&mut self.g, x, None, &folded, &out, rest);
            }
        }
    }

    /// Norms folded into the layers after them: of whole products and of shares, before whole products and shares, with GEGLU, before prompts.
    fn folded_norms(&mut self) {
        let gpu = self.gpu;
        if self.weights != DType::F16 || !folds(gpu.caps(), |op| gpu.forced_variant(op), self.g.dtype) {
            return;
        }
        let normed = |linear| Normed { norm: self.norm(64), linear, folded: true };
        let [qkv, up, q] =
            [self.linear(64, 192, true), self.linear(64, 512, true), self.linear(64, 64, true)].map(normed);
        fold_norm(&mut self.g, &qkv.norm, &qkv.linear);
        let (near, far) = (self.linear(64, 64, true), self.linear(1536, 64, true));
        let out = self.linear(64, 64, true);
        for layer in [&near, &far] {
            let before = self.input([2, 1, 66, layer.weight.dims[2]]);
            let of = |g: &mut Graph| matmul(g, before, layer, Epilogue::default());
            let x = of(&mut self.g);
            qkv.forward(&mut self.g, x, Epilogue::default());
            let x = of(&mut self.g);
            up.forward(&mut self.g, x, Epilogue::act(Activation::Geglu));
            let kv = self.input([2, 1, 77, 128]);
            if let Some(folded) = fold_context(&mut self.g, &q.linear, &out, kv, 2) {
                let x = of(&mut self.g);
                let sums = q.sums(&mut self.g, x);
                cross(&mut self.g, x, sums, &folded, &out, x);
            }
        }
        // Deep and narrow: shares.
        let wide = Normed { norm: self.norm(640), linear: self.linear(640, 64, true), folded: true };
        let (layer, before) = (self.linear(64, 640, true), self.input([1, 1, 66, 64]));
        let x = matmul(&mut self.g, before, &layer, Epilogue::default());
        wide.forward(&mut self.g, x, Epilogue::default());
        assert!(self.g.nodes().iter().all(|node| node.op != "layer_norm"), "a norm was not folded");
    }

    /// A feed-forward's end and the projection after it, as one where matrix units multiply.
    fn chains(&mut self) {
        let (first, second) = (self.linear(256, 64, true), self.linear(64, 64, true));
        if let Some(chained) = fold_layers(&mut self.g, &first, &second) {
            for tokens in [64, 70] {
                let [between, rest] = [0; 2].map(|_| self.input([2, 1, tokens, 64]));
                let x = self.input([2, 1, tokens, 256]);
                chain(&mut self.g, x, between, &chained, rest);
            }
        }
    }

    fn norms(&mut self) {
        let (x, y) = (self.input([2, 3, 3, 8]), self.input([2, 3, 3, 4]));
        for silu in [false, true] {
            let (one, two) = (self.norm(8), self.norm(12));
            group_norm(&mut self.g, x, None, &one, 4, silu);
            group_norm(&mut self.g, x, Some(y), &two, 4, silu);
        }
        // They end products that come in shares: of an image that one workgroup norms, and of one that many do.
        let (layer, norm) = (self.linear(1536, 64, true), self.norm(64));
        for size in [[1, 8, 8], [1, 32, 64]] {
            let [deep, residual] = [1536, 64].map(|channels| self.input([size[0], size[1], size[2], channels]));
            let x = matmul(&mut self.g, deep, &layer, Epilogue::add(residual));
            group_norm(&mut self.g, x, None, &norm, 4, true);
        }
        let norm = self.norm(8);
        layer_norm(&mut self.g, x, &norm);
        // It ends a product that comes in shares.
        let (deep, layer, norm) = (self.input([1, 1, 2048, 1536]), self.linear(1536, 64, true), self.norm(64));
        let residual = Some(self.input([1, 1, 2048, 64]));
        let x = matmul(&mut self.g, deep, &layer, Epilogue { residual, ..Default::default() });
        let x = layer_norm(&mut self.g, x, &norm);
        repeat(&mut self.g, x, 2);
    }

    /// Convolutions in Winograd's tiles after norms, of one source and of two: alone, of every epilogue, and ended by a norm.
    fn winograds(&mut self) {
        for ([h, w], channels) in [([8, 8], 64), ([32, 64], 64), ([8, 8], 1536), ([5, 8], 64)] {
            let Linear { weight, bias } = self.linear(9 * channels, 64, true);
            let layer = Conv { weight, bias, kernel: 3 };
            let Some(folded) = fold_taps(&mut self.g, &layer, [h, w]) else { continue };
            let (before, after) = (self.norm(channels), self.norm(64));
            for halves in [1, 2] {
                let x = self.input([2, h, w, channels / halves]);
                let y = (halves == 2).then(|| self.input([2, h, w, channels / 2]));
                let tiles = group_norm_to_tiles(&mut self.g, x, y, &before, 4, folded.tiles);
                let Some(tiles) = tiles.filter(|_| fits(&self.g, [2, h, w], &folded)) else { continue };
                for (bias, epilogue) in self.epilogues(Activation::None, [2, h, w, 64]) {
                    let epilogue =
                        Epilogue { bias_rows: epilogue.bias_rows.map(|b| BiasRows { rows: h * w, ..b }), ..epilogue };
                    let own = layer.bias.as_ref().filter(|_| bias);
                    winograd(&mut self.g, tiles, [2, h, w], (folded, own), epilogue);
                }
                let x = winograd(&mut self.g, tiles, [2, h, w], (folded, None), Epilogue::default());
                group_norm(&mut self.g, x, None, &after, 4, true);
            }
        }
    }

    /// The ops around the network: always f32.
    fn sampling(&mut self) {
        let f32s = |g: &mut Graph, dims| g.activation_f32("latents", dims);
        let (x, both) = (f32s(&mut self.g, [1, 5, 5, 4]), f32s(&mut self.g, [2, 5, 5, 4]));
        let (mass, mask) = (f32s(&mut self.g, [1, 1, 1, 4]), f32s(&mut self.g, [1, 1, 1, 28]));
        let (degraded, renoised) = degrade(&mut self.g, x, both, mass, [2, 2], mask);
        let out = f32s(&mut self.g, [1, 5, 5, 4]);
        for outputs in [x, both] {
            guidance(&mut self.g, x, outputs, None, out);
            guidance(&mut self.g, x, outputs, Some(Degraded { degraded, renoised, again: x }), out);
        }
        for terms in 1..=MAX_TERMS {
            lincomb(&mut self.g, out, &[x, degraded, renoised, x][..terms]);
        }
        pack(&mut self.g, x, None, 2);
        let more = f32s(&mut self.g, [1, 5, 5, 8]);
        pack(&mut self.g, x, Some(more), 2);
        let kept = Kept { mask, picture: x, noise: x };
        blend(&mut self.g, x, &kept, true, out);
        blend(&mut self.g, x, &kept, false, out);
        let (times, table) = (f32s(&mut self.g, [1, 1, 1, 4]), self.param([1, 1, 1, 8], DType::F32));
        let rows = Rows { calls: 2, given: 2, out: 2 };
        time_embedding(&mut self.g, times, &table, rows, true);
        time_embedding(&mut self.g, times, &table, rows, false);
        take(&mut self.g, x);
        let picture = f32s(&mut self.g, [1, 8, 8, 4]);
        levels(&mut self.g, picture);
        // The VAE's: f32 for products of f16.
        if self.g.dtype == DType::F32 && self.weights == DType::F16 {
            self.g.operands = DType::F16;
            narrow(&mut self.g, x);
            self.g.operands = DType::F32;
        }
        let factors = f32s(&mut self.g, [1, 1, 1, 256]);
        let dtype = self.g.dtype;
        fma(&mut self.g, factors, dtype, 64, 8);
    }

    /// What the loader runs: every type of a file to the type of these weights, with a LoRA and without.
    fn loading(&mut self) {
        let raw = self.g.activation_f32("raw", [1, 1, 1, 64]);
        let found = self.g.activation_f32("found", [1, 1, 1, 4]);
        let out = self.param([1, 1, 4, 8], self.weights).bind(&mut self.g);
        for file in [FileType::F32, FileType::F16, FileType::Bf16] {
            for lora in [None, Some(LowRank { up: raw, down: raw, rank: 2 })] {
                let r = Repack { file, base: 0, n: 8, c: 4, taps: 1, first: 0, geglu: true, slot: 0 };
                repack(&mut self.g, raw, out, found, &r, lora);
            }
        }
    }
}

/// Every op of every device kind, forced variant and element type.
pub fn recordings() -> Vec<Graph> {
    let mut graphs = Vec::new();
    for profile in profiles() {
        for variants in forced() {
            let gpu = block_on(Gpu::noop(&NoopProfile { variants, ..profile.clone() })).expect("the noop device");
            // An output type of f32 whatever the input's is an epilogue's choice, and recorded with the epilogues.
            for &(a, b, _) in TYPES {
                if !profile.f16 && (a == DType::F16 || b == DType::F16) {
                    continue;
                }
                let mut recorder = Recorder { gpu: &gpu, g: Graph::new(&gpu, a), weights: b };
                recorder.matmuls();
                recorder.convolutions();
                recorder.attentions();
                recorder.prompts();
                recorder.chains();
                recorder.folded_norms();
                recorder.norms();
                recorder.winograds();
                recorder.sampling();
                recorder.loading();
                touch(&mut recorder.g);
                graphs.push(recorder.g);
            }
        }
    }
    graphs
}
