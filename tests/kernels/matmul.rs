//! matmul against Σ_k a[m, k] b[k, n], then the epilogue.

use scumble::gpu::DType;
use scumble::ops::matmul::{TYPES, matmul};
use scumble::ops::{Activation, Epilogue, Linear};

use crate::compare::{check, limit, limit_of};
use crate::epilogue::{Bias, Form, HostEpilogue, PLAIN};
use crate::harness::{Place, everywhere};
use crate::values::{Draws, Host, normal, weights};

/// Σ_k a[m, k] b[k, n]
pub fn product(a: &Host, b: &Host) -> Vec<f64> {
    let (k, n) = (b.dims[2] as usize, b.dims[3] as usize);
    let mut c = Vec::with_capacity(a.values.len() / k * n);
    for row in a.values.chunks_exact(k) {
        c.extend((0..n).map(|j| (0..k).map(|i| row[i] * b.values[i * n + j]).sum::<f64>()));
    }
    c
}

/// One matmul of types (A, B, C) and shape [m, n, k].
fn case(place: &Place, types: (DType, DType, DType), [m, n, k]: [u32; 3], form: Form) -> bool {
    let (a_type, b_type, c_type) = types;
    if !place.takes(&[a_type, b_type]) {
        return false;
    }
    let form = Form { f32_out: a_type != c_type, ..form };
    let columns = if form.activation == Activation::Geglu { n / 2 } else { n };
    let (a, b) = (normal(1, [1, 1, m, k], a_type), weights(2, k, n, b_type));
    let epilogue = HostEpilogue::new(form, m, n, a_type);
    let mut run = place.start(a_type);
    let input = run.bind(&a);
    let layer = Linear { weight: b.param(&run.gpu), bias: epilogue.own(&run.gpu) };
    let bound = epilogue.bind(&mut run, [1, 1, m, columns]);
    let out = matmul(&mut run.g, input, &layer, bound);
    if !run.forced(place) {
        return false;
    }
    assert_eq!((out.dims, out.dtype), ([1, 1, m, columns], c_type));
    let got = run.finish(&[out]);
    check(
        place,
        limit_of(place, c_type),
        &format!("{types:?} m {m} n {n} k {k} {form:?}"),
        &got[0],
        &epilogue.reference(&product(&a, &b)),
    );
    true
}

const F32: (DType, DType, DType) = (DType::F32, DType::F32, DType::F32);
const F16: (DType, DType, DType) = (DType::F16, DType::F16, DType::F16);

// A kernel's text is compiled in seconds on a software device, so forms that need a text of their own run few shapes and
// types, and shapes that share one run many.

#[test]
fn awkward_shapes() {
    everywhere("matmul", |place| {
        for m in [1, 7, 8, 64, 130] {
            for (n, k) in [(4, 4), (12, 36), (20, 100), (64, 12), (100, 768), (192, 4), (192, 100)] {
                case(place, F32, [m, n, k], PLAIN);
            }
        }
    });
}

#[test]
fn every_type() {
    everywhere("matmul", |place| {
        for &types in TYPES {
            for shape in [[7, 12, 36], [65, 100, 100], [130, 64, 768]] {
                case(place, types, shape, PLAIN);
            }
        }
    });
}

/// Whole tiles, ragged ones, and few tiles of great depth, which several workgroups share.
#[test]
fn matrix_units() {
    use Activation as A;
    everywhere("matmul", |place| {
        for shape in [[32, 64, 32], [70, 36, 96], [9, 32, 64], [256, 160, 64], [128, 320, 32]] {
            place.must_run(case(place, F16, shape, PLAIN));
            place.must_run(case(place, (DType::F16, DType::F16, DType::F32), shape, PLAIN));
        }
        for shape in [[32, 32, 2048], [40, 44, 1024]] {
            place.must_run(case(
                place,
                F16,
                shape,
                Form { activation: A::Silu, bias: Bias::Own, residual: true, ..PLAIN },
            ));
        }
        // Rows of biases that tiles have one of, and that end within a tile.
        for rows in [128, 100] {
            let bias = Bias::Rows { rows, offset: 4 };
            place.must_run(case(place, F16, [256, 160, 64], Form { bias, residual: true, ..PLAIN }));
        }
        place.must_run(case(place, F16, [64, 64, 96], Form { activation: A::Geglu, bias: Bias::Own, ..PLAIN }));
        place.must_run(case(place, F16, [64, 64, 1024], Form { activation: A::Geglu, bias: Bias::Own, ..PLAIN }));
    });
}

#[test]
fn every_activation() {
    use Activation as A;
    everywhere("matmul", |place| {
        for activation in [A::None, A::Silu, A::Gelu, A::QuickGelu, A::Geglu] {
            for shape in [[65, 40, 36], [9, 8, 4]] {
                case(place, F32, shape, Form { activation, ..PLAIN });
            }
        }
        case(place, F16, [65, 40, 36], Form { activation: A::Geglu, ..PLAIN });
    });
}

/// Sums of some hundreds, where exp leaves f32: the activations must come out as 0 or x, not as NaN.
#[test]
fn saturated_activations() {
    use Activation as A;
    everywhere("matmul", |place| {
        for activation in [A::Silu, A::Gelu, A::QuickGelu] {
            let a = Host::new([1, 1, 8, 4], DType::F32, (0..32).map(|i| f64::from(i - 16) * 40.0));
            let identity = Host::new([1, 1, 4, 4], DType::F32, (0..16).map(|i| f64::from(u8::from(i % 5 == 0))));
            let epilogue = HostEpilogue::new(Form { activation, ..PLAIN }, 8, 4, DType::F32);
            let mut run = place.start(DType::F32);
            let input = run.bind(&a);
            let layer = Linear { weight: identity.param(&run.gpu), bias: epilogue.own(&run.gpu) };
            let out = matmul(&mut run.g, input, &layer, Epilogue::act(activation));
            let got = run.finish(&[out]);
            check(
                place,
                limit(DType::F32),
                &format!("{activation:?} of up to 640"),
                &got[0],
                &epilogue.reference(&a.values),
            );
        }
    });
}

#[test]
fn residual_with_and_without_bias() {
    everywhere("matmul", |place| {
        for (types, bias) in [(F32, Bias::None), (F32, Bias::Own), (F16, Bias::Own)] {
            case(place, types, [65, 20, 36], Form { bias, residual: true, ..PLAIN });
        }
    });
}

#[test]
fn residual_comes_after_the_activation() {
    let form = Form { activation: Activation::Silu, residual: true, ..PLAIN };
    everywhere("matmul", |place| _ = case(place, F32, [9, 12, 8], form));
}

#[test]
fn bias_rows() {
    everywhere("matmul", |place| {
        for (rows, offset) in [(65, 0), (65, 4), (13, 16), (1, 8)] {
            case(place, F32, [65, 20, 12], Form { bias: Bias::Rows { rows, offset }, ..PLAIN });
        }
    });
}

/// A batch of images is so many more rows, and the result keeps the input's grid.
#[test]
fn images_are_rows() {
    everywhere("matmul", |place| {
        let (a, b) = (normal(3, [2, 3, 5, 8], DType::F32), weights(4, 8, 12, DType::F32));
        let mut run = place.start(DType::F32);
        let input = run.bind(&a);
        let layer = Linear { weight: b.param(&run.gpu), bias: None };
        let out = matmul(&mut run.g, input, &layer, Default::default());
        assert_eq!(out.dims, [2, 3, 5, 12]);
        let got = run.finish(&[out]);
        check(place, limit(DType::F32), "2x3x5x8", &got[0], &product(&a, &b));
    });
}

#[test]
fn ragged_shapes() {
    everywhere("matmul", |place| {
        for mut draw in Draws::cases(1) {
            let types = draw.pick(TYPES);
            // Half of the depths suit matrix units.
            let k = if draw.of(0, 1) == 0 { 4 * draw.of(1, 60) } else { 32 * draw.of(1, 12) };
            case(place, types, [draw.of(1, 200), 4 * draw.of(1, 50), k], PLAIN);
        }
    });
}
