//! touch: products compute the same with their weights touched before.

use scumble::gpu::DType;
use scumble::ops::matmul::matmul;
use scumble::ops::touch::touch;
use scumble::ops::{Epilogue, Linear};

use crate::compare::{check, limit};
use crate::harness::everywhere;
use crate::values::{normal, weights};

#[test]
fn weights_are_read_and_left_alone() {
    everywhere("touch", |place| {
        let (a, b, c) =
            (normal(1, [1, 1, 9, 96], DType::F32), weights(2, 96, 256, DType::F32), weights(3, 256, 100, DType::F32));
        let mut run = place.start(DType::F32);
        let mut x = run.bind(&a);
        for weight in [&b, &c] {
            let layer = Linear { weight: weight.param(&run.gpu), bias: None };
            x = matmul(&mut run.g, x, &layer, Epilogue::default());
        }
        touch(&mut run.g);
        let touches = run.g.nodes().iter().filter(|node| node.op == "touch").count();
        assert_eq!(touches > 0, place.variant == "portable");
        let times = |a: &[f64], b: &crate::values::Host| -> Vec<f64> {
            let [k, n] = [b.dims[2] as usize, b.dims[3] as usize];
            let row = |row: &[f64]| -> Vec<f64> {
                (0..n).map(|j| row.iter().enumerate().map(|(i, v)| v * b.values[i * n + j]).sum()).collect()
            };
            a.chunks_exact(k).flat_map(row).collect()
        };
        let want = times(&times(&a.values, &b), &c);
        let got = run.finish(&[x]);
        check(place, limit(DType::F32), "two products", &got[0], &want);
    });
}
