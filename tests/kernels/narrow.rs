//! narrow: a 64th of every value as f16 rounds it, and the largest f16 where that is too much.

use half::f16;
use scumble::gpu::DType;
use scumble::ops::narrow::narrow;

use crate::compare::{check, limit};
use crate::harness::everywhere;
use crate::values::normal;

#[test]
fn narrowed_values() {
    everywhere("narrow", |place| {
        if !place.takes(&[DType::F16]) {
            return;
        }
        // Whole quarters, a ragged last one, fewer values than a thread takes.
        for dims in [[2, 8, 8, 64], [1, 5, 7, 12], [1, 1, 1, 4]] {
            let mut x = normal(1, dims, DType::F32);
            x.values.iter_mut().for_each(|v| *v = f64::from((*v * 3e6) as f32));
            let mut run = place.start(DType::F32);
            run.g.operands = DType::F16;
            let input = run.bind(&x);
            let out = narrow(&mut run.g, input);
            assert_eq!((out.dims, out.dtype), (dims, DType::F16));
            let got = run.finish(&[out]);
            let most = f16::MAX.to_f64();
            let want: Vec<f64> = x.values.iter().map(|v| (v / 64.0).clamp(-most, most)).collect();
            check(place, limit(DType::F16), &format!("{dims:?}"), &got[0], &want);
        }
    });
}
