//! Rung 1, without a GPU: every kernel that the ops can ask for composes, validates, and is written for every driver, and
//! its bindings and uniforms are those that the Rust side fills.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, StorageAccess, TypeInner};
use pollster::block_on;
use scumble::denoiser::Step;
use scumble::gpu::graph::Node;
use scumble::gpu::kernel::{Dialect, Kernel, Value};
use scumble::gpu::noop::NoopProfile;
use scumble::gpu::{DType, Gpu, Graph, Tensor};
use scumble::ops::attention::{Attention, attention, attention_with_mass};
use scumble::ops::blend::{Kept, blend};
use scumble::ops::chain::{chain, fold as fold_layers};
use scumble::ops::conv2d::{Taps, conv2d, doubled, fold};
use scumble::ops::cross::{cross, fold as fold_context};
use scumble::ops::degrade::degrade;
use scumble::ops::fma::fma;
use scumble::ops::group_norm::{ENDING as NORM_ENDING, group_norm};
use scumble::ops::guidance::{Degraded, guidance};
use scumble::ops::layer_norm::{ENDING, layer_norm};
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

/// The fields of the host's `Step`, word by word, as the kernels spell them.
const STEP: [&str; 13] = [
    "call",
    "c_in",
    "c_skip",
    "c_out",
    "sigma",
    "cfg",
    "sag_scale",
    "threshold",
    "blur0",
    "blur1",
    "blur2",
    "blur3",
    "blur4",
];

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
fn recordings() -> Vec<Graph> {
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
                recorder.sampling();
                recorder.loading();
                touch(&mut recorder.g);
                graphs.push(recorder.g);
            }
        }
    }
    graphs
}

/// The nodes of `graphs`, one for each different text.
fn nodes(graphs: &[Graph]) -> BTreeMap<String, &Node> {
    let nodes = graphs.iter().flat_map(Graph::nodes);
    nodes.map(|node| (node.kernel.compose(Dialect::Naga), node)).collect()
}

/// A node in words, for messages.
fn name(node: &Node) -> String {
    format!("{} {}/{} {:?}", node.kernel.source.path, node.op, node.variant, node.kernel.head)
}

fn uses_f16(kernel: &Kernel) -> bool {
    kernel.head.iter().any(|(_, value)| matches!(value, Value::Type(text) if text.contains("f16")))
}

fn parse(text: &str, node: &Node) -> naga::Module {
    naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{}: {}", name(node), e.emit_to_string(text)))
}

#[test]
fn every_kernel_validates_and_is_written_for_every_driver() {
    let graphs = recordings();
    let nodes = nodes(&graphs);
    assert!(nodes.len() > 300, "only {} different kernels", nodes.len());
    for variant in ["merge", ENDING] {
        assert!(nodes.values().any(|node| node.variant == variant), "no {variant} among them");
    }
    for whole in [0, 1] {
        let ends = |node: &&&Node| {
            node.variant == NORM_ENDING
                && node
                    .kernel
                    .head
                    .iter()
                    .any(|(name, value)| *name == "WHOLE" && matches!(value, Value::U32(n) if *n == whole))
        };
        assert!(nodes.values().any(|node| ends(&node)), "no group norm of shares among them, WHOLE: {whole}");
    }
    for value in ["NORMED", "SUMMED", "BIASED"] {
        let with = nodes.values().filter(|node| node.kernel.head.iter().any(|(name, _)| *name == value));
        assert!(with.count() > 0, "no kernels with {value} among them");
    }
    for (text, node) in &nodes {
        let module = parse(text, node);
        // unpack2x16float is core WGSL; wgpu grants it on all but old GLES.
        let mut capabilities = Capabilities::default() | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        capabilities.set(Capabilities::SHADER_FLOAT16, uses_f16(&node.kernel));
        capabilities.set(Capabilities::SUBGROUP, text.contains("subgroup"));
        let matrices = text.contains("coop_mat");
        // Asked for together: Caps::coop is empty where subgroups cannot wait for one another's lanes.
        capabilities.set(Capabilities::COOPERATIVE_MATRIX | Capabilities::SUBGROUP_BARRIER, matrices);
        let validated = Validator::new(ValidationFlags::all(), capabilities).validate(&module);
        let info = validated.unwrap_or_else(|e| panic!("{}: {}", name(node), e.emit_to_string(text)));
        write_spirv(&module, &info).unwrap_or_else(|e| panic!("{}: SPIR-V: {e}", name(node)));
        write_metal(&module, &info).unwrap_or_else(|e| panic!("{}: MSL: {e}", name(node)));
        // DX12 has no matrix units in WGSL's reach; `Caps::coop` never says that it has.
        if !matrices {
            write_hlsl(&module, &info).unwrap_or_else(|e| panic!("{}: HLSL: {e}", name(node)));
        }
    }
}

fn write_spirv(module: &naga::Module, info: &naga::valid::ModuleInfo) -> Result<Vec<u32>, naga::back::spv::Error> {
    use naga::back::spv::{Options, PipelineOptions, write_vec};
    let entry = PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    // Subgroup operations came with 1.3, that is Vulkan 1.1.
    let options = Options { lang_version: (1, 3), ..Default::default() };
    write_vec(module, info, &options, Some(&entry))
}

fn write_metal(module: &naga::Module, info: &naga::valid::ModuleInfo) -> Result<String, naga::back::msl::Error> {
    use naga::back::msl::{Options, PipelineOptions, write_string};
    let options = Options { lang_version: (2, 4), ..Default::default() };
    write_string(module, info, &options, &PipelineOptions::default()).map(|(text, _)| text)
}

fn write_hlsl(module: &naga::Module, info: &naga::valid::ModuleInfo) -> Result<String, naga::back::hlsl::Error> {
    use naga::back::hlsl::{Options, PipelineOptions, ShaderModel, Writer};
    // f16 needs 6.2; wgpu asks for what DXC offers.
    let options = Options { shader_model: ShaderModel::V6_2, ..Default::default() };
    let mut text = String::new();
    Writer::new(&mut text, &options, &PipelineOptions::default()).write(module, info, None)?;
    Ok(text)
}

#[test]
fn bindings_and_uniforms_are_those_that_the_host_fills() {
    let graphs = recordings();
    for (text, node) in nodes(&graphs) {
        let module = parse(&text, node);
        let (mut storage, mut uniforms) = (BTreeMap::new(), BTreeMap::new());
        for (_, global) in module.global_variables.iter() {
            let Some(binding) = &global.binding else { continue };
            let at = (binding.group, binding.binding);
            match global.space {
                AddressSpace::Storage { access } => drop(storage.insert(at, access)),
                AddressSpace::Uniform => drop(uniforms.insert(at, words(&module, global.ty, node))),
                other => panic!("{}: a binding in {other:?}", name(node)),
            }
        }
        let reads = std::iter::repeat_n(StorageAccess::LOAD, node.reads.len());
        let writes = std::iter::repeat_n(StorageAccess::LOAD | StorageAccess::STORE, node.writes.len());
        let expected: BTreeMap<_, _> = reads.chain(writes).zip(0..).map(|(access, i)| ((0, i), access)).collect();
        assert_eq!(storage, expected, "{}: storage bindings", name(node));

        let dims = uniforms.remove(&(0, expected.len() as u32));
        let dims = dims.unwrap_or_else(|| panic!("{}: no dims after the storage bindings", name(node)));
        assert_eq!(dims.len(), node.dims.len(), "{}: Dims {dims:?}", name(node));

        let step = uniforms.remove(&(1, 0));
        assert_eq!(step.is_some(), node.step, "{}: group 1", name(node));
        if let Some(fields) = step {
            // lincomb's coefficients are four floats; all others read the scalars of a model call.
            let own: &[&str] = if node.op == "lincomb" { &["c0", "c1", "c2", "c3"] } else { &STEP };
            assert_eq!(fields, own, "{}: step scalars", name(node));
        }
        assert!(uniforms.is_empty(), "{}: more uniforms {uniforms:?}", name(node));
    }
    assert_eq!(size_of::<Step>(), 4 * STEP.len());
}

/// The field names of a uniform struct, each of which must be one 4-byte scalar.
fn words(module: &naga::Module, ty: naga::Handle<naga::Type>, node: &Node) -> Vec<String> {
    let TypeInner::Struct { members, span } = &module.types[ty].inner else {
        panic!("{}: a uniform that is no struct", name(node))
    };
    assert_eq!(*span as usize, 4 * members.len(), "{}: padding in a uniform", name(node));
    for member in members {
        let scalar = matches!(&module.types[member.ty].inner, TypeInner::Scalar(scalar) if scalar.width == 4);
        assert!(scalar, "{}: {:?} is no 4-byte scalar", name(node), member.name);
    }
    members.iter().map(|member| member.name.clone().unwrap_or_default()).collect()
}

#[test]
fn the_browsers_text_differs_in_its_first_line_only() {
    let graphs = recordings();
    for (text, node) in nodes(&graphs) {
        let browser = node.kernel.compose(Dialect::Browser);
        assert_eq!(text.lines().count(), browser.lines().count(), "{}: lines", name(node));
        assert!(text.lines().skip(1).eq(browser.lines().skip(1)), "{}: lines after the first", name(node));
        assert!(!browser.lines().skip(1).any(|line| line.contains("enable ")), "{}: a late enable", name(node));
        let first = browser.lines().next().unwrap_or_default();
        assert_eq!(first.contains("enable f16;"), uses_f16(&node.kernel), "{}: {first}", name(node));
        assert!(first.ends_with(node.kernel.source.text.lines().next().unwrap_or_default()), "{}: {first}", name(node));
        if !first.contains("enable subgroups;") {
            parse(&browser, node);
        }
        // A compiler's line is the file's line, up to loops written out: only declarations of head names may differ.
        let plain = node.kernel.source.text.lines().take_while(|line| !line.trim_start().starts_with("//: "));
        for (own, composed) in plain.zip(browser.lines()).skip(1) {
            let head = own.starts_with("const ") || own.starts_with("alias ");
            assert!(own == composed || head, "{}: {own:?} became {composed:?}", name(node));
        }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files under `folder` whose name ends in `.ext`, sorted.
fn files(folder: &Path, ext: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder of the repository") {
        let path = entry.expect("a folder entry").path();
        if path.is_dir() {
            found.extend(files(&path, ext));
        } else if path.extension().is_some_and(|e| e == ext) {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn no_kernel_file_is_dead() {
    let graphs = recordings();
    let mut reached = BTreeSet::new();
    for node in graphs.iter().flat_map(Graph::nodes) {
        reached.insert(node.kernel.source.path);
        reached.extend(node.kernel.source.libs.iter().map(|(path, _)| *path));
        reached.extend(node.kernel.libs.iter().map(|lib| lib.path));
    }
    let folder = root().join("kernels");
    let paths = files(&folder, "wgsl");
    let relative = paths
        .iter()
        .map(|path| path.strip_prefix(&folder).expect("under kernels/").to_string_lossy().replace('\\', "/"));
    let there: BTreeSet<String> = relative.collect();
    assert_eq!(
        there,
        reached.iter().map(|path| (*path).to_owned()).collect(),
        "kernel files, and those that ops can reach"
    );
}

#[test]
fn every_kernel_file_opens_with_its_sentence() {
    for path in files(&root().join("kernels"), "wgsl") {
        let text = std::fs::read_to_string(&path).expect("a kernel file");
        let opening: String = text.lines().take_while(|line| line.starts_with("//")).collect();
        assert!(opening.starts_with("// ") && opening.contains('.'), "{}: opens with {opening:?}", path.display());
    }
}

/// story → ops → gpu → wgpu, read off the `use`s and paths.
#[test]
fn arrows_go_one_way() {
    let src = root().join("src");
    for path in files(&src, "rs") {
        let text = std::fs::read_to_string(&path).expect("a source file");
        assert!(text.starts_with("//! "), "{}: opens without its sentence", path.display());
        let layer =
            path.strip_prefix(&src).expect("under src/").iter().next().expect("a name").to_string_lossy().into_owned();
        for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            let here = format!("{}:{}: {}", path.display(), at + 1, line.trim());
            assert!(layer == "gpu" || !line.contains("wgpu::"), "{here}: only src/gpu names wgpu");
            for module in
                line.split("crate::").skip(1).map(|rest| rest.split(|c: char| c != '_' && !c.is_alphanumeric()).next())
            {
                let module = module.unwrap_or_default();
                let fine = match layer.as_str() {
                    // The names of variants that the user forces are checked against the ops' tables when a device opens.
                    "gpu" => ["", "disk", "error", "gpu"].contains(&module) || line.contains("ops::check_variant"),
                    "ops" => ["", "error", "gpu", "ops"].contains(&module),
                    _ => true,
                };
                assert!(fine, "{here}: {layer} names {module}");
            }
        }
    }
}
