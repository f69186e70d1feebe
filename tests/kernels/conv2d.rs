//! conv2d against its definition: concatenate, resize, pad, then Σ over taps and channels, then the epilogue.

use scumble::gpu::DType;
use scumble::ops::conv2d::{Taps, conv2d, doubled, fold};
use scumble::ops::matmul::TYPES;
use scumble::ops::{Activation, Conv};

use crate::compare::{check, limit, limit_of};
use crate::epilogue::{Bias, Form, HostEpilogue, PLAIN};
use crate::harness::{Place, everywhere};
use crate::values::{Draws, Host, normal, weights};

/// One convolution: x [batch, h, w, c] and y [batch, h, w, c2] (none if 0) to `out` channels.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: u32,
    pub size: [u32; 2],
    pub channels: [u32; 2],
    pub out: u32,
    pub kernel: u32,
    pub taps: Taps,
    pub form: Form,
}

pub const BASE: Case = Case {
    batch: 1,
    size: [5, 5],
    channels: [8, 0],
    out: 12,
    kernel: 3,
    taps: Taps { stride: 1, pad: [1, 1], resize: None },
    form: PLAIN,
};

/// PyTorch's nearest neighbour: f32 scale, floor.
pub fn nearest(index: usize, from: u32, to: u32) -> usize {
    let scale = from as f32 / to as f32;
    ((index as f32 * scale) as usize).min(from as usize - 1)
}

/// [batch, H, W, C + C'] after concatenation and resize, and H, W.
fn input(case: &Case, x: &Host, y: &Host) -> (Vec<f64>, [u32; 2]) {
    let ([h, w], size) = (case.size, case.taps.resize.unwrap_or(case.size));
    let mut all = Vec::new();
    for b in 0..case.batch as usize {
        for i in 0..size[0] as usize {
            for j in 0..size[1] as usize {
                let pixel = (b * h as usize + nearest(i, h, size[0])) * w as usize + nearest(j, w, size[1]);
                for (source, c) in [(x, case.channels[0] as usize), (y, case.channels[1] as usize)] {
                    all.extend_from_slice(&source.values[pixel * c..(pixel + 1) * c]);
                }
            }
        }
    }
    (all, size)
}

/// out[b, y, x, o] = Σ_i Σ_j Σ_c in[b, y s + i - pad, x s + j - pad, c] w[(i k + j) C + c, o], zero outside.
pub fn convolve(case: &Case, x: &Host, y: &Host, weight: &Host) -> (Vec<f64>, [u32; 4]) {
    let (image, [h, w]) = input(case, x, y);
    let (k, c, n) = (case.kernel as usize, (case.channels[0] + case.channels[1]) as usize, case.out as usize);
    let Taps { stride, pad: [before, after], .. } = case.taps;
    let size = |len: u32| (len + before + after - case.kernel) / stride + 1;
    let dims = [case.batch, size(h), size(w), case.out];
    let mut out = Vec::new();
    for at in 0..(dims[0] * dims[1] * dims[2]) as usize {
        let (b, oy, ox) =
            (at / (dims[1] * dims[2]) as usize, at / dims[2] as usize % dims[1] as usize, at % dims[2] as usize);
        let mut sums = vec![0.0; n];
        for tap in 0..k * k {
            let iy = (oy * stride as usize + tap / k).wrapping_sub(before as usize);
            let ix = (ox * stride as usize + tap % k).wrapping_sub(before as usize);
            if iy >= h as usize || ix >= w as usize {
                continue;
            }
            let pixel = (b * h as usize + iy) * w as usize + ix;
            for i in 0..c {
                let row = &weight.values[(tap * c + i) * n..][..n];
                sums.iter_mut().zip(row).for_each(|(sum, weight)| *sum += image[pixel * c + i] * weight);
            }
        }
        out.extend(sums);
    }
    (out, dims)
}

fn check_case(place: &Place, types: (DType, DType, DType), case: Case) -> bool {
    let (a_type, b_type, c_type) = types;
    if !place.takes(&[a_type, b_type]) {
        return false;
    }
    let case = Case { form: Form { f32_out: a_type != c_type, ..case.form }, ..case };
    let Case { batch, size: [h, w], channels: [c, c2], out, kernel, taps, form } = case;
    let x = normal(11, [batch, h, w, c], a_type);
    let y = Host { dims: [batch, h, w, c2], dtype: a_type, values: normal(12, [batch, h, w, c2], a_type).values };
    let weight = weights(13, kernel * kernel * (c + c2), out, b_type);
    let (sums, dims) = convolve(&case, &x, &y, &weight);
    let epilogue = HostEpilogue::new(form, dims[0] * dims[1] * dims[2], out, a_type);
    let mut run = place.start(a_type);
    let first = run.bind(&x);
    let second = (c2 > 0).then(|| run.bind(&y));
    let layer = Conv { weight: weight.param(&run.gpu), bias: epilogue.own(&run.gpu), kernel };
    let bound = epilogue.bind(&mut run, dims);
    let result = conv2d(&mut run.g, first, second, &layer, taps, bound);
    assert_eq!((result.dims, result.dtype), (dims, c_type), "{case:?}");
    if !run.suits(place) {
        return false;
    }
    let got = run.finish(&[result]);
    check(place, limit_of(place, c_type), &format!("{types:?} {case:?}"), &got[0], &epilogue.reference(&sums));
    true
}

const F32: (DType, DType, DType) = (DType::F32, DType::F32, DType::F32);
const F16: (DType, DType, DType) = (DType::F16, DType::F16, DType::F16);

// As for matmul: forms that need a text of their own run few types, since texts are what takes time to compile.

#[test]
fn same_size() {
    everywhere("conv2d", |place| {
        for (size, channels, out) in
            [([5, 5], 4, 4), ([7, 5], 12, 20), ([1, 1], 8, 8), ([1, 6], 4, 12), ([9, 1], 4, 100), ([12, 11], 36, 72)]
        {
            check_case(place, F32, Case { size, channels: [channels, 0], out, ..BASE });
            check_case(place, F32, Case { size, channels: [channels, 0], out, kernel: 1, taps: Taps::same(1), ..BASE });
        }
    });
}

#[test]
fn every_type() {
    everywhere("conv2d", |place| {
        for &types in TYPES {
            for (channels, out) in [(20, 12), (40, 36)] {
                check_case(place, types, Case { size: [9, 8], channels: [channels, 0], out, ..BASE });
            }
        }
    });
}

#[test]
fn a_batch() {
    everywhere("conv2d", |place| _ = check_case(place, F32, Case { batch: 2, size: [7, 9], ..BASE }));
}

#[test]
fn halving_as_the_unet_does() {
    everywhere("conv2d", |place| {
        for size in [[8, 8], [5, 5], [7, 4], [1, 3], [2, 1]] {
            check_case(place, F32, Case { batch: 2, size, taps: Taps::half(), ..BASE });
        }
    });
}

#[test]
fn halving_as_the_vae_does() {
    everywhere("conv2d", |place| {
        for size in [[8, 8], [5, 5], [7, 4], [2, 3]] {
            check_case(place, F32, Case { batch: 2, size, taps: Taps::half_after(), ..BASE });
        }
    });
}

#[test]
fn resize_then_convolve() {
    everywhere("conv2d", |place| {
        for (size, to) in [
            ([5, 5], [10, 10]),
            ([3, 5], [5, 9]),
            ([5, 3], [9, 5]),
            ([1, 2], [1, 3]),
            ([7, 13], [13, 25]),
            ([4, 4], [7, 8]),
        ] {
            check_case(place, F32, Case { batch: 2, size, taps: Taps::resized(to), ..BASE });
        }
    });
}

#[test]
fn two_sources() {
    everywhere("conv2d", |place| {
        for channels in [[8, 4], [4, 20], [36, 12]] {
            for types in [F32, F16] {
                check_case(place, types, Case { batch: 2, size: [5, 7], channels, ..BASE });
            }
            check_case(place, F32, Case { batch: 2, channels, kernel: 1, taps: Taps::same(1), ..BASE });
            check_case(place, F32, Case { channels, taps: Taps::resized([9, 10]), ..BASE });
        }
    });
}

/// Whole tiles, ragged ones, and few tiles of great depth, which several workgroups share.
#[test]
fn matrix_units() {
    everywhere("conv2d", |place| {
        let base = Case { batch: 2, size: [8, 8], channels: [32, 0], out: 64, ..BASE };
        place.must_run(check_case(place, F16, base));
        place.must_run(check_case(place, F16, Case { batch: 1, size: [7, 9], out: 36, ..base }));
        place.must_run(check_case(place, F16, Case { channels: [32, 64], ..base }));
        place.must_run(check_case(place, F16, Case { channels: [64, 32], kernel: 1, taps: Taps::same(1), ..base }));
        place.must_run(check_case(place, F16, Case { size: [9, 7], taps: Taps::half(), ..base }));
        place.must_run(check_case(place, F16, Case { size: [8, 6], taps: Taps::half_after(), ..base }));
        place.must_run(check_case(place, F16, Case { size: [5, 3], taps: Taps::resized([9, 6]), ..base }));
        let form = Form { residual: true, activation: Activation::Silu, ..PLAIN };
        place.must_run(check_case(
            place,
            F16,
            Case { batch: 1, size: [6, 5], channels: [128, 0], out: 32, form, ..base },
        ));
        let form = Form { bias: Bias::Rows { rows: 64, offset: 8 }, ..PLAIN };
        place.must_run(check_case(place, F16, Case { form, ..base }));
        place.must_run(check_case(place, (DType::F16, DType::F16, DType::F32), Case { out: 4, ..base }));
    });
}

/// The VAE on matrix units: sums, residual and result in f32; the input in f16 from a norm, or in f32 and beyond f16.
#[test]
fn half_operands_of_f32_activations() {
    everywhere("conv2d", |place| {
        if !place.takes(&[DType::F16]) {
            return;
        }
        for (input, size) in [(DType::F16, 1.0), (DType::F32, 5e4)] {
            let case = Case { size: [9, 7], channels: [64, 0], out: 36, ..BASE };
            let mut x = normal(11, [1, 9, 7, 64], input);
            x.values.iter_mut().for_each(|v| *v = f64::from((*v * size) as f32));
            let none = Host { dims: [1, 9, 7, 0], dtype: input, values: vec![] };
            let weight = weights(13, 9 * 64, 36, DType::F16);
            let (sums, dims) = convolve(&case, &x, &none, &weight);
            let form = Form { residual: true, ..PLAIN };
            let epilogue = HostEpilogue::new(form, 63, 36, DType::F32);
            let mut run = place.start(DType::F32);
            run.g.operands = DType::F16;
            let bound_x = run.bind(&x);
            let layer = Conv { weight: weight.param(&run.gpu), bias: epilogue.own(&run.gpu), kernel: 3 };
            let bound = epilogue.bind(&mut run, dims);
            let result = conv2d(&mut run.g, bound_x, None, &layer, case.taps, bound);
            assert_eq!(result.dtype, DType::F32);
            if !run.suits(place) {
                continue;
            }
            let got = run.finish(&[result]);
            let what = format!("{input:?} times {size:e}");
            check(place, limit(DType::F16), &what, &got[0], &epilogue.reference(&sums));
        }
    });
}

/// Doubling and convolution as four convolutions on the small picture: whole tiles, ragged ones, and shares; f16, and f32 activations
/// with f16 operands.
#[test]
fn matrix_units_after_doubling() {
    everywhere("conv2d", |place| {
        if !place.takes(&[DType::F16]) {
            return;
        }
        for (dtype, operands) in [(DType::F16, DType::F16), (DType::F32, DType::F16), (DType::F32, DType::F32)] {
            for (batch, [h, w], c, n) in [(2, [5, 3], 32, 36), (1, [8, 8], 64, 64), (1, [4, 6], 320, 32)] {
                let taps = Taps::resized([2 * h, 2 * w]);
                let case = Case { batch, size: [h, w], channels: [c, 0], out: n, taps, ..BASE };
                let x = normal(11, [batch, h, w, c], dtype);
                let none = Host { dims: [batch, h, w, 0], dtype, values: vec![] };
                let weight = weights(13, 9 * c, n, DType::F16);
                let (sums, dims) = convolve(&case, &x, &none, &weight);
                let epilogue =
                    HostEpilogue::new(Form { residual: true, ..PLAIN }, dims[0] * dims[1] * dims[2], n, dtype);
                let mut run = place.start(dtype);
                run.g.operands = operands;
                let input = run.bind(&x);
                let layer = Conv { weight: weight.param(&run.gpu), bias: epilogue.own(&run.gpu), kernel: 3 };
                let bound = epilogue.bind(&mut run, dims);
                let Some(folded) = fold(&mut run.g, &layer, batch * h * w) else {
                    let takes = place.variant == "tile" || (place.variant == "coop" && operands == DType::F16);
                    assert!(!takes, "{case:?} fits tiles");
                    continue;
                };
                let result = doubled(&mut run.g, input, &layer, folded, bound);
                assert_eq!((result.dims, result.dtype), (dims, dtype));
                let got = run.finish(&[result]);
                // Without f16 operands the sums of weights stay exact.
                let limit = if operands == DType::F32 { limit(dtype) } else { limit(DType::F16) };
                check(place, limit, &format!("{dtype:?} {operands:?} {case:?}"), &got[0], &epilogue.reference(&sums));
            }
        }
    });
}

#[test]
fn epilogues() {
    everywhere("conv2d", |place| {
        let forms = [
            Form { bias: Bias::None, ..PLAIN },
            Form { bias: Bias::None, residual: true, ..PLAIN },
            Form { residual: true, ..PLAIN },
            Form { activation: Activation::Silu, ..PLAIN },
            // The time projections of a residual block: one row for the batch, or one an image.
            Form { bias: Bias::Rows { rows: 70, offset: 8 }, ..PLAIN },
            Form { bias: Bias::Rows { rows: 35, offset: 4 }, residual: true, ..PLAIN },
        ];
        for form in forms {
            check_case(place, F32, Case { batch: 2, size: [7, 5], form, ..BASE });
        }
        check_case(place, F16, Case { form: Form { residual: true, ..PLAIN }, ..BASE });
    });
}

#[test]
fn ragged_shapes() {
    everywhere("conv2d", |place| {
        for mut draw in Draws::cases(2) {
            let types = draw.pick(TYPES);
            let unit = draw.pick(&[4, 32]);
            let channels = [unit * draw.of(1, 3), if draw.of(0, 2) == 0 { unit * draw.of(1, 2) } else { 0 }];
            let size = [draw.of(1, 19), draw.of(1, 19)];
            let twice = |n: u32| (2 * n - 1).max(2);
            let resized = [twice(size[0]) + draw.of(0, 1), twice(size[1]) + draw.of(0, 1)];
            let (kernel, taps) = match draw.of(0, 4) {
                0 => (1, Taps::same(1)),
                1 => (3, Taps::half()),
                2 if size[0] > 1 && size[1] > 1 => (3, Taps::half_after()),
                3 => (3, Taps::resized(resized)),
                _ => (3, Taps::same(3)),
            };
            let (batch, out) = (draw.of(1, 3), 4 * draw.of(1, 20));
            check_case(place, types, Case { batch, size, channels, out, kernel, taps, form: PLAIN });
        }
    });
}
