//! The kernel loader: plain WGSL files whose head constants and aliases are replaced by name, compiled once, on all processors.

use std::borrow::Cow;
#[cfg(not(target_arch = "wasm32"))]
use std::collections::BTreeMap;
use std::fmt::Write;
#[cfg(not(target_arch = "wasm32"))]
use std::future::Future;
use std::sync::Arc;
#[cfg(not(target_arch = "wasm32"))]
use std::sync::Mutex;
#[cfg(not(target_arch = "wasm32"))]
use std::task::{Context, Poll, Waker};

use super::device::Gpu;
use super::graph::Graph;
use super::unroll::{Line, unroll};
use super::wait::lock;
use crate::error::Result;

/// A WGSL file of `kernels/`, with the library files that are appended to it (so that its own lines keep their numbers).
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// Path under `kernels/`, as in messages: `matmul/tile.wgsl`.
    pub path: &'static str,
    /// The file's text.
    pub text: &'static str,
    /// Files of `kernels/lib/` that it uses, appended in order.
    pub libs: &'static [(&'static str, &'static str)],
}

/// What replaces a head `const` or `alias`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `const NAME: u32 = …u;`
    U32(u32),
    /// `const NAME: bool = …;`
    Bool(bool),
    /// `alias NAME = …;`
    Type(&'static str),
}

/// Which compiler will read the text; they disagree on `enable` lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// naga 30 (native wgpu, Firefox): refuses `enable subgroups;`.
    Naga,
    /// Dawn and WebKit, by the standard.
    Browser,
}

impl Dialect {
    /// The dialect of the wgpu backend that this crate is built for.
    pub const HERE: Dialect = if cfg!(target_arch = "wasm32") { Dialect::Browser } else { Dialect::Naga };
}

/// A kernel with its head values: everything that determines the compiled text.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// The file.
    pub source: &'static Source,
    /// More library files, chosen by element type; appended last.
    pub libs: Vec<&'static Source>,
    /// Values for head names, in any order.
    pub head: Vec<(&'static str, Value)>,
}

impl Kernel {
    /// How much of its loops is written out, by the sizes that say so: what takes long to compile.
    #[cfg(not(target_arch = "wasm32"))]
    fn fragments(&self) -> u32 {
        let size = |name: &str| match self.head.iter().find(|(known, _)| *known == name) {
            Some((_, Value::U32(n))) => *n,
            _ => 1,
        };
        size("WM") * size("WN").max(size("DP"))
    }

    /// The WGSL text for a compiler, its marked loops written out (src/gpu/unroll.rs).
    ///
    /// # Panics
    /// If a head name is not declared exactly once in the text: our fault, caught by the kernel-text tests.
    pub fn compose(&self, dialect: Dialect) -> String {
        let lines = self.lines();
        let has = |word: &str| lines.iter().any(|(_, line)| line.contains(word));
        let f16 = self.head.iter().any(|(_, value)| matches!(value, Value::Type(t) if t.contains("f16")));
        let mut enable = String::new();
        enable.push_str(if f16 { "enable f16; " } else { "" });
        enable.push_str(if has("coop_mat") { "enable wgpu_cooperative_matrix; " } else { "" });
        enable.push_str(if dialect == Dialect::Browser && has("subgroup") { "enable subgroups; " } else { "" });
        // On line 1, in front of the file's own first comment: line numbers stay.
        for (_, line) in lines {
            enable.push_str(&line);
            enable.push('\n');
        }
        enable
    }

    /// The lines of all files with their head values, written out.
    fn lines(&self) -> Vec<Line> {
        let mut replaced = vec![false; self.head.len()];
        let line = |line: &str| match self.head.iter().position(|(name, _)| declares(line, name)) {
            Some(i) => {
                assert!(!replaced[i], "{}: head name {} is declared twice", self.source.path, self.head[i].0);
                replaced[i] = true;
                declaration(self.head[i].0, &self.head[i].1)
            }
            None => line.to_owned(),
        };
        let lines = self.files().flat_map(|(_, text)| text.lines()).map(line).collect();
        for (done, (name, _)) in replaced.iter().zip(&self.head) {
            assert!(done, "{}: no head const or alias is named {name}", self.source.path);
        }
        unroll(lines)
    }

    /// What tells this kernel, built with checks or without, from others, without its text.
    fn key(&self, checked: bool) -> String {
        let mut key = String::with_capacity(512);
        key.push_str(if checked { "checked " } else { "" });
        key.extend(self.files().flat_map(|(path, _)| [path, " "]));
        for (name, value) in &self.head {
            key.push_str(name);
            // Nothing is allocated here: a picture asks for a thousand keys.
            let _ = match value {
                Value::U32(v) => write!(key, "={v} "),
                Value::Bool(v) => write!(key, "={v} "),
                Value::Type(v) => write!(key, "={v} "),
            };
        }
        key
    }

    /// Path and text of the kernel's file and of its libraries, in the order of the composed text.
    fn files(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let own = std::iter::once((self.source.path, self.source.text)).chain(self.source.libs.iter().copied());
        own.chain(self.libs.iter().map(|lib| (lib.path, lib.text)))
    }

    /// `file:line` of a 1-based line of the composed text.
    pub fn locate(&self, line: usize) -> String {
        let lines = self.lines();
        let mut line = lines.get(line.saturating_sub(1)).map_or(line, |(from, _)| from + 1);
        for (path, text) in self.files() {
            let lines = text.lines().count();
            if line <= lines {
                return format!("kernels/{path}:{line}");
            }
            line -= lines;
        }
        format!("kernels/{}", self.source.path)
    }
}

/// Is `line` the declaration of the head name? (`const NAME:`, `const NAME =`, or `alias NAME =` at its start)
fn declares(line: &str, name: &str) -> bool {
    let Some(rest) = line.strip_prefix("const ").or_else(|| line.strip_prefix("alias ")) else { return false };
    rest.strip_prefix(name).is_some_and(|rest| rest.starts_with([':', ' ', '=']))
}

fn declaration(name: &str, value: &Value) -> String {
    match value {
        Value::U32(v) => format!("const {name}: u32 = {v}u;"),
        Value::Bool(v) => format!("const {name}: bool = {v};"),
        Value::Type(v) => format!("alias {name} = {v};"),
    }
}

/// How a pipeline's bindings look: `reads` storage buffers, `writes` storage buffers, then the dims uniform, in group 0;
/// the step's scalars (uniform, dynamic offset) in group 1 if `step`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Read-only storage buffers.
    pub reads: usize,
    /// Read-write storage buffers.
    pub writes: usize,
    /// Does the kernel read the step's scalars?
    pub step: bool,
}

/// A kernel to have compiled.
struct Wanted<'k> {
    key: String,
    kernel: &'k Kernel,
    interface: Interface,
}

impl<'k> Wanted<'k> {
    fn new(kernel: &'k Kernel, interface: Interface, checked: bool) -> Self {
        Wanted { key: kernel.key(checked), kernel, interface }
    }
}

/// A compiled kernel.
pub struct Pipeline {
    pub(super) raw: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

/// Bytes of one slot of the step's scalars; also a legal dynamic offset on every device.
pub const STEP_SLOT: u64 = 256;

impl Gpu {
    /// Compiled kernels, with all runtime checks if `checked`.
    ///
    /// # Errors
    /// As [`Gpu::pipeline`].
    pub(super) async fn pipelines<'k>(
        &self,
        kernels: impl Iterator<Item = (&'k Kernel, Interface)>,
        checked: bool,
    ) -> Result<Vec<Arc<Pipeline>>> {
        let wanted: Vec<Wanted<'k>> =
            kernels.map(|(kernel, interface)| Wanted::new(kernel, interface, checked)).collect();
        self.compile(&wanted, checked)?;
        let mut all = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            all.push(self.pipeline(wanted, checked).await?);
        }
        Ok(all)
    }

    /// A compiled kernel; compiled here and now where [`Gpu::compile`] did not.
    ///
    /// # Errors
    /// [`Error::Device`] with the kernel's file and line if the compiler refuses it.
    async fn pipeline(&self, Wanted { key, kernel, interface }: Wanted<'_>, checked: bool) -> Result<Arc<Pipeline>> {
        let found = lock(&self.inner.pipelines).get(&key).cloned();
        match found {
            Some(found) => Ok(found),
            None => {
                let pipeline = Arc::new(self.compile_one(kernel, interface, checked).await?);
                lock(&self.inner.pipelines).insert(key, pipeline.clone());
                Ok(pipeline)
            }
        }
    }

    /// Compile all that some recordings run: together they take as long as the slowest kernel or all by the number of processors.
    ///
    /// # Errors
    /// As [`Gpu::pipeline`].
    pub(crate) fn compile_all(&self, graphs: &[Graph]) -> Result<()> {
        let (nodes, checked) = (graphs.iter().flat_map(Graph::nodes), self.inner.checked);
        let wanted: Vec<_> = nodes.map(|node| Wanted::new(&node.kernel, node.interface(), checked)).collect();
        self.compile(&wanted, checked)
    }

    /// Compile those of the kernels that are not yet, on as many threads as there are processors: a driver takes up to a second for
    /// one, and a UNet has some fifty.
    ///
    /// # Errors
    /// As [`Gpu::pipeline`].
    #[cfg(not(target_arch = "wasm32"))]
    fn compile(&self, all: &[Wanted<'_>], checked: bool) -> Result<()> {
        let mut wanted = BTreeMap::new();
        {
            let known = lock(&self.inner.pipelines);
            for Wanted { key, kernel, interface } in all {
                if !known.contains_key(key) {
                    wanted.insert(key, (*kernel, *interface));
                }
            }
        }
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(wanted.len());
        // The longest first, so that none begins when the others are done.
        let mut wanted: Vec<_> = wanted.into_iter().collect();
        wanted.sort_by_key(|(_, (kernel, _))| std::cmp::Reverse(kernel.fragments()));
        let queue = Mutex::new(wanted.into_iter());
        let failed = Mutex::new(None);
        let work = || {
            while let Some((key, (kernel, interface))) = { lock(&queue).next() } {
                // Native wgpu answers at once; what it would not is left to `pipeline`.
                match now(self.compile_one(kernel, interface, checked)) {
                    Some(Ok(pipeline)) => drop(lock(&self.inner.pipelines).insert(key.clone(), Arc::new(pipeline))),
                    Some(Err(error)) => drop(lock(&failed).get_or_insert(error)),
                    None => {}
                }
            }
        };
        std::thread::scope(|scope| {
            (0..threads).for_each(|_| drop(scope.spawn(work)));
        });
        let failed = lock(&failed).take();
        failed.map_or(Ok(()), Err)
    }

    /// Browsers compile in processes of their own.
    ///
    /// # Errors
    /// None.
    #[cfg(target_arch = "wasm32")]
    fn compile(&self, _: &[Wanted<'_>], _: bool) -> Result<()> {
        Ok(())
    }

    /// In a validation scope, which is the thread's own.
    async fn compile_one(&self, kernel: &Kernel, interface: Interface, checked: bool) -> Result<Pipeline> {
        let text = kernel.compose(Dialect::HERE);
        let device = &self.inner.device;
        let (module, pipeline, error) = {
            let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let module = create_module(device, kernel, &text, checked);
            let cache = self.inner.cache.as_ref().and_then(|cache| cache.pipelines.as_ref());
            let pipeline = create_pipeline(device, kernel, interface, &module, (cache, checked));
            (module, pipeline, scope.pop())
        };
        let Some(error) = error.await else { return Ok(pipeline) };
        let info = module.get_compilation_info().await;
        let message = info.messages.iter().find(|m| m.message_type == wgpu::CompilationMessageType::Error);
        let line = message.and_then(|m| m.location).map_or(1, |l| l.line_number as usize);
        let reason = message.map_or_else(|| error.to_string(), |m| m.message.clone());
        Err(self.refused(kernel.locate(line), &reason))
    }
}

/// The output of a future that is ready when first asked.
#[cfg(not(target_arch = "wasm32"))]
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

#[allow(unsafe_code)]
fn create_module(device: &wgpu::Device, kernel: &Kernel, text: &str, checked: bool) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(kernel.source.path),
        source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(text)),
    };
    if checked {
        return device.create_shader_module(descriptor);
    }
    // SAFETY: our kernels guard every index by their dims and bound every loop (tests run each against a reference, and
    // the kernel-text test composes all of them); the checks left out cost up to a third of a short kernel.
    unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
}

fn create_pipeline(
    device: &wgpu::Device,
    kernel: &Kernel,
    interface: Interface,
    module: &wgpu::ShaderModule,
    (cache, checked): (Option<&wgpu::PipelineCache>, bool),
) -> Pipeline {
    let entry = |binding: usize, ty, dynamic| wgpu::BindGroupLayoutEntry {
        binding: binding as u32,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: dynamic, min_binding_size: None },
        count: None,
    };
    let mut entries: Vec<_> = (0..interface.reads + interface.writes)
        .map(|i| entry(i, wgpu::BufferBindingType::Storage { read_only: i < interface.reads }, false))
        .collect();
    entries.push(entry(entries.len(), wgpu::BufferBindingType::Uniform, false));
    let label = Some(kernel.source.path);
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
    let step = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("step"),
        entries: &[entry(0, wgpu::BufferBindingType::Uniform, true)],
    });
    let both = [Some(&layout), Some(&step)];
    let groups = if interface.step { &both[..] } else { &both[..1] };
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label,
        bind_group_layouts: groups,
        immediate_size: 0,
    });
    let raw = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label,
        layout: Some(&pipeline_layout),
        module,
        entry_point: Some("main"),
        // The kernels write workgroup memory before they read it.
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: checked,
            ..Default::default()
        },
        cache,
    });
    Pipeline { raw, layout }
}

#[cfg(test)]
mod tests {
    use super::*;

    static LIB: &[(&str, &str)] = &[("lib/a.wgsl", "// lib\nfn twice(x: f32) -> f32 { return x + x; }\n")];
    static SOURCE: Source = Source {
        path: "op/method.wgsl",
        text: "// What it does.\nconst TILE: u32 = 4u;\nalias elem = f32;\nfn f() {}\n",
        libs: LIB,
    };

    fn kernel(head: Vec<(&'static str, Value)>) -> Kernel {
        Kernel { source: &SOURCE, libs: vec![], head }
    }

    #[test]
    fn head_names_are_replaced_and_lines_kept() {
        let text = kernel(vec![("TILE", Value::U32(8)), ("elem", Value::Type("f16"))]).compose(Dialect::Naga);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "enable f16; // What it does.");
        assert_eq!(lines[1], "const TILE: u32 = 8u;");
        assert_eq!(lines[2], "alias elem = f16;");
    }

    #[test]
    #[should_panic(expected = "no head const or alias is named TILES")]
    fn an_unknown_name_is_refused() {
        kernel(vec![("TILES", Value::U32(8))]).compose(Dialect::Naga);
    }

    #[test]
    fn lines_are_located_in_file_and_library() {
        assert_eq!(kernel(vec![]).locate(3), "kernels/op/method.wgsl:3");
        assert_eq!(kernel(vec![]).locate(6), "kernels/lib/a.wgsl:2");
    }

    #[test]
    fn a_broken_kernel_is_told_by_file_and_line() {
        static BROKEN: Source = Source { path: "op/broken.wgsl", text: "// Broken.\n\nfn main( {}\n", libs: &[] };
        let gpu = pollster::block_on(Gpu::noop(&super::super::noop::NoopProfile::BROWSER)).expect("noop");
        let kernel = Kernel { source: &BROKEN, libs: vec![], head: vec![] };
        let error = pollster::block_on(
            gpu.pipelines([(&kernel, Interface { reads: 0, writes: 1, step: false })].into_iter(), false),
        );
        let text = error.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(text.contains("kernels/op/broken.wgsl:3"), "{text}");
    }

    /// An index out of range and a division by zero do what WGSL says where checks are on. (Without them anything may happen, so that is
    /// not run.)
    #[test]
    fn checks_are_there_when_asked_for() {
        use crate::gpu::graph::{Graph, Node};
        use crate::gpu::{DType, GpuOptions, Program};
        use pollster::block_on;

        static FAULTY: Source = Source {
            path: "op/faulty.wgsl",
            text: "struct Dims { at: u32 }
                @group(0) @binding(0) var<storage, read_write> out: array<u32>;
                @group(0) @binding(1) var<uniform> dims: Dims;
                var<workgroup> four: array<u32, 4>;
                @compute @workgroup_size(1)
                fn main() {
                    four[3] = 7u;
                    workgroupBarrier();
                    out[0] = four[dims.at];
                    out[1] = 8u / (dims.at - 1000000u);
                    out[2] = four[0];
                }",
            libs: &[],
        };
        let options = GpuOptions { checked: true, ..Default::default() };
        let gpu = block_on(Gpu::open(&options)).expect("a GPU or a software device");
        let mut g = Graph::new(&gpu, DType::F32);
        let out = g.activation_f32("out", [1, 1, 1, 4]);
        g.push(Node {
            op: "faulty",
            variant: "portable",
            kernel: Kernel { source: &FAULTY, libs: vec![], head: vec![] },
            reads: vec![],
            writes: vec![out],
            dims: vec![1_000_000],
            step: false,
            grid: [1, 1, 1],
            flops: 0,
        });
        let buffer = block_on(gpu.upload("out", &[9u32; 4])).expect("a buffer");
        g.keep(out, &buffer);
        let program = block_on(Program::new(&gpu, g)).expect("compiled");
        let steps = block_on(gpu.steps(&[0u32])).expect("scalars");
        let mut recording = gpu.record(false);
        recording.run(&program, &[], &steps, 0);
        block_on(recording.submit(None)).expect("run");
        // The index stops at the end, x / 0 is x, and workgroup memory begins with zeros.
        assert_eq!(block_on(buffer.read::<u32>(4)).expect("read"), [7, 8, 0, 9]);
    }
}
