//! group_norm: normalise groups of channels over an image, with SiLU if asked; two sources in place of a concatenation.

use super::{Norm, source, vec4_of};
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static SUMS: Source = source!("group_norm/sums.wgsl", "lib/linear.wgsl");
static MERGE: Source = source!("group_norm/merge.wgsl", "lib/linear.wgsl");
static APPLY: Source = source!("group_norm/apply.wgsl", "lib/linear.wgsl");

/// Record group norm of x [B, H, W, C] (and y [B, H, W, C'] beside it); the result is [B, H, W, C + C'].
/// Statistics are merged in f32 from chunks of pixels, so that large means lose no digits.
pub fn group_norm(g: &mut Graph, x: Tensor, y: Option<Tensor>, norm: &Norm, groups: u32, silu: bool) -> Tensor {
    let [batch, h, w, x_channels] = x.dims;
    let y_channels = y.map_or(0, |y| y.channels());
    let channels = x_channels + y_channels;
    assert!(channels.is_multiple_of(groups), "group_norm: {channels} channels in {groups} groups");
    assert_eq!(norm.gamma.dims[3], channels, "group_norm: gamma for {:?} + {y_channels}", x.dims);
    let pixels = h * w;
    // Enough chunks to fill a GPU, few enough for one thread to merge them.
    let chunk = pixels.div_ceil(64).max(16);
    let chunks = pixels.div_ceil(chunk);
    let (x4, y4, c4) = (x_channels / 4, y_channels / 4, channels / 4);
    let sources = [x, y.unwrap_or(x)];
    let two = ("TWO_SOURCES", Value::Bool(y.is_some()));
    let elem = ("elem4", vec4_of(x.dtype));
    let sums = g.activation_f32("group norm sums", [batch, chunks, c4, 8]);
    let affine = g.activation_f32("group norm affine", [batch, 1, c4, 8]);
    let out = g.activation("group norm", [batch, h, w, channels]);
    assert_eq!(out.dtype, x.dtype, "group_norm: input and output types");
    let elements = x.len() + y.map_or(0, |y| y.len());
    g.push(Node {
        op: "group_norm",
        variant: "sums",
        kernel: Kernel { source: &SUMS, libs: vec![], head: vec![elem.clone(), two.clone()] },
        reads: sources.to_vec(),
        writes: vec![sums],
        dims: vec![batch, pixels, x4, y4, chunks, chunk],
        step: false,
        grid: linear_grid(u64::from(batch * chunks) * u64::from(c4), 64),
        flops: 3 * elements,
    });
    let (gamma, beta) = (norm.gamma.bind(g), norm.beta.bind(g));
    g.push(Node {
        op: "group_norm",
        variant: "merge",
        kernel: Kernel { source: &MERGE, libs: vec![], head: vec![] },
        reads: vec![sums, gamma, beta],
        writes: vec![affine],
        dims: vec![batch, pixels, channels, channels / groups, chunks, chunk, norm.eps.to_bits()],
        step: false,
        grid: linear_grid(u64::from(batch) * u64::from(channels), 64),
        flops: 8 * sums.len(),
    });
    g.push(Node {
        op: "group_norm",
        variant: "apply",
        kernel: Kernel { source: &APPLY, libs: vec![], head: vec![elem, two, ("SILU", Value::Bool(silu))] },
        reads: vec![sources[0], sources[1], affine],
        writes: vec![out],
        dims: vec![batch, pixels, x4, y4],
        step: false,
        grid: linear_grid(out.len() / 4, 64),
        flops: 2 * elements,
    });
    out
}
