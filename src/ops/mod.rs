//! One file per operation, named as its kernel folder; each holds its table of variants and records dispatches.

use crate::error::{Error, Result};
use crate::gpu::graph::{DType, Graph, Tensor};
use crate::gpu::kernel::{Source, Value};
use crate::gpu::{Buffer, Caps};

pub mod attention;
pub mod blend;
pub mod chain;
pub mod conv2d;
pub mod cross;
pub mod degrade;
pub mod fma;
pub mod group_norm;
pub mod guidance;
pub mod layer_norm;
pub mod levels;
pub mod lincomb;
pub mod matmul;
pub mod narrow;
pub mod pack;
pub mod product;
pub mod repack;
pub mod repeat;
pub mod row_sums;
pub mod take;
pub mod tiles;
pub mod time_embedding;
pub mod touch;
pub mod winograd;

/// One row of an op's table: a kernel, what the device must have, which shapes it takes, and its grid.
/// Rows are tried in order; the last, `portable`, takes everything.
pub struct Variant<D: 'static> {
    /// The method: the kernel file's name.
    pub name: &'static str,
    /// The kernel file.
    pub source: &'static Source,
    /// Does the device have what it needs, and is it worth running there?
    pub needs: fn(&Caps) -> bool,
    /// Does it take these dims?
    pub fits: fn(&D) -> bool,
    /// Workgroups for these dims.
    pub grid: fn(&D) -> [u32; 3],
}

/// One row of an op's table without its dims: a name, and whether a device has what it needs.
pub type Row = (&'static str, fn(&Caps) -> bool);

fn rows<D>(table: &'static [Variant<D>]) -> Vec<Row> {
    table.iter().map(|row| (row.name, row.needs)).collect()
}

/// Every op that has more than one variant, and its rows in order: what `--variant OP=NAME` accepts.
pub fn tables() -> Vec<(&'static str, Vec<Row>)> {
    vec![
        ("matmul", rows(matmul::VARIANTS)),
        ("conv2d", rows(conv2d::VARIANTS)),
        ("attention", rows(attention::VARIANTS)),
        ("attention_mass", rows(attention::MASS_VARIANTS)),
        ("group_norm", rows(group_norm::VARIANTS)),
        ("group_norm_merge", rows(group_norm::MERGE_VARIANTS)),
        ("layer_norm", rows(layer_norm::VARIANTS)),
        ("cross", cross::VARIANTS.to_vec()),
        ("chain", chain::VARIANTS.to_vec()),
        ("row_sums", row_sums::VARIANTS.to_vec()),
        ("touch", touch::VARIANTS.to_vec()),
        ("winograd", winograd::VARIANTS.to_vec()),
    ]
}

/// Is there such an op and such a variant?
pub(crate) fn check_variant(op: &str, variant: &str) -> Result<()> {
    let tables = tables();
    let Some((_, rows)) = tables.iter().find(|(name, _)| *name == op) else {
        let ops: Vec<&str> = tables.iter().map(|(name, _)| *name).collect();
        return Err(Error::invalid("--variant", format!("an op from [{}]", ops.join(", ")), op));
    };
    if rows.iter().any(|(name, _)| *name == variant) {
        return Ok(());
    }
    let names: Vec<&str> = rows.iter().map(|(name, _)| *name).collect();
    Err(Error::invalid(format!("--variant {op}"), format!("one of [{}]", names.join(", ")), variant))
}

/// The variants that a device prefers, by op.
pub fn chosen(gpu: &crate::gpu::Gpu) -> Vec<(&'static str, &'static str)> {
    let pick = |(op, rows): (&'static str, Vec<Row>)| {
        let row = match gpu.forced_variant(op) {
            Some(forced) => rows.iter().find(|(name, _)| *name == forced),
            None => rows.iter().find(|(_, needs)| needs(gpu.caps())),
        };
        row.map(|(name, _)| (op, *name))
    };
    tables().into_iter().filter_map(pick).collect()
}

/// The first row that the device and the dims allow, or the one that the user forced if the dims allow it.
pub(crate) fn choose<'t, D>(g: &Graph, op: &str, table: &'t [Variant<D>], dims: &D) -> &'t Variant<D> {
    let forced = g.forced_variant(op).and_then(|name| table.iter().find(|row| row.name == name && (row.fits)(dims)));
    let fitting = || table.iter().find(|row| (row.needs)(g.caps()) && (row.fits)(dims));
    match forced.or_else(fitting) {
        Some(row) => row,
        None => unreachable!("{op}: the portable row takes everything"),
    }
}

/// The rows that the device and the dims allow, in order, or the one that the user forced if the dims allow it. The portable
/// row only where there is no other: it is the one that others are held against. `half` never: it is less exact.
pub(crate) fn candidates<'t, D>(g: &Graph, op: &str, table: &'t [Variant<D>], dims: &D) -> Vec<&'t Variant<D>> {
    let first = choose(g, op, table, dims);
    if g.forced_variant(op).is_some() {
        return vec![first];
    }
    let other =
        |row: &&Variant<D>| (row.needs)(g.caps()) && (row.fits)(dims) && !["portable", "half"].contains(&row.name);
    let rows: Vec<&Variant<D>> = table.iter().filter(other).collect();
    if rows.is_empty() { vec![first] } else { rows }
}

/// Declares a kernel file and the library files that it uses.
macro_rules! source {
    ($path:literal $(, $lib:literal)*) => {
        crate::gpu::kernel::Source {
            path: $path,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $path)),
            libs: &[$(($lib, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $lib)))),*],
        }
    };
}
pub(crate) use source;

/// Weights stored as f32 or f16.
pub(crate) static WEIGHT_FLOAT: Source = source!("lib/weight_float.wgsl");
/// Weights stored as f16 pairs in u32.
pub(crate) static WEIGHT_PACKED: Source = source!("lib/weight_packed.wgsl");

/// A parameter in device memory: packed weights, or a bias or norm vector in f32.
#[derive(Clone)]
pub struct Param {
    /// The bytes.
    pub buffer: Buffer,
    /// Shape as a tensor: [1, 1, K, N] for weights, [1, 1, 1, N] for vectors.
    pub dims: [u32; 4],
    /// Element type.
    pub dtype: DType,
}

impl Param {
    /// The parameter as a tensor of a graph.
    pub fn bind(&self, g: &mut Graph) -> Tensor {
        g.bind("parameter", &self.buffer, self.dims, self.dtype)
    }
}

/// A linear layer's parameters: weight [K, N] (N contiguous), bias [N].
#[derive(Clone)]
pub struct Linear {
    /// [1, 1, K, N]
    pub weight: Param,
    /// [1, 1, 1, N] f32
    pub bias: Option<Param>,
}

/// A convolution's parameters: weight [k·k·C_in, C_out], taps first, bias [C_out].
#[derive(Clone)]
pub struct Conv {
    /// [1, 1, k·k·C_in, C_out]
    pub weight: Param,
    /// [1, 1, 1, C_out] f32
    pub bias: Option<Param>,
    /// Taps a side: 1 or 3.
    pub kernel: u32,
}

/// A norm's parameters: gamma and beta, [C] f32, and epsilon.
#[derive(Clone)]
pub struct Norm {
    /// Scale.
    pub gamma: Param,
    /// Shift.
    pub beta: Param,
    /// Added to the variance.
    pub eps: f32,
}

/// The vec4 type of an activation of `dtype` in WGSL.
pub(crate) fn vec4_of(dtype: DType) -> Value {
    Value::Type(match dtype {
        DType::F32 => "vec4<f32>",
        DType::F16 => "vec4<f16>",
        DType::Packed => "vec2<u32>",
    })
}

/// The library that loads weights of `dtype`.
pub(crate) fn weight_lib(dtype: DType) -> &'static Source {
    if dtype == DType::Packed { &WEIGHT_PACKED } else { &WEIGHT_FLOAT }
}

/// What happens to the result of a matmul or convolution before it is stored: act(acc + bias) + residual.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    /// Nothing.
    #[default]
    None = 0,
    /// x σ(x).
    Silu = 1,
    /// x Φ(x), with erf.
    Gelu = 2,
    /// x σ(1.702 x), CLIP's.
    QuickGelu = 3,
    /// value · gelu(gate): columns hold four values, then their four gates, in turn (see `weights.rs`).
    Geglu = 4,
}

/// Rows of biases instead of one: row r of the output adds row r / `rows` of `tensor`, from channel `offset` on.
#[derive(Clone, Copy)]
pub struct BiasRows {
    /// [1, 1, R, C] f32.
    pub tensor: Tensor,
    /// First channel, a multiple of 4.
    pub offset: u32,
    /// Output rows that share a bias row.
    pub rows: u32,
}

/// How many rows of biases there are, as lib/epilogue.wgsl counts them.
pub(crate) const BIAS: &str = "BIAS";
/// One for each of a product's tiles.
pub(crate) const ONE_A_TILE: u32 = 2;
/// Rows of a tile may have several.
pub(crate) const SEVERAL: u32 = 3;

/// The epilogue of a matmul or convolution.
#[derive(Clone, Copy, Default)]
pub struct Epilogue {
    /// After the bias.
    pub activation: Activation,
    /// Added last; of the output's shape.
    pub residual: Option<Tensor>,
    /// In place of the layer's own bias.
    pub bias_rows: Option<BiasRows>,
    /// Store f32 whatever the graph's element type.
    pub f32_out: bool,
    /// The layer holds the norm before it, of whose input these are the sums: it is scaled by row before the bias. On matrix units only.
    pub normed: Option<row_sums::RowSums>,
}

impl Epilogue {
    /// With an activation.
    pub fn act(activation: Activation) -> Self {
        Epilogue { activation, ..Default::default() }
    }

    /// With a residual.
    pub fn add(residual: Tensor) -> Self {
        Epilogue { residual: Some(residual), ..Default::default() }
    }

    /// Head values, the bias and residual bindings (`stand_in` where there is none: the kernel does not read it), and
    /// the three words rows_per_bias, bias_stride4, bias_offset4.
    pub(crate) fn parts(
        &self,
        g: &mut Graph,
        own_bias: Option<&Param>,
        stand_in: Tensor,
        rows: u32,
    ) -> (Vec<(&'static str, Value)>, [Tensor; 2], [u32; 3]) {
        let (bias, words) = match (&self.bias_rows, own_bias) {
            (Some(b), _) => {
                let enough = b.rows * b.tensor.rows() >= rows && b.offset < b.tensor.channels();
                let whole = b.offset.is_multiple_of(4) && b.tensor.dtype == DType::F32;
                assert!(
                    enough && whole,
                    "bias rows {:?} from {} for {rows} rows in {}s",
                    b.tensor.dims,
                    b.offset,
                    b.rows
                );
                (Some(b.tensor), [b.rows, b.tensor.channels() / 4, b.offset / 4])
            }
            (None, Some(param)) => (Some(param.bind(g)), [rows, 0, 0]),
            (None, None) => (None, [rows, 0, 0]),
        };
        let head = vec![
            ("ACTIVATION", Value::U32(self.activation as u32)),
            (BIAS, Value::U32(if words[0] >= rows { bias.is_some().into() } else { SEVERAL })),
            ("HAS_RESIDUAL", Value::Bool(self.residual.is_some())),
            ("residual4", vec4_of(self.residual.unwrap_or(stand_in).dtype)),
        ];
        (head, [bias.unwrap_or(stand_in), self.residual.unwrap_or(stand_in)], words)
    }
}

/// The residual has the output's shape; shapes are ours.
pub(crate) fn assert_residual(op: &str, epilogue: &Epilogue, rows: u32, channels: u32) {
    if let Some(r) = epilogue.residual {
        let fits = r.rows() == rows && r.channels() == channels;
        assert!(fits, "{op}: residual {:?} {:?} for output [{rows}, {channels}]", r.dims, r.dtype);
    }
}
