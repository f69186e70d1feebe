//! chain: two linear layers, one after the other with a residual between them, as one product.
//!
//! (x W₁ + b₁ + r) W₂ + b₂ is [x | r] times W₁ W₂ above W₂, plus b₁ W₂ + b₂: what is multiplied stays nearly the same where x is
//! wider than r, and a launch, a tensor and its way through memory are gone. So a transformer's last feed-forward ends in its projection out.

use super::conv2d;
use super::matmul::matmul;
use super::product::{self, Product};
use super::tiles::{Layout, Method, Shape};
use super::{BiasRows, Epilogue, Linear, Row, source, vec4_of};
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source};

static STACK: Source = source!("chain/portable.wgsl", "lib/linear.wgsl");

/// One product, where matrix units run it, or two.
pub static VARIANTS: &[Row] = &[("coop", |caps| !caps.is_cpu() && caps.coop().is_some()), ("apart", |_| true)];

/// Two layers as one.
#[derive(Clone, Copy, Debug)]
pub struct Chained {
    /// [1, 1, K + C, N]: W₁ W₂, then W₂.
    pub weight: Tensor,
    /// [1, 1, 1, N] f32: b₁ W₂ + b₂.
    pub bias: Tensor,
}

impl Chained {
    /// The same of other tensors: where they are bound elsewhere.
    pub fn map(&self, mut of: impl FnMut(Tensor) -> Tensor) -> Chained {
        Chained { weight: of(self.weight), bias: of(self.bias) }
    }
}

/// A product of so many rows by [`Chained::weight`], the residual of `between` channels.
fn shape(rows: u32, [_, _, k, n]: [u32; 4], between: u32) -> Shape {
    let depth = conv2d::common_divisor(k - between, between);
    Shape { m: rows, n, k, slices: 1, depth, whole: 0, apart: false }
}

/// Record the folding of `first` [K → C] into `second` [C → N], from the layers alone: once is enough. None where matrix units do not
/// multiply the result.
pub fn fold(g: &mut Graph, first: &Linear, second: &Linear) -> Option<Chained> {
    let ([_, _, k, c], [_, _, c_in, n]) = (first.weight.dims, second.weight.dims);
    assert_eq!(c, c_in, "chain: {:?}, then {:?}", first.weight.dims, second.weight.dims);
    let halves = [g.dtype, first.weight.dtype, second.weight.dtype].iter().all(|&dtype| dtype == DType::F16);
    let dims = [1, 1, k + c, n];
    // As many rows as make a tile: how many there are is not known yet.
    let fits = product::fits(g, &shape(64, dims, c), Layout::Rows, [DType::F16; 2]);
    let wanted = match g.forced_variant("chain") {
        Some(name) => name == "coop",
        // Whoever asks for another kernel of the two gets it.
        None => (VARIANTS[0].1)(g.caps()) && g.forced_variant("matmul").is_none(),
    };
    let (Some(b1), true) = (&first.bias, wanted && halves && fits) else { return None };
    let (above, below) = (first.weight.bind(g), second.weight.bind(g));
    let plain = Linear { weight: second.weight.clone(), bias: None };
    let above = matmul(g, above, &plain, Epilogue::default());
    let weight = g.weights("chained weights", dims, DType::F16);
    let first = (above.len() / 4) as u32;
    g.push(Node {
        op: "chain_fold",
        variant: "portable",
        kernel: Kernel { source: &STACK, libs: vec![], head: vec![("elem4", vec4_of(DType::F16))] },
        reads: vec![above, below],
        writes: vec![weight],
        dims: vec![first, (weight.len() / 4) as u32],
        step: false,
        grid: linear_grid(weight.len() / 4, 64),
        flops: 0,
    });
    let b1 = b1.bind(g);
    let bias = matmul(g, b1, second, Epilogue { f32_out: true, ..Default::default() });
    Some(Chained { weight, bias })
}

/// Record x [B, H, W, K] through both layers of `chained`, `between` [B, H, W, C] added after the first, `residual` after the second:
/// [B, H, W, N].
pub fn chain(g: &mut Graph, x: Tensor, between: Tensor, chained: &Chained, residual: Tensor) -> Tensor {
    let Chained { weight, bias } = *chained;
    let ([b, h, w, k], c) = (x.dims, between.channels());
    assert_eq!((between.rows(), k + c), (x.rows(), weight.width()), "chain: {:?}, {:?}", x.dims, between.dims);
    let shape = shape(x.rows(), weight.dims, c);
    let Some(cut) = product::pick_cut(g, "chain", &shape, "f16", Method::Coop) else {
        unreachable!("chain: weights were folded for {:?}", x.dims)
    };
    let bias_rows = Some(BiasRows { tensor: bias, offset: 0, rows: x.rows() });
    let (head, dims) = conv2d::beside([k, c], [b, h, w], shape.n);
    let product = Product {
        op: "chain",
        sources: conv2d::SOURCES,
        shape,
        cut,
        head,
        dims,
        reads: vec![x, between, weight],
        narrowed: false,
        out: [b, h, w, shape.n],
        epilogue: &Epilogue { bias_rows, residual: Some(residual), ..Default::default() },
        bias: None,
    };
    let out = product::record(g, product);
    g.picked();
    out
}
