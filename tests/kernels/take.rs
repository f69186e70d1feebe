//! take against the rows themselves.

use scumble::denoiser::Step;
use scumble::gpu::DType;
use scumble::ops::take::take;

use crate::compare::{F32, check};
use crate::harness::everywhere;
use crate::values::normal;

#[test]
fn a_call_takes_its_own_rows() {
    everywhere("take", |place| {
        for (rows, calls, channels) in [(1, 1, 4), (2, 5, 12), (3, 2, 260)] {
            let all = normal(71, [rows, 1, calls, channels], DType::F32);
            for call in 0..calls {
                let mut run = place.start(DType::F32);
                let bound = run.bind(&all);
                let out = take(&mut run.g, bound);
                assert_eq!(out.dims, [1, 1, rows, channels]);
                let got = run.finish_steps(&[Step { call, ..Default::default() }], &[out]);
                let row = |r: u32| &all.values[((r * calls + call) * channels) as usize..][..channels as usize];
                let expected: Vec<f64> = (0..rows).flat_map(|r| row(r).to_vec()).collect();
                check(place, F32, &format!("call {call} of {calls}, {rows} rows of {channels}"), &got[0], &expected);
            }
        }
    });
}
