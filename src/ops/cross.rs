//! cross: attention to a short prompt in two products, what does not change from step to step folded into them.
//!
//! With q = x Wq and y = Σ softmax(q Kᵀ / √d) V Wo over the heads, Wq Kᵀ / √d and V Wo are the same for every step and every row: x times
//! the one, a softmax over each head's keys, times the other, and neither q nor the heads' outputs exist. For prompts of one chunk (77
//! tokens, [`KEYS`] with room) that is less work than the projections wherever a model has not many more heads than 640 / 80.

use super::product::{self, Product};
use super::row_sums::RowSums;
use super::tiles::{Layout, Method, Shape};
use super::{BiasRows, Epilogue, Linear, Row, matmul, source, vec4_of};
use crate::gpu::Caps;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static FOLD_KEYS: Source = source!("cross/keys.wgsl", "lib/linear.wgsl");
static FOLD_VALUES: Source = source!("cross/values.wgsl", "lib/linear.wgsl");

/// Folded, where the product of that shape fits, or in [`super::attention`] between its projections.
pub static VARIANTS: &[Row] = &[("coop", |caps| !caps.is_cpu() && suits(caps)), ("apart", |_| true)];

/// Does a subgroup have a whole number of lanes for a matrix? Those of a row find its maximum together.
pub(crate) fn suits(caps: &Caps) -> bool {
    caps.subgroups && caps.coop().is_some_and(|[edge, lanes]| (edge * edge / 4).is_multiple_of(lanes))
}

/// Keys that a head has room for: whole matrices, and the columns of one subgroup.
pub const KEYS: u32 = 80;
/// Folded keys of all heads beyond which they are more work than they save, unless there are as many channels.
const FEW: u32 = 800;

/// One cross-attention's weights for the prompts.
#[derive(Clone, Copy)]
pub struct Folded {
    /// [P, 1, C, heads · KEYS]
    pub keys: Tensor,
    /// [P, 1, heads · KEYS, C]
    pub values: Tensor,
    /// What the scores' products add, [P, 1, 1, heads · KEYS] f32: the query projection's bias by the keys.
    pub bias: Option<Tensor>,
    /// Keys that there are of each.
    pub tokens: u32,
}

impl Folded {
    /// Its tensors.
    pub fn tensors(&self) -> Vec<Tensor> {
        [self.keys, self.values].into_iter().chain(self.bias).collect()
    }

    /// The same of other tensors, in the order of [`Folded::tensors`].
    pub fn map(&self, mut of: impl FnMut(Tensor) -> Tensor) -> Folded {
        Folded { keys: of(self.keys), values: of(self.values), bias: self.bias.map(of), tokens: self.tokens }
    }
}

/// A product by folded weights, a slice for each prompt and its share of the `rows`; `whole` as [`Shape`] has it.
fn shape(rows: u32, [slices, _, k, n]: [u32; 4], whole: u32) -> Shape {
    Shape { m: rows / slices, n, k, slices, depth: k, whole, apart: false }
}

/// Record the folding of the projections `q` and `out` into `kv` [P, 1, S, 2·C] of `heads` heads. None where matrix units do not multiply the
/// result, or it is larger than what it saves.
pub fn fold(g: &mut Graph, q: &Linear, out: &Linear, kv: Tensor, heads: u32) -> Option<Folded> {
    let [prompts, _, tokens, width] = kv.dims;
    let (c, room) = (q.weight.dims[2], heads * KEYS);
    let [keys, values] = [[prompts, 1, c, room], [prompts, 1, room, c]];
    let types = [g.dtype, kv.dtype, q.weight.dtype, out.weight.dtype];
    let halves = types.iter().all(|&dtype| dtype == DType::F16);
    // As many rows as make a tile: how many there are is not known yet.
    let least = 64 * prompts;
    let shapes = [shape(least, keys, KEYS), shape(least, values, 0)];
    let fits = shapes.iter().all(|shape| product::fits(g, shape, Layout::Rows, [DType::F16; 2]));
    let square = q.weight.dims[3] == c && out.weight.dims == [1, 1, c, c] && width == 2 * c;
    let wanted = match g.forced_variant("cross") {
        Some(name) => name == "coop",
        // Whoever asks for another kernel of what is folded gets it.
        None => (VARIANTS[0].1)(g.caps()) && ["attention", "matmul"].iter().all(|op| g.forced_variant(op).is_none()),
    };
    if !(wanted && suits(g.caps()) && halves && fits && square && tokens <= KEYS && room <= c.max(FEW)) {
        return None;
    }
    let d4 = c / heads / 4;
    let own_bias = q.bias.as_ref().map(|bias| bias.bind(g));
    let (q, o) = (q.weight.bind(g), out.weight.bind(g));
    let [keys, values] = [keys, values].map(|dims| g.weights("folded context", dims, DType::F16));
    // Powers of two are what the kernels take.
    let scale = std::f64::consts::LOG2_E / f64::from(c / heads).sqrt();
    let bias = own_bias.map(|_| g.weights("folded bias", [prompts, 1, 1, room], DType::F32));
    let of_keys = vec![prompts, c, heads, d4, tokens, KEYS / 4, (scale as f32).to_bits()];
    let of_values = vec![prompts, c / 4, heads, d4, tokens, KEYS];
    for (variant, source, weight, folded, dims) in
        [("keys", &FOLD_KEYS, q, keys, of_keys), ("values", &FOLD_VALUES, o, values, of_values)]
    {
        let mut head = ["elem4", "weight4"].map(|name| (name, vec4_of(DType::F16))).to_vec();
        let (mut reads, mut writes) = (vec![weight, kv], vec![folded]);
        if let (Some(own), Some(bias), "keys") = (own_bias, bias, variant) {
            head.push(("BIASED", Value::U32(1)));
            reads.push(own);
            writes.push(bias);
        }
        g.push(Node {
            op: "cross_fold",
            variant,
            kernel: Kernel { source, libs: vec![], head },
            reads,
            writes,
            dims,
            step: false,
            grid: linear_grid(folded.len() / 4, 64),
            flops: folded.len() * 8 * u64::from(d4),
        });
    }
    Some(Folded { keys, values, bias, tokens })
}

/// Record attention of x [B, 1, T, C] to the prompts, images of one prompt side by side, and its output projection, whose bias is `out`'s:
/// [B, 1, T, C] + `residual`. With `normed` the query projection holds the norm before it, and x is that norm's input.
pub fn cross(
    g: &mut Graph,
    x: Tensor,
    normed: Option<RowSums>,
    folded: &Folded,
    out: &Linear,
    residual: Tensor,
) -> Tensor {
    let Folded { keys, values, bias, tokens } = *folded;
    let [b, h, w, c] = x.dims;
    assert_eq!((c, b % keys.batch()), (keys.height() * keys.width(), 0), "cross: x {:?}, keys {:?}", x.dims, keys.dims);
    let bias_rows = bias.map(|tensor| BiasRows { tensor, offset: 0, rows: x.rows() / keys.batch() });
    let plain = Epilogue { bias_rows, normed, ..Default::default() };
    let softmax = vec![("SOFTMAX", Value::U32(1)), ("KEYS", Value::U32(tokens))];
    let weights =
        part(g, [x, keys], shape(x.rows(), keys.dims, KEYS), [b, h, w, keys.channels()], softmax, (&plain, None));
    let epilogue = Epilogue::add(residual);
    part(g, [weights, values], shape(x.rows(), values.dims, 0), [b, h, w, c], vec![], (&epilogue, Some(out)))
}

fn part(
    g: &mut Graph,
    [a, b]: [Tensor; 2],
    shape: Shape,
    out: [u32; 4],
    head: Vec<(&'static str, Value)>,
    (epilogue, layer): (&Epilogue, Option<&Linear>),
) -> Tensor {
    let form = if shape.whole > 0 { "scores" } else { "values" };
    let Some(cut) = product::pick_cut(g, "cross", &shape, form, Method::Coop) else {
        unreachable!("cross: weights were folded for {:?}", a.dims)
    };
    let product = Product {
        op: "cross",
        sources: matmul::SOURCES,
        shape,
        cut,
        head,
        dims: vec![shape.m, shape.n / 4, shape.k / 4],
        reads: vec![a, b],
        narrowed: false,
        out,
        epilogue,
        bias: layer.and_then(|layer| layer.bias.as_ref()),
    };
    let out = product::record(g, product);
    g.picked();
    out
}
