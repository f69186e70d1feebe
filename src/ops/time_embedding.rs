//! time_embedding: sinusoids of the timesteps of all calls.

use super::{Param, source};
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("time_embedding/portable.wgsl", "lib/linear.wgsl");

/// The frequencies exp(-ln(10000) i / (half - shift)) for i < half: computed here, since WGSL's exp is not exact enough to be
/// multiplied by 1000.
pub fn frequencies(half: u32, shift: f32) -> Vec<f32> {
    let step = 10_000f64.ln() / (f64::from(half) - f64::from(shift));
    (0..half).map(|i| (-step * f64::from(i)).exp() as f32).collect()
}

/// How many timesteps there are.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Calls.
    pub calls: u32,
    /// Of a call, in the tensor of timesteps.
    pub given: u32,
    /// Of a call, in the result, a multiple of those: repeated in turn.
    pub out: u32,
}

/// Record [rows.out, 1, rows.calls, 2 half] f32: cosines then sines (`cos_first`, diffusers' flip_sin_to_cos) of the timesteps
/// of all calls. `timesteps` holds [calls, rows.given] floats, `frequencies` half.
pub fn time_embedding(g: &mut Graph, timesteps: Tensor, frequencies: &Param, rows: Rows, cos_first: bool) -> Tensor {
    let half = frequencies.dims[3];
    assert!(rows.out.is_multiple_of(rows.given), "time_embedding: {rows:?}");
    let Rows { calls, given, out: rows } = rows;
    let table = frequencies.bind(g);
    let out = g.activation_f32("time embedding", [rows, 1, calls, 2 * half]);
    g.push(Node {
        op: "time_embedding",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head: vec![("COS_FIRST", Value::Bool(cos_first))] },
        reads: vec![timesteps, table],
        writes: vec![out],
        dims: vec![rows, calls, half, given],
        step: false,
        grid: linear_grid(u64::from(rows * calls) * u64::from(half), 64),
        flops: 20 * out.len(),
    });
    out
}
