//! lincomb: Σ c_i x_i of up to four f32 tensors, the sampler's arithmetic.

use super::source;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("lincomb/portable.wgsl", "lib/linear.wgsl");

/// Terms that one dispatch can add.
pub const MAX_TERMS: usize = 4;

/// Record out = Σ c_i terms[i]; the coefficients are the step's ([`Coefficients`]).
pub fn lincomb(g: &mut Graph, out: Tensor, terms: &[Tensor]) {
    assert!((1..=MAX_TERMS).contains(&terms.len()), "lincomb: {} terms", terms.len());
    assert!(terms.iter().all(|t| t.dims == out.dims && t.dtype == DType::F32), "lincomb: terms for {:?}", out.dims);
    g.push(Node {
        op: "lincomb",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![("TERMS", Value::U32(terms.len() as u32))] },
        reads: (0..MAX_TERMS).map(|i| *terms.get(i).unwrap_or(&terms[0])).collect(),
        writes: vec![out],
        dims: vec![(out.len() / 4) as u32],
        step: true,
        grid: linear_grid(out.len() / 4, 64),
        flops: 2 * out.len() * terms.len() as u64,
    });
}
