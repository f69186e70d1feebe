//! fma: multiply-adds and nothing else, to measure what a device could do at most without matrix units.

use super::{source, vec4_of};
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("fma/portable.wgsl", "lib/linear.wgsl");

/// Record `rounds` times eight multiply-adds of four numbers in each of `threads` threads, in `dtype`, from 64 factors `x` [1, 1, 1, 256]
/// f32; what they end at is [1, 1, threads, 4] f32.
pub fn fma(g: &mut Graph, x: Tensor, dtype: DType, threads: u32, rounds: u32) -> Tensor {
    assert_eq!((x.len(), x.dtype), (256, DType::F32), "fma: factors");
    let out = g.activation_f32("fma", [1, 1, threads, 4]);
    g.push(Node {
        op: "fma",
        variant: "portable",
        kernel: Kernel {
            source: &PORTABLE,
            libs: vec![],
            head: vec![("elem4", vec4_of(dtype)), ("ROUNDS", Value::U32(rounds))],
        },
        reads: vec![x],
        writes: vec![out],
        dims: vec![threads],
        step: false,
        grid: linear_grid(u64::from(threads), 64),
        flops: u64::from(threads) * u64::from(rounds) * 8 * 4 * 2,
    });
    out
}
