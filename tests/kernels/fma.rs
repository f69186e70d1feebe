//! fma against the same chains in f64.

use scumble::gpu::DType;
use scumble::ops::fma::fma;

use crate::compare::{check, limit};
use crate::harness::everywhere;
use crate::values::Host;

#[test]
fn chains_of_multiply_adds() {
    everywhere("fma", |place| {
        for dtype in place.activations() {
            // Chains contract: errors do not grow.
            let x = Host::new([1, 1, 1, 256], DType::F32, (0..256).map(|i| (i % 32) as f64 / 64.0));
            let mut run = place.start(DType::F32);
            let bound = run.bind(&x);
            let out = fma(&mut run.g, bound, dtype, 100, 3);
            let got = run.finish(&[out]);
            let chain = |f: f64, i: f64| (0..3).fold(f * i, |v, _| v * f + f);
            let expected: Vec<f64> =
                (0..400).map(|i| (0..8).map(|k| chain(x.values[i % 256], f64::from(k))).sum::<f64>()).collect();
            check(place, limit(dtype), &format!("{dtype:?}"), &got[0], &expected);
        }
    });
}
