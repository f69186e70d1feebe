//! touch: weights read ahead of the products that multiply by them, beside dispatches that leave the device's memory idle.
//!
//! All workgroups of a product walk along its weights together. Where those lie in memory, not in the cache, every step waits for
//! them: on an H200 a convolution of 640 channels takes 95 us with its weights in the cache and 149 without (benches/NOTES.md).

use super::{Row, source};
use crate::gpu::graph::{Graph, Node, Tensor};
use crate::gpu::kernel::{Kernel, Source, Value};

static PORTABLE: Source = source!("touch/portable.wgsl");

/// Whether weights are touched: only cards with matrix units were measured, and are fast enough for it to matter.
pub static VARIANTS: &[Row] = &[("portable", |caps| !caps.is_cpu() && caps.coop().is_some()), ("none", |_| true)];

/// Bytes that the cache fetches at once.
const LINE: u64 = 32;
/// Weights of one dispatch, as many as the kernel's dims have room for.
const MOST: usize = 7;
/// Bytes of one dispatch: they share the cache with activations until they are used.
const BYTES: u64 = 8 << 20;
/// Weights too large to stay there until their end is used, and too small to matter.
const WORTH: std::ops::RangeInclusive<u64> = 64 << 10..=16 << 20;
/// Rows that a product writes, those of every share of its depth counted, above which it is not worth it: shares each wait for weights of
/// their own, all multiprocessors together, and many rows multiply long by what came once.
const ROWS: u32 = 512;
/// Nodes from the first product that is touched for to the last.
const NEAR: usize = 3;
/// Workgroups: two for each multiprocessor.
const GROUPS: u32 = 264;

/// Insert into a recording what touches the weights of its products, each before the node ahead of its first reader.
pub fn touch(g: &mut Graph) {
    let wanted = match g.forced_variant("touch") {
        Some(name) => name == "portable",
        None => (VARIANTS[0].1)(g.caps()),
    };
    if !wanted {
        return;
    }
    let product = |node: &Node| {
        ["matmul", "conv2d", "attention", "cross", "chain"].contains(&node.op) && node.writes[0].rows() <= ROWS
    };
    let weights = g.constants(product, |tensor| WORTH.contains(&tensor.bytes()));
    let mut rest = &weights[..];
    let mut touches = Vec::new();
    while let Some((first, _)) = rest.first() {
        let mut bytes = 0;
        let fits = |(at, tensor): &&(usize, Tensor)| {
            bytes += tensor.bytes();
            bytes <= BYTES.max(tensor.bytes()) && *at <= first + NEAR
        };
        let count = rest.iter().take(MOST).take_while(fits).count();
        let (taken, left) = rest.split_at(count);
        rest = left;
        touches.push((first.saturating_sub(1), node(g, taken.iter().map(|(_, tensor)| *tensor).collect())));
    }
    g.insert(touches);
}

fn node(g: &mut Graph, weights: Vec<Tensor>) -> Node {
    let lines: Vec<u32> = weights.iter().map(|tensor| (tensor.bytes() / LINE) as u32).collect();
    // A workgroup has 256 threads.
    let groups = (lines.iter().sum::<u32>() / 512).clamp(1, GROUPS);
    let mut dims = vec![groups * 256];
    dims.extend(&lines);
    dims.resize(1 + MOST, 0);
    let head =
        vec![("COUNT", Value::U32(weights.len() as u32)), ("LINE", Value::U32(LINE as u32 / size_of::<u32>() as u32))];
    Node {
        op: "touch",
        variant: VARIANTS[0].0,
        kernel: Kernel { source: &PORTABLE, libs: vec![], head },
        reads: weights,
        writes: vec![g.sink("touched weights")],
        dims,
        step: false,
        grid: [groups, 1, 1],
        flops: 0,
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use pollster::block_on;

    use super::*;
    use crate::gpu::noop::NoopProfile;
    use crate::gpu::{DType, Gpu};
    use crate::ops::matmul::matmul;
    use crate::ops::{Epilogue, Linear, Param};

    /// Products one after the other, of K to N each.
    fn chain(profile: &NoopProfile, sizes: &[u32]) -> Graph {
        let gpu = block_on(Gpu::noop(profile)).expect("noop");
        let mut g = Graph::new(&gpu, DType::F16);
        let mut x = g.argument("x", [1, 1, 64, sizes[0]], DType::F16);
        for pair in sizes.windows(2) {
            let dims = [1, 1, pair[0], pair[1]];
            let buffer = block_on(gpu.storage("weight", u64::from(pair[0] * pair[1]) * 2)).expect("a buffer");
            let layer = Linear { weight: Param { buffer, dims, dtype: DType::F16 }, bias: None };
            x = matmul(&mut g, x, &layer, Epilogue::default());
        }
        g
    }

    #[test]
    fn every_weight_is_touched_once_before_it_is_read() {
        // Too small, two together, one that is more than a dispatch takes but not too much, one that is too much, one in shares.
        let mut g = chain(&NoopProfile::H200, &[64, 320, 640, 1280, 5120, 5120, 64]);
        let before = g.nodes().len();
        touch(&mut g);
        let mut touched = Vec::new();
        let mut worth = Vec::new();
        for node in g.nodes() {
            if node.op == "touch" {
                let lines: Vec<u64> = node.dims[1..].iter().map(|&n| u64::from(n)).collect();
                assert!(node.reads.iter().zip(&lines).all(|(tensor, lines)| lines * LINE == tensor.bytes()));
                assert!(lines[node.reads.len()..].iter().all(|&n| n == 0));
                touched.extend(node.reads.iter().map(|tensor| tensor.dims));
            } else if node.variant != "reduce" {
                let weight = node.reads[1];
                if WORTH.contains(&weight.bytes()) && node.writes[0].rows() <= ROWS {
                    worth.push(weight.dims);
                    assert!(touched.contains(&weight.dims), "{:?} is read before it is touched", weight.dims);
                }
            }
        }
        assert_eq!(touched, worth);
        assert_eq!(worth.len(), 3);
        assert!(g.nodes().len() > before);
    }

    #[test]
    fn a_processor_touches_nothing() {
        let mut g = chain(&NoopProfile::LAVAPIPE_26, &[64, 320, 640]);
        touch(&mut g);
        assert!(g.nodes().iter().all(|node| node.op != "touch"));
    }

    #[test]
    fn what_was_picked_keeps_its_nodes() {
        let mut g = chain(&NoopProfile::H200, &[320, 1280, 1280, 320]);
        let ops = |g: &Graph| -> Vec<Vec<String>> {
            let own = |range: std::ops::Range<usize>| {
                let nodes = g.nodes()[range].iter().filter(|node| node.op != "touch");
                nodes.map(|node| format!("{} {}", node.variant, node.shapes())).collect()
            };
            g.picked_nodes().map(own).collect()
        };
        let before = ops(&g);
        touch(&mut g);
        assert_eq!(ops(&g), before);
        assert_eq!(before.len(), 3);
    }
}
