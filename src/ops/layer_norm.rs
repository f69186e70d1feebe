//! layer_norm: normalise the channels of each token.

use super::{Norm, Variant, choose, product, source, vec4_of};
use crate::gpu::DType;
use crate::gpu::graph::{Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("layer_norm/portable.wgsl", "lib/linear.wgsl");
static WORKGROUP: Source = source!("layer_norm/workgroup.wgsl");
static SUBGROUP: Source = source!("layer_norm/subgroup.wgsl");

/// What the table looks at.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows.
    pub rows: u32,
    /// Groups of four channels that a lane of a subgroup would hold.
    pub per: u32,
    /// Lanes of a subgroup that share a row.
    pub span: u32,
}

/// Invocations of a workgroup of the `subgroup` variant.
const THREADS: u32 = 128;
/// Groups of four channels that a lane holds at most while others of its subgroup are free.
const HELD: u32 = 10;

/// The variants, the fastest first.
pub static VARIANTS: &[Variant<Dims>] = &[
    Variant {
        name: "subgroup",
        source: &SUBGROUP,
        needs: |caps| !caps.is_cpu() && caps.lanes().is_some_and(u32::is_power_of_two) && THREADS <= caps.invocations,
        // More leave registers.
        fits: |d| d.per <= 16,
        grid: |d| linear_grid(u64::from(d.rows.div_ceil(THREADS / d.span)), 1),
    },
    Variant {
        name: "workgroup",
        source: &WORKGROUP,
        needs: |caps| !caps.is_cpu(),
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.rows), 1),
    },
    Variant {
        name: "portable",
        source: &PORTABLE,
        needs: |_| true,
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.rows), 64),
    },
];

/// The norm that ends the product before it as well, as dispatches are named.
pub const ENDING: &str = "subgroup of shares";
/// Rows from which it does: an H200 is not full of fewer, and their sum is faster in a dispatch that is.
const ENDED: u32 = 2048;

/// Record layer norm of x [B, H, W, C] over C. Where x was just summed from a product's shares, the norm does that as well: a launch
/// and a way to memory less.
pub fn layer_norm(g: &mut Graph, x: Tensor, norm: &Norm) -> Tensor {
    assert_eq!(norm.gamma.dims[3], x.channels(), "layer_norm: gamma for {:?}", x.dims);
    let rows = x.rows();
    let lanes = g.caps().lanes().unwrap_or(1);
    let fours = x.channels() / 4;
    let span = fours.div_ceil(HELD).next_power_of_two().min(lanes);
    let dims = Dims { rows, per: fours.div_ceil(span), span };
    let variant = choose(g, "layer_norm", VARIANTS, &dims);
    // Tuning times both apart.
    let shares = product::ending(g, x) == Some(product::Ending::Shares);
    let reduce = match shares && variant.name == "subgroup" && rows >= ENDED && g.trial.is_none() {
        true => product::take_sum(g, x),
        false => None,
    };
    let head = if variant.name == "subgroup" {
        // Loads and stores of 16 bytes where the rows have room for them.
        let two = x.dtype == DType::F16 && fours.is_multiple_of(2);
        let loaded = if two { Value::Type("vec4<u32>") } else { vec4_of(x.dtype) };
        let width = 1 + u32::from(two);
        let values = [("FOURS", width), ("SPAN", span), ("PER", (fours / width).div_ceil(span))];
        let values = values.map(|(name, value)| (name, Value::U32(value)));
        std::iter::once(("loaded", loaded)).chain(values).collect()
    } else {
        vec![("elem4", vec4_of(x.dtype))]
    };
    let (gamma, beta) = (norm.gamma.bind(g), norm.beta.bind(g));
    let out = g.activation("layer norm", x.dims);
    assert_eq!(out.dtype, x.dtype, "layer_norm: input and output types");
    let mut node = Node {
        op: "layer_norm",
        variant: variant.name,
        kernel: Kernel { source: variant.source, libs: vec![], head },
        reads: vec![x, gamma, beta],
        writes: vec![out],
        dims: vec![rows, fours, norm.eps.to_bits()],
        step: false,
        grid: (variant.grid)(&dims),
        flops: 7 * x.len(),
    };
    if let Some(reduce) = reduce {
        node.variant = ENDING;
        node.kernel.libs = product::ended_libs(&reduce);
        node.kernel.head.extend(product::ended_head(&reduce));
        node.reads = [&reduce.reads[..], &[gamma, beta]].concat();
        node.writes = vec![x, out];
        // Its rows are ours.
        node.dims.extend(&reduce.dims[1..]);
        node.flops += reduce.flops;
    }
    g.push(node);
    out
}
