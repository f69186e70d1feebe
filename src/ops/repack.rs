//! repack: a weight as it lies in its file to how the kernels read it, with LoRA's low-rank product added. Runs at load.

use super::source;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("repack/portable.wgsl", "lib/linear.wgsl");

/// Element type of a weight in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// 32-bit float.
    F32 = 0,
    /// 16-bit float.
    F16 = 1,
    /// The upper half of a 32-bit float.
    Bf16 = 2,
}

impl FileType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        if self == FileType::F32 { 4 } else { 2 }
    }
}

/// A matrix or the filters of a convolution, [n, c, taps] row by row, and where they go.
#[derive(Clone, Copy, Debug)]
pub struct Repack {
    /// Type of the elements in the file.
    pub file: FileType,
    /// Where the first element lies in the raw tensor, in u32.
    pub base: u32,
    /// Output channels.
    pub n: u32,
    /// Input channels.
    pub c: u32,
    /// Taps of a filter, 1 for a matrix.
    pub taps: u32,
    /// First column in the target.
    pub first: u32,
    /// Columns go four values, then their four gates, in turn: the up-projection of a GEGLU.
    pub geglu: bool,
    /// Where in `found` to leave two words: a value that is not finite, one too large for f16.
    pub slot: u32,
}

/// LoRA's factors.
#[derive(Clone, Copy)]
pub struct LowRank {
    /// [n, rank] f32, scales in it.
    pub up: Tensor,
    /// [rank, c · taps] f32.
    pub down: Tensor,
    /// Ranks of all LoRAs together.
    pub rank: u32,
}

/// Record the repacking of a weight in `raw` into `out` [1, 1, taps · c rounded up to 4, columns] (f32, f16 or packed).
pub fn repack(g: &mut Graph, raw: Tensor, out: Tensor, found: Tensor, r: &Repack, lora: Option<LowRank>) {
    let [_, _, k, columns] = out.dims;
    let c_padded = r.c.next_multiple_of(4);
    assert_eq!(k, r.taps * c_padded, "repack: [{}, {}, {}] into rows of {:?}", r.n, r.c, r.taps, out.dims);
    assert!(r.first.is_multiple_of(4) && r.first + r.n <= columns, "repack: {} columns from {} on", r.n, r.first);
    assert!(!r.geglu || r.n.is_multiple_of(8), "repack: values and gates in fours, of {}", r.n);
    let count = u64::from(k) * u64::from(r.n.div_ceil(4));
    let head = vec![
        ("SOURCE", Value::U32(r.file as u32)),
        ("HALF", Value::Bool(out.dtype != DType::F32)),
        ("RANK", Value::Bool(lora.is_some())),
    ];
    let factors = lora.unwrap_or(LowRank { up: raw, down: raw, rank: 0 });
    let geglu = if r.geglu { r.n / 2 } else { 0 };
    g.push(Node {
        op: "repack",
        variant: "portable",
        kernel: Kernel { source: &PORTABLE, libs: vec![], head },
        reads: vec![raw, factors.up, factors.down],
        writes: vec![out, found],
        dims: vec![count as u32, r.n, r.c, r.taps, c_padded, columns, r.first, geglu, r.base, factors.rank, r.slot],
        step: false,
        grid: linear_grid(count, 64),
        flops: 2 * count * 4 * u64::from(factors.rank),
    });
}
