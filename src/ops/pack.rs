//! pack: the network's input, c_in · x in its element type, repeated for uncond and cond.

use super::{source, vec4_of};
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("pack/portable.wgsl", "lib/linear.wgsl", "lib/step.wgsl");

/// Record out = c_in x, x [B, h, w, C] repeated `times` along the batch: [times · B, h, w, C]. c_in is the step's. With
/// `extra` [1, h, w, C'] f32 those channels stand beside x's, unscaled: [times · B, h, w, C + C'].
pub fn pack(g: &mut Graph, x: Tensor, extra: Option<Tensor>, times: u32) -> Tensor {
    let [b, h, w, c] = x.dims;
    let more = extra.map_or(0, |extra| extra.channels());
    assert!(
        extra.is_none_or(|e| e.dims[..3] == [1, h, w] && e.dtype == DType::F32),
        "pack: {extra:?} beside {:?}",
        x.dims
    );
    let out = g.activation("network input", [b * times, h, w, c + more]);
    g.push(Node {
        op: "pack",
        variant: "portable",
        kernel: Kernel {
            source: &PORTABLE,
            libs: vec![],
            head: vec![("elem4", vec4_of(x.dtype)), ("out4", vec4_of(out.dtype)), ("EXTRA", Value::U32(more / 4))],
        },
        reads: vec![x, extra.unwrap_or(x)],
        writes: vec![out],
        dims: vec![(out.len() / 4) as u32, (x.len() / 4) as u32, c / 4, h * w],
        step: true,
        grid: linear_grid(out.len() / 4, 64),
        flops: out.len(),
    });
    out
}
