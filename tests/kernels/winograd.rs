//! winograd: norm, SiLU and 3x3 convolution in tiles, and the norm after them, against each in turn by its definition.

use scumble::gpu::DType;
use scumble::ops::Conv;
use scumble::ops::group_norm::{ENDING, group_norm, group_norm_to_tiles};
use scumble::ops::winograd::{VARIANTS, fold, winograd};

use crate::compare::{WINOGRAD, check, limit};
use crate::conv2d::{self, convolve};
use crate::epilogue::{Bias, Form, HostEpilogue, PLAIN};
use crate::group_norm::{self, reference};
use crate::harness::{Place, everywhere, together};
use crate::values::{Draws, Host, HostNorm, normal, weights};

/// x [batch, h, w, c] and y [batch, h, w, c2] (none if 0) to `out` channels, with the norm before, in groups of four channels or more.
#[derive(Clone, Copy, Debug)]
struct Case {
    size: [u32; 3],
    channels: [u32; 2],
    out: u32,
    form: Form,
    /// A norm of the result, with z [batch, h, w, last] beside it (none if 0), comes after.
    then: Option<u32>,
    /// Which cut of the products.
    trial: usize,
}

const BASE: Case = Case { size: [2, 6, 10], channels: [64, 0], out: 48, form: PLAIN, then: None, trial: 0 };

fn norm_case(size: [u32; 3], channels: [u32; 2]) -> group_norm::Case {
    group_norm::Case { size, channels, groups: (channels[0] + channels[1]) / 4, silu: true, ..group_norm::BASE }
}

fn check_case(place: &Place, dtype: DType, case: Case) {
    let Case { size: [b, h, w], channels: [c, c2], out, form, then, trial } = case;
    let weight_type = if dtype == DType::F16 { DType::F16 } else { DType::F32 };
    let (x, y) = (normal(41, [b, h, w, c], dtype), normal(42, [b, h, w, c2.max(4)], dtype));
    let weight = weights(43, 9 * (c + c2), out, weight_type);
    let (before, after) = (HostNorm::new(44, c + c2, 1e-5), HostNorm::new(45, out + then.unwrap_or(0), 1e-5));
    let z = normal(46, [b, h, w, then.unwrap_or(0).max(4)], dtype);
    let epilogue = HostEpilogue::new(form, b * h * w, out, dtype);
    let mut run = place.start(dtype);
    let input = run.bind(&x);
    let second = (c2 > 0).then(|| run.bind(&y));
    let layer = Conv { weight: weight.param(&run.gpu), bias: epilogue.own(&run.gpu), kernel: 3 };
    let Some(folded) = fold(&mut run.g, &layer, [h, w]) else { panic!("{case:?}: no weights were transformed") };
    let params = before.norm(&run.gpu);
    let first = norm_case(case.size, case.channels);
    run.g.trial = Some(trial);
    let tiles = group_norm_to_tiles(&mut run.g, input, second, &params, first.groups, folded.tiles);
    let Some(tiles) = tiles else { panic!("{case:?}: {} stores no transforms", place.variant) };
    let bound = epilogue.bind(&mut run, [b, h, w, out]);
    let result = winograd(&mut run.g, tiles, [b, h, w], (folded, layer.bias.as_ref()), bound);
    assert_eq!((result.dims, result.dtype), ([b, h, w, out], dtype), "{case:?}");
    run.g.trial = None;

    let normed = Host { dims: [b, h, w, c + c2], dtype: DType::F32, values: reference(&first, &x, &y, &before) };
    let none = Host { dims: [b, h, w, 0], dtype, values: vec![] };
    let conv = conv2d::Case { batch: b, size: [h, w], channels: [c + c2, 0], out, ..conv2d::BASE };
    let want = epilogue.reference(&convolve(&conv, &normed, &none, &weight).0);
    let limit = if dtype == DType::F16 { WINOGRAD } else { limit(dtype) };
    let what = format!("{dtype:?} {case:?}");
    let Some(last) = then else {
        check(place, limit, &what, &run.finish(&[result])[0], &want);
        return;
    };
    let last_one = (last > 0).then(|| run.bind(&z));
    let params = after.norm(&run.gpu);
    let second = norm_case(case.size, [out, last]);
    let normed = group_norm(&mut run.g, result, last_one, &params, second.groups, true);
    let names: Vec<&str> = run.g.nodes().iter().map(|node| node.variant).collect();
    assert!(names.contains(&ENDING) && !names.contains(&"reduce"), "{what}: the norm did not end it: {names:?}");
    let got = run.finish(&[result, normed]);
    check(place, limit, &what, &got[0], &want);
    let want = Host { dims: [b, h, w, out], dtype: DType::F32, values: want };
    check(place, limit, &what, &got[1], &reference(&second, &want, &z, &after));
}

/// In all tiles, with every norm that stores transforms, on matrix units and by multiply-adds; f32 not on matrix units. A software device that has them leaves the rest to
/// the one that has none: it compiles for minutes.
fn all(run: impl Fn(&Place, DType)) {
    let ways = ["f2x2", "f2"].into_iter().flat_map(|tiles| ["workgroup", "chunks"].map(|norm| (tiles, norm)));
    for ((tiles, norm), method) in ways.flat_map(|way| ["coop", "tile"].map(|method| (way, method))) {
        together(&[("winograd", tiles), ("group_norm", norm), ("conv2d", method)], |place| {
            if method == "tile" && place.gpu.caps().is_cpu() && place.gpu.caps().coop().is_some() {
                return;
            }
            let types = place.activations().filter(|&dtype| method == "tile" || dtype == DType::F16);
            types.for_each(|dtype| run(place, dtype));
        });
    }
}

#[test]
fn convolutions_after_norms() {
    all(|place, dtype| {
        for trial in [0, 7] {
            check_case(place, dtype, Case { trial, ..BASE });
        }
        check_case(place, dtype, Case { channels: [32, 32], ..BASE });
        check_case(place, dtype, Case { size: [1, 2, 2], ..BASE });
        if place.variant == "f2" {
            check_case(place, dtype, Case { size: [2, 5, 8], ..BASE });
        }
    });
}

/// Enough pixels for threads with several tiles.
#[test]
fn a_large_picture() {
    for tiles in ["f2x2", "f2"] {
        together(&[("winograd", tiles), ("group_norm", "chunks"), ("conv2d", "tile")], |place| {
            let case = Case { size: [1, 130, 132], out: 8, then: Some(0), ..BASE };
            place.activations().for_each(|dtype| check_case(place, dtype, case));
        });
    }
}

/// Its products, and shares of them, with every epilogue; with a second source, chunks and lines that do not divide the pixels.
#[test]
fn norms_end_convolutions() {
    all(|place, dtype| {
        let cases = [
            (PLAIN, 0),
            (Form { residual: true, ..PLAIN }, 20),
            (Form { bias: Bias::Rows { rows: 60, offset: 8 }, ..PLAIN }, 0),
            (Form { bias: Bias::None, residual: true, ..PLAIN }, 8),
        ];
        for ((form, last), trial) in cases.into_iter().zip([0, 7, 3, 0]) {
            check_case(place, dtype, Case { form, then: Some(last), trial, ..BASE });
        }
    });
}

#[test]
fn ragged_shapes() {
    all(|place, dtype| {
        // Every one is a kernel of its own, slow to compile for a software device.
        let most = if place.gpu.caps().is_cpu() { 4 } else { usize::MAX };
        for mut draw in Draws::cases(6).take(most) {
            let size = [draw.of(1, 3), 2 * draw.of(1, 12), 2 * draw.of(1, 12)];
            let channels = [32 * draw.of(1, 3), 32 * draw.of(0, 2)];
            let then = [None, Some(0), Some(4 * draw.of(1, 9))][draw.of(0, 2) as usize];
            let case = Case { size, channels, out: 4 * draw.of(1, 24), then, trial: draw.of(0, 7) as usize, ..BASE };
            check_case(place, dtype, case);
        }
    });
}

/// Where it is not wanted, or sides are odd, weights are left alone.
#[test]
fn none_where_it_does_not_fit() {
    everywhere("winograd", |place| {
        let weight = weights(1, 9 * 32, 32, DType::F32);
        let layer = Conv { weight: weight.param(&place.gpu), bias: None, kernel: 3 };
        for (size, in_tiles) in [([5, 6], &["f2"][..]), ([6, 5], &[]), ([6, 6], &["f2x2", "f2"])] {
            let mut run = place.start(DType::F32);
            let found = fold(&mut run.g, &layer, size).is_some();
            if place.variant == "estimated" {
                // Where they fit and should be faster.
                assert!(!found || !in_tiles.is_empty(), "{size:?}");
                continue;
            }
            assert_eq!(found, in_tiles.contains(&place.variant), "{size:?} {}", place.variant);
        }
    });
    assert_eq!(VARIANTS.iter().map(|row| row.0).collect::<Vec<_>>(), ["estimated", "none", "f2x2", "f2"]);
}
