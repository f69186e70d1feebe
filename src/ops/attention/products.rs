//! Attention of wide heads as two products on matrix units, with the softmax between them.

use super::{Attention, Dims};
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};
use crate::ops::product::{self, Bare};
use crate::ops::tiles::{Layout, Shape};
use crate::ops::{source, vec4_of};

pub(super) static SCORES: Source =
    source!("attention/scores.wgsl", "lib/coop.wgsl", "lib/halves.wgsl", "lib/bare.wgsl");
static SOFTMAX: Source = source!("attention/softmax.wgsl");
static VALUES: Source = source!("attention/values.wgsl", "lib/coop.wgsl", "lib/halves.wgsl", "lib/bare.wgsl");

/// Bytes of the scores that are held at once.
const SCORES_BYTES: u64 = 64 << 20;

fn score_shape(a: &Attention, rows: u32) -> Shape {
    Shape { m: rows, n: a.kv.tokens(), k: a.head_dim, slices: 1, depth: a.head_dim, whole: 0, apart: false }
}

fn value_shape(a: &Attention, rows: u32) -> Shape {
    Shape { m: rows, n: a.head_dim, k: a.kv.tokens(), slices: 1, depth: a.kv.tokens(), whole: 0, apart: false }
}

/// Wide heads, where they may be rounded to f16: the VAE's, of which a part of the queries is taken at a time, or as many of few
/// tokens as have their scores in one piece.
pub(super) fn suits(g: &Graph, a: &Attention) -> bool {
    let rows = a.q.tokens();
    let fits = |shape, layout| product::fits(g, &shape, layout, [a.q.dtype, DType::F16]);
    let both = fits(score_shape(a, rows), Layout::Columns) && fits(value_shape(a, rows), Layout::Rows);
    let slices = a.q.batch() * a.heads;
    let small = slices <= 65_535 && u64::from(slices) * u64::from(rows * a.kv.tokens()) * 4 <= SCORES_BYTES;
    !a.causal && g.operands == DType::F16 && both && (a.heads == 1 || small)
}

/// Scores, their softmax, and the values that it weighs: of all heads and images at once, or, of a large picture's one head, for as
/// many queries at a time as fit into [`SCORES_BYTES`].
pub(super) fn record(g: &mut Graph, a: &Attention, dims: &Dims, out: Tensor) {
    let (queries, keys) = (dims.queries, dims.keys);
    let slices = dims.batch * dims.heads;
    if u64::from(slices) * u64::from(queries * keys) * 4 <= SCORES_BYTES {
        return part(g, a, out, Part { slices, q_row: 0, rows: queries, kv_row: 0 });
    }
    let most = (SCORES_BYTES / (u64::from(keys) * 4)).clamp(1, u64::from(queries)) as u32;
    let most = if most >= 128 { most / 128 * 128 } else { most };
    for image in 0..dims.batch {
        for first in (0..queries).step_by(most as usize) {
            let rows = most.min(queries - first);
            part(
                g,
                a,
                out,
                Part { slices: 1, q_row: image * queries + first, rows, kv_row: image / a.kv_repeat * keys },
            );
        }
    }
}

/// Heads of images side by side, or some queries of one head.
struct Part {
    slices: u32,
    q_row: u32,
    rows: u32,
    kv_row: u32,
}

fn part(g: &mut Graph, a: &Attention, out: Tensor, Part { slices, q_row, rows, kv_row }: Part) {
    let (queries, keys, d4) = (a.q.tokens(), a.kv.tokens(), a.head_dim / 4);
    let elem = ("elem4", vec4_of(a.q.dtype));
    let wide = a.q.dtype == DType::F32;
    let scores = g.activation_f32("attention scores", [slices, 1, rows, keys]);
    let weights = g.operand("attention weights", [slices, 1, rows, keys]);
    let half = ("half4", vec4_of(weights.dtype));
    let [q_stride4, kv_stride4] = [a.q.channels() / 4, a.kv.channels() / 4];
    let scale = (1.0 / f64::from(a.head_dim).sqrt()) as f32;
    let q = [rows, keys / 4, d4, a.heads, q_row, queries, q_stride4, a.q_offset / 4];
    let k = [kv_row, a.kv_repeat, kv_stride4, a.k_offset / 4, scale.to_bits()];
    let (op, variant) = ("attention", "products");
    let product = Bare {
        op,
        variant,
        source: &SCORES,
        shape: Shape { slices, ..score_shape(a, rows) },
        head: vec![elem.clone()],
        dims: [&q[..], &k].concat(),
        reads: vec![a.q, a.kv],
        write: scores,
        layout: Layout::Columns,
        wide,
    };
    product::record_bare(g, product);
    g.push(Node {
        op,
        variant,
        kernel: Kernel { source: &SOFTMAX, libs: vec![], head: vec![half.clone()] },
        reads: vec![scores],
        writes: vec![weights],
        dims: vec![slices * rows, keys / 4],
        step: false,
        grid: linear_grid(u64::from(slices * rows), 1),
        flops: 4 * u64::from(slices * rows) * u64::from(keys),
    });
    let v = [rows, d4, keys / 4, a.heads, q_row, queries, kv_row, a.kv_repeat, kv_stride4, a.v_offset / 4];
    let product = Bare {
        op,
        variant,
        source: &VALUES,
        shape: Shape { slices, ..value_shape(a, rows) },
        head: vec![elem, half, ("out4", vec4_of(out.dtype))],
        dims: v.to_vec(),
        reads: vec![weights, a.kv],
        write: out,
        layout: Layout::Rows,
        wide,
    };
    product::record_bare(g, product);
}
