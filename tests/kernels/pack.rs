//! pack against c_in · x, repeated along the batch, in the network's element type.

use scumble::denoiser::Step;
use scumble::gpu::DType;
use scumble::ops::pack::pack;

use crate::compare::{check, limit};
use crate::harness::everywhere;
use crate::values::{Host, normal};

#[test]
fn scales_casts_and_repeats() {
    everywhere("pack", |place| {
        for dtype in place.activations() {
            for (dims, times) in [([1, 5, 7, 4], 1), ([1, 5, 7, 4], 2), ([2, 3, 3, 4], 2), ([1, 9, 8, 12], 3)] {
                let x = normal(61, dims, DType::F32);
                let c_in = 0.0683f32;
                let mut run = place.start(dtype);
                let input = run.bind(&x);
                let out = pack(&mut run.g, input, None, times);
                assert_eq!((out.dims, out.dtype), ([dims[0] * times, dims[1], dims[2], dims[3]], dtype));
                let got = run.finish_steps(&[Step { c_in, ..Default::default() }], &[out]);
                let once: Vec<f64> = x.values.iter().map(|v| v * f64::from(c_in)).collect();
                check(
                    place,
                    limit(dtype),
                    &format!("{dims:?} x {times} as {dtype:?}"),
                    &got[0],
                    &once.repeat(times as usize),
                );
            }
        }
    });
}

/// More groups of four than 65535 workgroups of 64 reach: the grid folds into a second row, as for a decoded picture.
#[test]
fn more_elements_than_a_grid_is_wide() {
    everywhere("pack", |place| {
        let dims = [1, 2050, 2050, 4];
        let x = Host::new(dims, DType::F32, (0..dims.iter().product()).map(|i: u32| f64::from(i % 1021)));
        let mut run = place.start(DType::F32);
        let input = run.bind(&x);
        let out = pack(&mut run.g, input, None, 1);
        assert_eq!(run.g.nodes()[0].grid[1], 2, "a folded grid");
        let got = run.finish_steps(&[Step { c_in: 0.5, ..Default::default() }], &[out]);
        let expected: Vec<f64> = x.values.iter().map(|v| 0.5 * v).collect();
        check(place, limit(DType::F32), "2050x2050", &got[0], &expected);
    });
}

/// What an inpainting model sees beside x: unscaled, the same for the whole batch.
#[test]
fn more_channels_stand_beside_x() {
    everywhere("pack", |place| {
        for dtype in place.activations() {
            let (dims, times, c_in) = ([2, 3, 5, 4], 2, 0.25f32);
            let (x, extra) = (normal(62, dims, DType::F32), normal(63, [1, 3, 5, 8], DType::F32));
            let mut run = place.start(dtype);
            let (input, beside) = (run.bind(&x), run.bind(&extra));
            let out = pack(&mut run.g, input, Some(beside), times);
            assert_eq!(out.dims, [4, 3, 5, 12]);
            let got = run.finish_steps(&[Step { c_in, ..Default::default() }], &[out]);
            let pixel = |i: usize| {
                let own = x.values[i * 4..][..4].iter().map(|v| v * f64::from(c_in));
                own.chain(extra.values[i % 15 * 8..][..8].iter().copied()).collect::<Vec<f64>>()
            };
            let once: Vec<f64> = (0..30).flat_map(pixel).collect();
            check(place, limit(dtype), &format!("{dtype:?}"), &got[0], &once.repeat(2));
        }
    });
}
