//! lincomb against Σ c_i x_i.

use scumble::gpu::DType;
use scumble::ops::lincomb::{MAX_TERMS, lincomb};

use crate::compare::{F32, check};
use crate::harness::everywhere;
use crate::values::normal;

const COEFFICIENTS: [f32; 4] = [0.75, -1.5, 2.25, 14.6];

#[test]
fn one_to_four_terms() {
    everywhere("lincomb", |place| {
        for dims in [[1, 1, 1, 4], [1, 5, 7, 4], [2, 33, 31, 4]] {
            for count in 1..=MAX_TERMS {
                let hosts: Vec<_> = (0..count as u64).map(|i| normal(51 + i, dims, DType::F32)).collect();
                let mut run = place.start(DType::F32);
                let terms: Vec<_> = hosts.iter().map(|host| run.bind(host)).collect();
                let out = run.output(dims);
                lincomb(&mut run.g, out, &terms);
                let got = run.finish_steps(&[COEFFICIENTS], &[out]);
                let term = |i: usize| hosts.iter().zip(COEFFICIENTS).map(|(x, c)| f64::from(c) * x.values[i]).sum();
                let expected: Vec<f64> = (0..hosts[0].values.len()).map(term).collect();
                check(place, F32, &format!("{count} terms of {dims:?}"), &got[0], &expected);
            }
        }
    });
}

/// Each step has coefficients of its own: the last one's are what remains.
#[test]
fn a_step_reads_its_own_coefficients() {
    everywhere("lincomb", |place| {
        let x = normal(55, [1, 3, 3, 4], DType::F32);
        let mut run = place.start(DType::F32);
        let term = run.bind(&x);
        let out = run.output(x.dims);
        lincomb(&mut run.g, out, &[term]);
        let steps = [[1.0f32, 9.0, 9.0, 9.0], [0.5, 9.0, 9.0, 9.0], [-3.0, 9.0, 9.0, 9.0]];
        let got = run.finish_steps(&steps, &[out]);
        let expected: Vec<f64> = x.values.iter().map(|v| -3.0 * v).collect();
        check(place, F32, "the third step", &got[0], &expected);
    });
}
