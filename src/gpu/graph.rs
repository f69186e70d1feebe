//! The recorder: a flat list of dispatches over tensors that know their shape. Nothing here talks to a device.

use super::buffer::Buffer;
use super::caps::Caps;
use super::device::Gpu;
use super::kernel::{Interface, Kernel};
use super::tune::Pick;

/// Element type of a tensor in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit float; needs `Caps::f16` in kernels.
    F16,
    /// 16-bit floats, two in a u32, for devices without `Caps::f16`. Weights only.
    Packed,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Packed => 2,
        }
    }
}

/// A tensor of a graph: channels last, dims [B, H, W, C] (tokens: [B, 1, T, D]; a matrix: [1, 1, M, N]).
/// C is a multiple of 4; kernels read four channels at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub(super) id: u32,
    /// [B, H, W, C].
    pub dims: [u32; 4],
    /// Element type.
    pub dtype: DType,
}

impl Tensor {
    /// Images of the batch.
    pub fn batch(&self) -> u32 {
        self.dims[0]
    }

    /// Height, rows of pixels.
    pub fn height(&self) -> u32 {
        self.dims[1]
    }

    /// Width, pixels of a row.
    pub fn width(&self) -> u32 {
        self.dims[2]
    }

    /// Channels.
    pub fn channels(&self) -> u32 {
        self.dims[3]
    }

    /// Pixels (tokens) of one image: H·W.
    pub fn tokens(&self) -> u32 {
        self.dims[1] * self.dims[2]
    }

    /// Rows as a matrix [B·H·W, C].
    pub fn rows(&self) -> u32 {
        self.dims[0] * self.dims[1] * self.dims[2]
    }

    /// Elements.
    pub fn len(&self) -> u64 {
        self.dims.iter().map(|&d| u64::from(d)).product()
    }

    /// Is there no element? Never, for a recorded tensor.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in device memory.
    pub fn bytes(&self) -> u64 {
        self.len() * self.dtype.bytes()
    }
}

/// Where a tensor's bytes are.
#[derive(Clone)]
pub(super) enum Place {
    /// In a slot of the plan: lives from its write to its last read.
    Slot,
    /// In a slot of its own, so that no dispatch waits for another because of it.
    Sink,
    /// In a buffer that outlives the program: weights, state, results.
    Buffer(Buffer),
    /// In a buffer given at each [`super::run::Recording::run`], by position.
    Argument(usize),
}

pub(super) struct Info {
    pub tensor: Tensor,
    pub place: Place,
    pub label: &'static str,
}

/// One dispatch: a kernel, what it reads and writes in binding order, its dims, its grid.
pub struct Node {
    /// The operation, the name of its kernel folder.
    pub op: &'static str,
    /// The row of the op's table.
    pub variant: &'static str,
    /// The kernel with its head values.
    pub kernel: Kernel,
    /// Read-only bindings, from 0.
    pub reads: Vec<Tensor>,
    /// Read-write bindings, after the reads.
    pub writes: Vec<Tensor>,
    /// The `Dims` uniform, word by word (f32 as bits), the last binding of group 0.
    pub dims: Vec<u32>,
    /// Does it read the step's scalars (group 1)?
    pub step: bool,
    /// Workgroups.
    pub grid: [u32; 3],
    /// Floating-point operations, for the per-op table.
    pub flops: u64,
}

impl Node {
    pub(super) fn interface(&self) -> Interface {
        Interface { reads: self.reads.len(), writes: self.writes.len(), step: self.step }
    }

    /// Shapes as text for messages and tables: `2x32x32x96 2x32x32x96 -> 2x32x32x96`.
    pub fn shapes(&self) -> String {
        let text = |t: &Tensor| t.dims.map(|d| d.to_string()).join("x");
        let list = |ts: &[Tensor]| ts.iter().map(text).collect::<Vec<_>>().join(" ");
        format!("{} -> {}", list(&self.reads), list(&self.writes))
    }
}

/// A recording: tensors and the nodes over them, in execution order.
pub struct Graph {
    pub(super) gpu: Gpu,
    /// Element type of the activations that ops create.
    pub dtype: DType,
    /// Element type of what norms make for a product to take: f16 where matrix units multiply though activations are f32.
    pub operands: DType,
    pub(super) tensors: Vec<Info>,
    pub(super) nodes: Vec<Node>,
    pub(super) arguments: usize,
    /// Ops that could have run in several ways.
    pub(super) picks: Vec<Pick>,
    /// Take the nth way of every op, best by estimate first, or its last: for measurement.
    pub trial: Option<usize>,
    /// Where group norms take their statistics from; a picture in tiles shares them.
    pub statistics: Statistics,
    /// Memory is short: nothing larger than the weights is made of them to save time.
    pub frugal: bool,
}

/// Statistics of group norms.
#[derive(Default)]
pub enum Statistics {
    /// Each norm's own.
    #[default]
    Own,
    /// Those of a larger image of which this is a tile.
    Tile(Tile),
}

/// A tile of a larger image, and what is known of the image's norms.
pub struct Tile {
    /// In order: one chunk's sums [1, 1, C/4, 8] f32, and its pixels.
    pub given: std::collections::VecDeque<(Tensor, u32)>,
    /// Height and width of the tile where it enters the graph.
    pub size: [u32; 2],
    /// Rows and columns of that which are the tile's own, [from, to]: its margins are others'.
    pub own: [[u32; 2]; 2],
    /// The first norm that nothing was given for, of the tile's own part.
    pub next: Option<Sums>,
}

/// Sums of a norm under way.
#[derive(Clone, Copy)]
pub struct Sums {
    /// [1, chunks, C/4, 8] f32.
    pub tensor: Tensor,
    /// Pixels in all.
    pub pixels: u32,
    /// Pixels of a chunk; the last may have fewer.
    pub chunk: u32,
    /// Nodes of the graph up to here.
    pub nodes: usize,
}

impl Graph {
    /// An empty recording for a device, with activations of `dtype`.
    pub fn new(gpu: &Gpu, dtype: DType) -> Self {
        assert!(dtype == DType::F32 || gpu.caps().f16, "activations of {dtype:?} on a device without f16");
        let statistics = Statistics::Own;
        Graph {
            gpu: gpu.clone(),
            dtype,
            operands: dtype,
            tensors: Vec::new(),
            nodes: Vec::new(),
            arguments: 0,
            picks: Vec::new(),
            trial: None,
            statistics,
            frugal: false,
        }
    }

    /// See [`Gpu::memo`].
    pub(crate) fn memo<T: std::any::Any + Send + Sync>(
        &self,
        key: &str,
        make: impl FnOnce() -> T,
    ) -> std::sync::Arc<T> {
        self.gpu.memo(key, make)
    }

    /// The capabilities that the ops choose their variants by.
    pub fn caps(&self) -> &Caps {
        self.gpu.caps()
    }

    /// The variant that the user forced for `op`.
    pub fn forced_variant(&self, op: &str) -> Option<&str> {
        self.gpu.forced_variant(op)
    }

    /// The nodes recorded so far.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn add(&mut self, label: &'static str, dims: [u32; 4], dtype: DType, place: Place) -> Tensor {
        assert!(dims.iter().all(|&d| d > 0), "{label}: empty tensor {dims:?}");
        assert!(dims[3].is_multiple_of(4), "{label}: {dims:?} has channels that are no multiple of 4");
        let tensor = Tensor { id: self.tensors.len() as u32, dims, dtype };
        self.tensors.push(Info { tensor, place, label });
        tensor
    }

    /// A new activation of the graph's element type; the planner gives it a slot.
    pub fn activation(&mut self, label: &'static str, dims: [u32; 4]) -> Tensor {
        self.add(label, dims, self.dtype, Place::Slot)
    }

    /// A new activation for a product to take.
    pub fn operand(&mut self, label: &'static str, dims: [u32; 4]) -> Tensor {
        self.add(label, dims, self.operands, Place::Slot)
    }

    /// A new activation in f32, whatever the graph's element type (statistics, masks, the network's output).
    pub fn activation_f32(&mut self, label: &'static str, dims: [u32; 4]) -> Tensor {
        self.add(label, dims, DType::F32, Place::Slot)
    }

    /// Four floats that are written and never read.
    pub fn sink(&mut self, label: &'static str) -> Tensor {
        self.add(label, [1, 1, 1, 4], DType::F32, Place::Sink)
    }

    /// What the nodes that `of` takes read, no node writes, and `which` takes: node and tensor, in order, each at its first reader
    /// and at readers far from the one before.
    pub(crate) fn constants(
        &self,
        of: impl Fn(&Node) -> bool,
        which: impl Fn(&Tensor) -> bool,
    ) -> Vec<(usize, Tensor)> {
        const FAR: usize = 64;
        let mut written = vec![false; self.tensors.len()];
        self.nodes.iter().flat_map(|node| &node.writes).for_each(|t| written[t.id as usize] = true);
        let mut read: Vec<Option<usize>> = vec![None; self.tensors.len()];
        let mut found = Vec::new();
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| of(node)) {
            for tensor in node.reads.iter().filter(|t| which(t) && !written[t.id as usize]) {
                let outlives = !matches!(self.tensors[tensor.id as usize].place, Place::Slot | Place::Sink);
                let again = read[tensor.id as usize].replace(at).is_some_and(|last| at - last < FAR);
                if outlives && !again {
                    found.push((at, *tensor));
                }
            }
        }
        found
    }

    /// Put nodes before those with these indices, which ascend.
    pub(crate) fn insert(&mut self, nodes: Vec<(usize, Node)>) {
        let ahead = |at: usize| at + nodes.partition_point(|(before, _)| *before <= at);
        for pick in &mut self.picks {
            pick.move_nodes(ahead);
        }
        let mut rest = nodes.into_iter().peekable();
        for (at, node) in std::mem::take(&mut self.nodes).into_iter().enumerate() {
            while let Some((_, node)) = rest.next_if(|(before, _)| *before <= at) {
                self.nodes.push(node);
            }
            self.nodes.push(node);
        }
    }

    /// Take back the last node, if `which` takes it: an op that does its work as well records it anew.
    pub(crate) fn take_last(&mut self, which: impl FnOnce(&Node) -> bool) -> Option<Node> {
        let last = self.nodes.pop_if(|node| which(node))?;
        let most = self.nodes.len();
        for pick in &mut self.picks {
            pick.cut_nodes(most);
        }
        Some(last)
    }

    /// The last node: an op that has it do more changes it.
    pub(crate) fn last_mut(&mut self) -> Option<&mut Node> {
        self.nodes.last_mut()
    }

    /// New weights that are computed from others.
    pub fn weights(&mut self, label: &'static str, dims: [u32; 4], dtype: DType) -> Tensor {
        self.add(label, dims, dtype, Place::Slot)
    }

    /// A tensor in a buffer that outlives the program.
    pub fn bind(&mut self, label: &'static str, buffer: &Buffer, dims: [u32; 4], dtype: DType) -> Tensor {
        let tensor = self.add(label, dims, dtype, Place::Buffer(buffer.clone()));
        assert!(tensor.bytes() <= buffer.bytes(), "{label}: {dims:?} in a buffer of {} bytes", buffer.bytes());
        tensor
    }

    /// A tensor whose buffer is given at each run; arguments are counted from 0 in the order of these calls.
    pub fn argument(&mut self, label: &'static str, dims: [u32; 4], dtype: DType) -> Tensor {
        self.arguments += 1;
        self.add(label, dims, dtype, Place::Argument(self.arguments - 1))
    }

    /// Have an activation written into `buffer`, which outlives the program: how a recording returns its results.
    /// The ops make their outputs themselves; this is said afterwards, before the program is built.
    pub fn keep(&mut self, tensor: Tensor, buffer: &Buffer) {
        let info = &mut self.tensors[tensor.id as usize];
        assert!(matches!(info.place, Place::Slot), "{}: only an activation can be kept", info.label);
        let bytes = info.tensor.bytes();
        assert!(bytes <= buffer.bytes(), "{}: {bytes} bytes kept in a buffer of {}", info.label, buffer.bytes());
        info.place = Place::Buffer(buffer.clone());
    }

    /// The same bytes under another shape, e.g. [B, H, W, C] as tokens [B, 1, H·W, C].
    pub fn view(&self, tensor: Tensor, dims: [u32; 4]) -> Tensor {
        let view = Tensor { dims, ..tensor };
        assert_eq!(view.len(), tensor.len(), "view of {:?} as {dims:?}", tensor.dims);
        view
    }

    /// Turn an activation into the next argument: its buffer is given at each run.
    pub fn keep_argument(&mut self, tensor: Tensor) {
        self.arguments += 1;
        self.tensors[tensor.id as usize].place = Place::Argument(self.arguments - 1);
    }

    /// The first image of a batch: the same buffer, of which only the beginning is read.
    pub fn first(&self, tensor: Tensor) -> Tensor {
        let [_, h, w, c] = tensor.dims;
        Tensor { dims: [1, h, w, c], ..tensor }
    }

    /// Forget every node but the first `nodes`.
    pub fn truncate(&mut self, nodes: usize) {
        self.nodes.truncate(nodes);
    }

    /// Bytes of the largest tensor.
    pub fn largest_tensor(&self) -> u64 {
        self.tensors.iter().map(|info| info.tensor.bytes()).max().unwrap_or(0)
    }

    /// Record a dispatch.
    pub fn push(&mut self, node: Node) {
        let limit = 65_535;
        assert!(node.grid.iter().all(|&g| (1..=limit).contains(&g)), "{}: grid {:?}", node.op, node.grid);
        let bindings = node.reads.len() + node.writes.len();
        assert!(bindings <= 8, "{}: {bindings} storage bindings, but browsers have 8", node.op);
        self.nodes.push(node);
    }
}

/// A grid for `threads` invocations in workgroups of `size`, folded into two dimensions where one is too short.
/// Kernels count `global_invocation_id.x + global_invocation_id.y * (65535 * size)`: see `kernels/lib/linear.wgsl`.
pub fn linear_grid(threads: u64, size: u32) -> [u32; 3] {
    let groups = threads.div_ceil(u64::from(size)).max(1);
    let rows = groups.div_ceil(65_535);
    [groups.min(65_535) as u32, rows as u32, 1]
}
