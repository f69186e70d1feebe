//! Tuning: every way that a product may be tried in gives the same result, what won is kept, and is then taken.

use pollster::block_on;
use scumble::gpu::tune::{Subject, Tuned};
use scumble::gpu::{DType, Gpu, GpuOptions, Graph};
use scumble::ops::conv2d::{Taps, conv2d};
use scumble::ops::matmul::matmul;
use scumble::ops::{Conv, Epilogue, Linear};
use std::ops::ControlFlow;

use crate::compare::{check, limit};
use crate::harness::everywhere;
use crate::values::{normal, weights};

/// Ways beyond the last are the last: more trials than there are ways do no harm.
const TRIALS: usize = 8;

#[test]
fn matrix_units_in_every_way() {
    everywhere("matmul", |place| {
        for dtype in place.activations() {
            for [m, n, k] in [[130, 64, 768], [65, 160, 320]] {
                let (a, b) = (normal(1, [1, 1, m, k], dtype), weights(2, k, n, dtype));
                let column = |row: &[f64], j: usize| {
                    row.iter().enumerate().map(|(i, a)| a * b.values[i * n as usize + j]).sum::<f64>()
                };
                let rows = a.values.chunks_exact(k as usize);
                let expected: Vec<f64> = rows.flat_map(|row| (0..n as usize).map(move |j| column(row, j))).collect();
                for trial in 0..TRIALS {
                    let mut run = place.start(dtype);
                    run.g.trial = Some(trial);
                    let input = run.bind(&a);
                    let layer = Linear { weight: b.param(&run.gpu), bias: None };
                    let out = matmul(&mut run.g, input, &layer, Epilogue::default());
                    let got = run.finish(&[out]);
                    check(place, limit(dtype), &format!("{dtype:?} {m} {n} {k} way {trial}"), &got[0], &expected);
                }
            }
        }
    });
}

#[test]
fn what_won_is_kept_and_taken() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = || {
        let device = std::env::var("SCUMBLE_DEVICE").ok();
        let options = GpuOptions { device, cache: Some(folder.path().to_owned()), ..Default::default() };
        block_on(Gpu::open(&options)).expect("a device")
    };
    let tune = |gpu: &Gpu, trials: &mut Vec<usize>| {
        let dtype = if gpu.caps().f16 && !gpu.caps().is_cpu() { DType::F16 } else { DType::F32 };
        let [w, c] = [weights(2, 320, 64, dtype), weights(3, 9 * 64, 64, dtype)].map(|w| w.param(gpu));
        let (linear, conv) = (Linear { weight: w, bias: None }, Conv { weight: c, bias: None, kernel: 3 });
        let x = normal(1, [1, 12, 12, 320], dtype).upload(gpu);
        let record = |g: &mut Graph| {
            let x = g.bind("x", &x, [1, 12, 12, 320], dtype);
            let h = matmul(g, x, &linear, Epilogue::default());
            for _ in 0..2 {
                conv2d(g, h, None, &conv, Taps::same(3), Epilogue::default());
            }
        };
        let steps = block_on(gpu.steps(&[0u32])).expect("scalars");
        let subject = Subject { dtype, record: &record, arguments: &[], steps: &steps };
        let mut observe = |done, _| {
            trials.push(done);
            ControlFlow::Continue(())
        };
        block_on(gpu.tune(&subject, &mut observe)).unwrap_or_else(|e| panic!("{e}"))
    };
    let (gpu, mut trials) = (open(), Vec::new());
    let found = tune(&gpu, &mut trials);
    // One key for the product, one for both convolutions; fewer only where a device has one way alone.
    assert_eq!(found.choices, 2, "{found:?}");
    assert!(trials.len() > 1 && found.after_ms > 0.0 && found.after_ms <= found.before_ms, "{trials:?} {found:?}");
    // Known now, and to a device opened later.
    for gpu in [gpu, open()] {
        let mut trials = Vec::new();
        assert_eq!(tune(&gpu, &mut trials), Tuned::default());
        assert!(trials.is_empty());
    }
}
