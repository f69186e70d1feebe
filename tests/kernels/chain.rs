//! chain: two layers folded into one product against both in turn, written out.

use scumble::gpu::DType::{F16, F32};
use scumble::ops::Linear;
use scumble::ops::chain::{VARIANTS, chain, fold};

use crate::compare::{check, limit};
use crate::harness::{Place, everywhere};
use crate::values::{Draws, Host, normal, weights};

/// x W + bias + rest
fn layer(x: &[f64], w: &Host, bias: &Host, rest: &Host) -> Vec<f64> {
    let [k, n] = [w.dims[2] as usize, w.dims[3] as usize];
    let sum = |row: &[f64], j: usize| row.iter().enumerate().map(|(i, v)| v * w.values[i * n + j]).sum::<f64>();
    let rows = x.chunks_exact(k).enumerate();
    rows.flat_map(|(i, row)| (0..n).map(move |j| sum(row, j) + bias.values[j] + rest.values[i * n + j])).collect()
}

/// Of `tokens` rows of `k` channels to `c`, and to as many again.
fn case(place: &Place, [batch, tokens]: [u32; 2], [k, c]: [u32; 2]) {
    let x = normal(1, [batch, 1, tokens, k], F16);
    let [between, rest] = [2, 3].map(|seed| normal(seed, [batch, 1, tokens, c], F16));
    let (w1, w2) = (weights(4, k, c, F16), weights(5, c, c, F16));
    let [b1, b2] = [6, 7].map(|seed| normal(seed, [1, 1, 1, c], F32));
    let mut run = place.start(F16);
    let [x_in, between_in, rest_in] = [&x, &between, &rest].map(|host| run.bind(host));
    let first = Linear { weight: w1.param(&run.gpu), bias: Some(b1.param(&run.gpu)) };
    let second = Linear { weight: w2.param(&run.gpu), bias: Some(b2.param(&run.gpu)) };
    let chained = fold(&mut run.g, &first, &second);
    if place.variant != "coop" {
        assert!(chained.is_none(), "folded, though it was not to be");
        return;
    }
    let Some(chained) = chained else { panic!("[{batch}, {tokens}] {k} to {c} was not folded") };
    let y = chain(&mut run.g, x_in, between_in, &chained, rest_in);
    let got = run.finish(&[y]);
    let want = layer(&layer(&x.values, &w1, &b1, &between), &w2, &b2, &rest);
    check(place, limit(F16), &format!("[{batch}, {tokens}] {k} to {c}"), &got[0], &want);
}

#[test]
fn chained_layers() {
    everywhere("chain", |place| {
        case(place, [2, 64], [256, 64]);
        case(place, [1, 70], [160, 160]);
    });
    assert_eq!(VARIANTS.last().map(|row| row.0), Some("apart"));
}

#[test]
fn ragged_shapes() {
    everywhere("chain", |place| {
        // Every one is a kernel of its own, slow to compile for a software device.
        let most = if place.gpu.caps().is_cpu() { 3 } else { usize::MAX };
        for mut draw in Draws::cases(1).take(most) {
            let c = 32 * draw.of(1, 5);
            case(place, [draw.of(1, 3), draw.of(64, 100)], [c * draw.of(1, 4), c]);
        }
    });
}
