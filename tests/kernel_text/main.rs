//! Rung 1, without a GPU: every kernel that the ops can ask for composes, validates, and is written for every driver, and
//! its bindings and uniforms are those that the Rust side fills.

mod recorder;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, StorageAccess, TypeInner};
use scumble::denoiser::Step;
use scumble::gpu::Graph;
use scumble::gpu::graph::Node;
use scumble::gpu::kernel::{Dialect, Kernel, Value};
use scumble::ops::{group_norm, layer_norm};

use crate::recorder::recordings;

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
    for variant in ["merge", layer_norm::ENDING] {
        assert!(nodes.values().any(|node| node.variant == variant), "no {variant} among them");
    }
    let has = |node: &&&Node, head: &str, wanted: fn(u32) -> bool| {
        node.kernel.head.iter().any(|(name, value)| *name == head && matches!(value, Value::U32(n) if wanted(*n)))
    };
    // Norms of shares and of Winograd's products, of an image by one workgroup and by many, that store themselves and their transforms.
    for whole in [|n| n == 0, |n| n == 1] as [fn(u32) -> bool; 2] {
        let ending = || nodes.values().filter(|node| node.variant == group_norm::ENDING && has(node, "WHOLE", whole));
        assert!(ending().any(|node| !has(&node, "TILED", |_| true)), "a norm of shares is not among them");
        for pixels in [|n| n == 2, |n| n == 4] as [fn(u32) -> bool; 2] {
            assert!(ending().any(|node| has(&node, "TILED", pixels)), "a norm of tiles is not among them");
        }
    }
    for variant in ["workgroup", "chunks"] {
        for pixels in [|n| n == 2, |n| n == 4] as [fn(u32) -> bool; 2] {
            let stores = |node: &&&Node| node.variant == variant && has(node, "TO_TILES", pixels);
            assert!(nodes.values().any(|node| stores(&node)), "a {variant} norm that stores transforms is not there");
        }
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
