//! layer_norm against (x - mean) / √(var + eps) · gamma + beta over the channels of each row.

use scumble::gpu::DType;
use scumble::ops::layer_norm::{ENDING, layer_norm};
use scumble::ops::matmul::matmul;
use scumble::ops::{Activation, Linear};

use crate::compare::{F32_LARGE_MEAN, Limit, check, limit};
use crate::epilogue::{Bias, Form, HostEpilogue, PLAIN};
use crate::harness::{Place, everywhere, together};
use crate::matmul::product;
use crate::values::{Draws, Host, HostNorm, normal, normal_at, weights};

pub fn reference(x: &Host, norm: &HostNorm) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.values.len());
    for row in x.values.chunks_exact(x.channels()) {
        let count = row.len() as f64;
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        let scale = 1.0 / (variance + f64::from(norm.eps)).sqrt();
        out.extend(
            row.iter().zip(&norm.gamma.values).zip(&norm.beta.values).map(|((v, g), b)| (v - mean) * scale * g + b),
        );
    }
    out
}

fn check_case(place: &Place, dtype: DType, limit: Limit, dims: [u32; 4], mean: f64) {
    let x = normal_at(31, dims, dtype, mean, 1.0);
    let norm = HostNorm::new(32, dims[3], 1e-5);
    let mut run = place.start(dtype);
    let input = run.bind(&x);
    let params = norm.norm(&run.gpu);
    let out = layer_norm(&mut run.g, input, &params);
    assert_eq!(out.dims, dims);
    // A subgroup of few lanes does not hold wide rows.
    assert!(run.forced(place) || (place.variant == "subgroup" && dims[3] > 512));
    let got = run.finish(&[out]);
    check(place, limit, &format!("{dtype:?} {dims:?} mean {mean}"), &got[0], &reference(&x, &norm));
}

#[test]
fn every_width() {
    everywhere("layer_norm", |place| {
        for dtype in place.activations() {
            for (rows, channels) in [(1, 4), (7, 12), (130, 32), (65, 96), (3, 260), (5, 768), (2, 1280)] {
                check_case(place, dtype, limit(dtype), [1, 1, rows, channels], 0.5);
            }
        }
    });
}

#[test]
fn a_batch_of_grids() {
    everywhere("layer_norm", |place| check_case(place, DType::F32, limit(DType::F32), [2, 3, 5, 20], 0.0));
}

#[test]
fn a_large_mean_does_not_cancel() {
    everywhere("layer_norm", |place| check_case(place, DType::F32, F32_LARGE_MEAN, [1, 1, 9, 320], 1e3));
}

/// More rows than one dimension of a dispatch has workgroups: the grid folds.
#[test]
fn more_rows_than_a_grid_is_wide() {
    everywhere("layer_norm", |place| check_case(place, DType::F32, limit(DType::F32), [1, 1, 65_600, 4], 0.0));
}

#[test]
fn ragged_shapes() {
    everywhere("layer_norm", |place| {
        for mut draw in Draws::cases(5) {
            let dtype = draw.pick(&place.activations().collect::<Vec<_>>());
            let dims = [draw.of(1, 3), 1, draw.of(1, 150), 4 * draw.of(1, 128)];
            check_case(place, dtype, limit(dtype), dims, 0.5);
        }
    });
}

/// The norm of what a product [rows, k] by [k, n] gives. Where the product is in shares and has rows enough, the norm ends it.
fn after_a_product(place: &Place, dtype: DType, [rows, k, n]: [u32; 3], form: Form) -> bool {
    let weight_type = if place.takes(&[DType::F16]) { DType::F16 } else { dtype };
    let (a, weight) = (normal(31, [1, 1, rows, k], dtype), weights(32, k, n, weight_type));
    let epilogue = HostEpilogue::new(form, rows, n, dtype);
    let norm = HostNorm::new(34, n, 1e-5);
    let mut run = place.start(dtype);
    let input = run.bind(&a);
    let layer = Linear { weight: weight.param(&run.gpu), bias: epilogue.own(&run.gpu) };
    let bound = epilogue.bind(&mut run, [1, 1, rows, n]);
    let params = norm.norm(&run.gpu);
    let x = matmul(&mut run.g, input, &layer, bound);
    let out = layer_norm(&mut run.g, x, &params);
    let ended = run.g.nodes().iter().any(|node| node.variant == ENDING);
    assert!(!ended || run.g.nodes().len() == 2, "the product's sum and the norm are one dispatch");
    let got = run.finish(&[x, out]);
    let what = format!("{dtype:?} {rows}x{k}x{n} after {form:?}");
    let x = Host::new([1, 1, rows, n], dtype, epilogue.reference(&product(&a, &weight)));
    check(place, limit(dtype), &what, &got[0], &x.values);
    check(place, limit(dtype), &what, &got[1], &reference(&x, &norm));
    ended
}

/// Shares with every epilogue; rows that do not fill the last workgroup; channels that eight do not divide.
#[test]
fn norms_end_products() {
    for method in ["tile", "coop"] {
        together(&[("layer_norm", "subgroup"), ("matmul", method)], |place| {
            for dtype in place.activations() {
                let forms = [
                    (PLAIN, 40),
                    (Form { residual: true, ..PLAIN }, 40),
                    (Form { bias: Bias::Rows { rows: 228, offset: 8 }, residual: true, ..PLAIN }, 36),
                    (Form { bias: Bias::None, activation: Activation::Silu, residual: true, ..PLAIN }, 136),
                ];
                for (form, n) in forms {
                    let ended = after_a_product(place, dtype, [2049, 1536, n], form);
                    // Matrices of 8 make tiles so small that so many rows need no shares.
                    let whole =
                        method == "coop" && (dtype == DType::F32 || !place.gpu.caps().cooperative.contains(&16));
                    assert!(ended || whole, "{method} {n} {form:?}: no shares");
                }
                assert!(!after_a_product(place, dtype, [65, 1536, 40], PLAIN), "few rows do not fill a device");
            }
        });
    }
}
