//! row_sums: a layer norm between two products without a dispatch of its own. What the first stores, it sums by rows; the second has
//! the norm's scale and shift in its weights, their columns centred ([`fold`]), and scales its rows.
//!
//! With g, s the norm's scale and shift and d a row's deviation, norm(x) W + b is x (g W) / d - mean(x) Σ (g W) / d + s W + b, the sum over each
//! column, and nothing where the columns were centred: (x - mean x) times a column does not change with the column's mean.

use super::layer_norm::layer_norm;
use super::product::REDUCED;
use super::{Epilogue, Linear, Norm, Row, cross, matmul, source, vec4_of};
use crate::gpu::Caps;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static FOLD: Source = source!("row_sums/fold.wgsl", "lib/linear.wgsl");

/// Folded, where matrix units run both products, or a dispatch of [`super::layer_norm`] between them.
pub static VARIANTS: &[Row] = &[("coop", |caps| !caps.is_cpu() && suits(caps)), ("apart", |_| true)];

/// The lanes of a matrix's row sum it together.
fn suits(caps: &Caps) -> bool {
    caps.f16 && cross::suits(caps)
}

/// Does a device fold the norms of networks with activations of `dtype`? `forced`: the variant that the user forced for an op.
pub fn folds<'a>(caps: &Caps, forced: impl Fn(&str) -> Option<&'a str>, dtype: DType) -> bool {
    let wanted = match forced("row_sums") {
        Some(name) => name == "coop" && suits(caps),
        // Whoever asks for another kernel of what is folded gets it.
        None => (VARIANTS[0].1)(caps) && ["layer_norm", "matmul"].iter().all(|op| forced(op).is_none()),
    };
    wanted && dtype == DType::F16
}

/// Record the folding of `norm` into `layer`, in place: its weight, f16, and its bias. What [`super::layer_norm`] then normalises with, where
/// it does, is a gamma of ones and a beta of zeros.
///
/// # Panics
/// For a layer without a bias, or with weights that are not f16: ours.
pub fn fold(g: &mut Graph, norm: &Norm, layer: &Linear) {
    let [_, _, k, n] = layer.weight.dims;
    let Some(bias) = &layer.bias else { unreachable!("row_sums: a layer without a bias") };
    assert_eq!((layer.weight.dtype, norm.gamma.dims[3]), (DType::F16, k), "row_sums: weights [{k}, {n}]");
    let [gamma, beta, bias] = [&norm.gamma, &norm.beta, bias].map(|param| param.bind(g));
    let weight = layer.weight.bind(g);
    g.push(Node {
        op: "row_sums_fold",
        variant: "portable",
        kernel: Kernel { source: &FOLD, libs: vec![], head: vec![("weight4", vec4_of(DType::F16))] },
        reads: vec![gamma, beta],
        writes: vec![weight, bias],
        dims: vec![k, n / 4],
        step: false,
        grid: linear_grid(u64::from(n / 4), 64),
        flops: 6 * weight.len(),
    });
}

/// A layer norm and the linear layer after it.
#[derive(Clone)]
pub struct Normed {
    /// The norm: of ones and zeros where it is folded.
    pub norm: Norm,
    /// The layer.
    pub linear: Linear,
    /// Is the norm's scale and shift in the layer?
    pub folded: bool,
}

impl Normed {
    /// The sums that the layer needs of `x`, in place of its norm: see [`row_sums`].
    pub fn sums(&self, g: &mut Graph, x: Tensor) -> Option<RowSums> {
        if self.folded { row_sums(g, x, self.norm.eps) } else { None }
    }

    /// Record both of x [B, H, W, K]: as [`matmul`](matmul::matmul).
    pub fn forward(&self, g: &mut Graph, x: Tensor, epilogue: Epilogue) -> Tensor {
        let sums = if matmul::on_units(g, x, &self.linear) { self.sums(g, x) } else { None };
        let normed = if sums.is_some() { x } else { layer_norm(g, x, &self.norm) };
        matmul::matmul(g, normed, &self.linear, Epilogue { normed: sums, ..epilogue })
    }
}

/// Sums of a tensor's rows and of their squares, in parts.
#[derive(Clone, Copy, Debug)]
pub struct RowSums {
    /// [rows, parts, 2] f32, packed.
    pub tensor: Tensor,
    /// Parts of a row.
    pub parts: u32,
    /// Channels of a row, all parts together.
    pub channels: u32,
    /// Added to the variance.
    pub eps: f32,
}

/// Parts beyond which a dispatch for the norm is better.
const MOST: u32 = 40;
/// Invocations at most of a workgroup that ends a product.
const THREADS: u32 = 128;

/// Have the product that was recorded last sum the rows of its result `x`, for a norm with `eps`. None where that was something else, in one
/// of its other ways, or cannot do it.
pub fn row_sums(g: &mut Graph, x: Tensor, eps: f32) -> Option<RowSums> {
    // Tuning times ops apart.
    if g.trial.is_some() || !folds(g.caps(), |op| g.forced_variant(op), x.dtype) {
        return None;
    }
    let channels = x.channels();
    let fours = channels / 4;
    let node = g.nodes().last().filter(|node| node.writes == [x])?;
    let head = |name: &str| match node.kernel.head.iter().find(|(known, _)| *known == name) {
        Some((_, Value::U32(n))) => Some(*n),
        _ => None,
    };
    let reduced = node.variant == REDUCED;
    let whole = std::ptr::eq(node.kernel.source, matmul::SOURCES[0]) && head("ACTIVATION") != Some(4);
    // As many of a row's groups of four as divide it.
    let threads = (1..=THREADS.min(fours)).rev().find(|&n| fours.is_multiple_of(n))?;
    let parts = match head("WN") {
        Some(columns) if whole => channels.div_ceil(columns),
        None if reduced && node.dims[1] == fours => fours / threads,
        _ => return None,
    };
    if parts > MOST {
        return None;
    }
    let floats = 2 * x.rows() * parts;
    let tensor = g.activation_f32("sums of rows", [1, 1, 1, floats.next_multiple_of(4)]);
    let Some(node) = g.last_mut() else { unreachable!("seen above") };
    node.writes.push(tensor);
    node.kernel.head.push(("SUMMED", Value::U32(1)));
    if reduced {
        node.kernel.head.push(("THREADS", Value::U32(threads)));
        node.grid = linear_grid(u64::from(x.rows() * parts), 1);
    }
    Some(RowSums { tensor, parts, channels, eps })
}
