//! group_norm against (x - mean) / √(var + eps) · gamma + beta over each group of each image, then SiLU.

use scumble::gpu::DType;
use scumble::ops::group_norm::{ENDING, group_norm};
use scumble::ops::matmul::matmul;
use scumble::ops::{Activation, Linear};

use crate::compare::{F32_LARGE_MEAN, Limit, check, limit};
use crate::epilogue::{Bias, Form, HostEpilogue, PLAIN, silu};
use crate::harness::{Place, everywhere, together};
use crate::matmul::product;
use crate::values::{Draws, Host, HostNorm, normal, normal_at, weights};

/// One norm of x [.., channels[0]] and y [.., channels[1]] (none if 0).
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub size: [u32; 3],
    pub channels: [u32; 2],
    pub groups: u32,
    pub silu: bool,
    pub mean: f64,
    pub deviation: f64,
    /// In f16 for a product to take, whatever the activations are.
    pub halves: bool,
}

pub const BASE: Case =
    Case { size: [2, 5, 7], channels: [12, 0], groups: 4, silu: false, mean: 0.3, deviation: 2.0, halves: false };

pub fn reference(case: &Case, x: &Host, y: &Host, norm: &HostNorm) -> Vec<f64> {
    let ([c, c2], pixels) = (case.channels.map(|c| c as usize), (case.size[1] * case.size[2]) as usize);
    let (all, group) = (c + c2, (c + c2) / case.groups as usize);
    let value = |pixel: usize, ch: usize| if ch < c { x.values[pixel * c + ch] } else { y.values[pixel * c2 + ch - c] };
    let mut out = vec![0.0; case.size[0] as usize * pixels * all];
    for image in 0..case.size[0] as usize {
        for first in (0..all).step_by(group) {
            let elements =
                || (0..pixels).flat_map(move |p| (first..first + group).map(move |ch| (image * pixels + p, ch)));
            let count = (pixels * group) as f64;
            let mean = elements().map(|(p, ch)| value(p, ch)).sum::<f64>() / count;
            let variance = elements().map(|(p, ch)| (value(p, ch) - mean).powi(2)).sum::<f64>() / count;
            for (p, ch) in elements() {
                let unit = (value(p, ch) - mean) / (variance + f64::from(norm.eps)).sqrt();
                let scaled = unit * norm.gamma.values[ch] + norm.beta.values[ch];
                out[p * all + ch] = if case.silu { silu(scaled) } else { scaled };
            }
        }
    }
    out
}

fn check_case(place: &Place, dtype: DType, limit: Limit, case: Case) {
    let ([b, h, w], [c, c2]) = (case.size, case.channels);
    let source = |seed, channels| normal_at(seed, [b, h, w, channels], dtype, case.mean, case.deviation);
    let (x, y) = (source(21, c), source(22, c2));
    let norm = HostNorm::new(23, c + c2, 1e-5);
    let mut run = place.start(dtype);
    run.g.operands = if case.halves { DType::F16 } else { dtype };
    let first = run.bind(&x);
    let second = (c2 > 0).then(|| run.bind(&y));
    let params = norm.norm(&run.gpu);
    let out = group_norm(&mut run.g, first, second, &params, case.groups, case.silu);
    assert_eq!((out.dims, out.dtype), ([b, h, w, c + c2], run.g.operands));
    let large = case.size[1] * case.size[2] > 1 << 16;
    let taken = run.g.nodes().iter().any(|node| (node.op, node.variant) == ("group_norm", place.variant));
    let narrow = (c + c2) / case.groups < 3;
    assert!(
        place.op != "group_norm" || taken || narrow || place.variant == "passes",
        "{case:?} fits {}",
        place.variant
    );
    let merges = run.g.nodes().iter().any(|node| node.op == "group_norm_merge");
    assert!(merges || !large, "{case:?}: no sums are merged");
    assert!(place.op != "group_norm_merge" || run.forced(place), "{case:?}: merged by another kernel");
    let got = run.finish(&[out]);
    check(place, limit, &format!("{dtype:?} {case:?}"), &got[0], &reference(&case, &x, &y, &norm));
}

/// In every variant of the norm, and of the merge of its sums.
fn all_norms(run: impl Fn(&Place)) {
    everywhere("group_norm", &run);
    everywhere("group_norm_merge", &run);
}

fn check_types(place: &Place, case: Case) {
    for dtype in place.activations() {
        check_case(place, dtype, limit(dtype), case);
    }
}

#[test]
fn groups_of_every_width() {
    all_norms(|place| {
        // Channels of a group: 1, 2, 3, 10, 5, 8, all.
        for (channels, groups) in [(4, 4), (8, 4), (12, 4), (40, 4), (40, 8), (64, 8), (20, 1)] {
            check_types(place, Case { channels: [channels, 0], groups, ..BASE });
        }
    });
}

/// More pixels than one workgroup norms, and more chunks than each merges for itself: the only ones whose sums another kernel merges, since one
/// name forces both.
#[test]
fn a_large_picture() {
    everywhere("group_norm_merge", |place| {
        let case = Case { size: [1, 261, 262], channels: [16, 0], groups: 1, silu: true, ..BASE };
        check_case(place, DType::F32, limit(DType::F32), case);
    });
}

#[test]
fn silu_after() {
    all_norms(|place| check_types(place, Case { silu: true, ..BASE }));
}

#[test]
fn halves_of_f32_activations() {
    all_norms(|place| {
        if place.takes(&[DType::F16]) {
            check_case(place, DType::F32, limit(DType::F16), Case { silu: true, halves: true, ..BASE });
        }
    });
}

/// The seam between the sources lies inside a group (10 of 20 channels with 3 groups: no; 8 + 4 in groups of 3: yes).
#[test]
fn two_sources_with_a_group_across_the_seam() {
    all_norms(|place| {
        for (channels, groups) in [([8, 4], 4), ([4, 20], 8), ([20, 20], 4), ([4, 16], 1)] {
            check_types(place, Case { channels, groups, silu: true, ..BASE });
        }
    });
}

/// More pixels than 64 chunks of 16, so that chunks grow; a last chunk that is short.
#[test]
fn many_chunks() {
    all_norms(|place| {
        for size in [[1, 33, 37], [2, 40, 40], [1, 1, 1], [1, 1, 17]] {
            check_types(place, Case { size, ..BASE });
        }
    });
}

/// Enough pixels for the widest workgroup, with lines that do not divide it.
#[test]
fn many_threads() {
    all_norms(|place| {
        for channels in [[80, 0], [48, 32]] {
            check_types(place, Case { size: [1, 39, 41], channels, silu: true, ..BASE });
        }
    });
}

#[test]
fn a_large_mean_does_not_cancel() {
    all_norms(|place| {
        for size in [[1, 5, 7], [1, 33, 37]] {
            check_case(place, DType::F32, F32_LARGE_MEAN, Case { size, mean: 1e3, deviation: 1.0, ..BASE });
        }
    });
}

/// Values at which a sum of squares leaves f16 and the mean of squares loses f32's digits.
#[test]
fn a_large_spread_does_not_overflow() {
    all_norms(|place| check_types(place, Case { mean: 100.0, deviation: 8000.0, ..BASE }));
}

#[test]
fn ragged_shapes() {
    all_norms(|place| {
        for mut draw in Draws::cases(4) {
            // Groups of any width, whole fours of channels in each source.
            let groups = draw.pick(&[1, 2, 4, 8, 32]);
            let channels = (groups * draw.of(1, 6)).next_multiple_of(4) * 4;
            let all = if channels % groups == 0 { channels } else { channels * groups };
            let second = if all > 4 && draw.of(0, 1) == 1 { 4 * draw.of(1, all / 4 - 1) } else { 0 };
            let size = [draw.of(1, 3), draw.of(1, 33), draw.of(1, 33)];
            check_types(place, Case { size, channels: [all - second, second], groups, ..BASE });
        }
    });
}

/// The norm of what a product gives as x, with y beside it where the case has one: what reads x first sums the product's shares.
/// Did it?
fn after_a_product(place: &Place, method: &str, dtype: DType, form: Form, case: Case) -> bool {
    let k = 1536;
    let ([b, h, w], [c, c2]) = (case.size, case.channels);
    let rows = b * h * w;
    let weight_type = if place.takes(&[DType::F16]) { DType::F16 } else { dtype };
    let (a, weight) = (normal(31, [b, h, w, k], dtype), weights(32, k, c, weight_type));
    let epilogue = HostEpilogue::new(form, rows, c, dtype);
    let y = normal_at(33, [b, h, w, c2.max(4)], dtype, case.mean, case.deviation);
    let norm = HostNorm::new(34, c + c2, 1e-5);
    let mut run = place.start(dtype);
    let input = run.bind(&a);
    let layer = Linear { weight: weight.param(&run.gpu), bias: epilogue.own(&run.gpu) };
    let bound = epilogue.bind(&mut run, [b, h, w, c]);
    let params = norm.norm(&run.gpu);
    let second = (c2 > 0).then(|| run.bind(&y));
    // By estimate, tiles of matrices of 8, a software device's, need no shares.
    run.g.trial = (method == "coop" && place.gpu.caps().is_cpu()).then_some(7);
    let x = matmul(&mut run.g, input, &layer, bound);
    run.g.trial = None;
    let out = group_norm(&mut run.g, x, second, &params, case.groups, case.silu);
    let names: Vec<&str> = run.g.nodes().iter().map(|node| node.variant).collect();
    let ended = names.contains(&ENDING);
    assert!(!names.contains(&"reduce"), "{names:?}: the product's sum is a dispatch of its own");
    let got = run.finish(&[x, out]);
    let what = format!("{dtype:?} after {form:?}, {case:?}");
    let x = Host::new([b, h, w, c], dtype, epilogue.reference(&product(&a, &weight)));
    check(place, limit(dtype), &what, &got[0], &x.values);
    check(place, limit(dtype), &what, &got[1], &reference(&case, &x, &y, &norm));
    ended
}

/// Shares with every epilogue; a second source, with a group across the seam; chunks and lines that do not divide the pixels.
#[test]
fn norms_end_products() {
    for (variant, method) in [("workgroup", "tile"), ("chunks", "tile"), ("workgroup", "coop"), ("chunks", "coop")] {
        together(&[("group_norm", variant), ("matmul", method)], |place| {
            for dtype in place.activations() {
                let cases = [
                    (PLAIN, [40, 0]),
                    (Form { residual: true, ..PLAIN }, [40, 20]),
                    (Form { bias: Bias::Rows { rows: 117, offset: 8 }, residual: true, ..PLAIN }, [36, 0]),
                    (Form { bias: Bias::None, activation: Activation::Silu, residual: true, ..PLAIN }, [44, 4]),
                ];
                for (form, channels) in cases {
                    let case = Case { size: [2, 9, 13], channels, silu: true, ..BASE };
                    let ended = after_a_product(place, method, dtype, form, case);
                    // Not f32 on matrix units.
                    let whole = method == "coop" && dtype == DType::F32;
                    assert!(ended || whole, "{method} {variant} {form:?}: no shares");
                }
            }
        });
    }
}
