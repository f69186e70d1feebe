//! blend against m a + (1 − m)(picture + σ noise), one picture and mask for a whole batch.

use scumble::denoiser::Step;
use scumble::gpu::DType;
use scumble::ops::blend::{Kept, blend};

use crate::compare::{F32, check};
use crate::harness::everywhere;
use crate::values::{Host, normal};

#[test]
fn what_is_not_masked_is_the_picture() {
    everywhere("blend", |place| {
        for noisy in [true, false] {
            let (dims, sigma) = ([2, 5, 7, 4], 3.25f32);
            let (a, noise) = (normal(71, dims, DType::F32), normal(72, dims, DType::F32));
            let picture = normal(73, [1, 5, 7, 4], DType::F32);
            let m = Host::new([1, 1, 1, 36], DType::F32, (0..36).map(|i| [0.0, 1.0, 0.25][i % 3]));
            let mut run = place.start(DType::F32);
            let x = run.bind(&a);
            let kept = Kept { mask: run.bind(&m), picture: run.bind(&picture), noise: run.bind(&noise) };
            let out = run.output(dims);
            blend(&mut run.g, x, &kept, noisy, out);
            let got = run.finish_steps(&[Step { sigma, ..Default::default() }], &[out]);
            let sigma = if noisy { f64::from(sigma) } else { 0.0 };
            let value = |i: usize| {
                let (at, m) = (i % 140, m.values[i / 4 % 35]);
                m * a.values[i] + (1.0 - m) * (picture.values[at] + sigma * noise.values[i])
            };
            let expected: Vec<f64> = (0..280).map(value).collect();
            check(place, F32, &format!("noisy {noisy}"), &got[0], &expected);
        }
    });
}
