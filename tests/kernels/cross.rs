//! cross: projections folded into a prompt's keys and values against the projections and the attention between them, written out.

use scumble::gpu::DType::{F16, F32};
use scumble::ops::Linear;
use scumble::ops::cross::{VARIANTS, cross, fold};

use crate::attention::Case;
use crate::compare::{check, limit};
use crate::harness::{Place, everywhere};
use crate::values::{Draws, Host, normal, weights};

fn product(a: &[f64], b: &Host) -> Vec<f64> {
    let [k, n] = [b.dims[2] as usize, b.dims[3] as usize];
    let row = |row: &[f64]| -> Vec<f64> {
        (0..n).map(|j| row.iter().enumerate().map(|(i, v)| v * b.values[i * n + j]).sum()).collect()
    };
    a.chunks_exact(k).flat_map(row).collect()
}

/// Of `batch` images of `tokens` to `keys` tokens of `prompts`.
fn case(place: &Place, [prompts, batch, tokens, keys]: [u32; 4], [heads, head_dim]: [u32; 2]) {
    let c = heads * head_dim;
    let (x, rest) = (normal(1, [batch, 1, tokens, c], F16), normal(2, [batch, 1, tokens, c], F16));
    let kv = normal(3, [prompts, 1, keys, 2 * c], F16);
    let (wq, wo, bias) = (weights(4, c, c, F16), weights(5, c, c, F16), normal(6, [1, 1, 1, c], F32));
    let mut run = place.start(F16);
    let [x_in, kv_in, rest_in] = [&x, &kv, &rest].map(|host| run.bind(host));
    let q = Linear { weight: wq.param(&run.gpu), bias: None };
    let out = Linear { weight: wo.param(&run.gpu), bias: Some(bias.param(&run.gpu)) };
    let folded = fold(&mut run.g, &q, &out, kv_in, heads);
    if place.variant != "coop" {
        assert!(folded.is_none(), "folded, though it was not to be");
        return;
    }
    let Some(folded) = folded else {
        panic!("[{prompts}, {batch}, {tokens}, {keys}] {heads} x {head_dim} was not folded")
    };
    let y = cross(&mut run.g, x_in, None, &folded, &out, rest_in);
    let got = run.finish(&[y]);
    let width = c as usize;
    let attended = Case::to_prompts(Host::new(x.dims, F32, product(&x.values, &wq)), kv, heads);
    let added = |(i, v): (usize, f64)| v + bias.values[i % width] + rest.values[i];
    let want: Vec<f64> = product(&attended.reference().0, &wo).into_iter().enumerate().map(added).collect();
    let text = format!("[{prompts}, {batch}, {tokens}, {keys}] {heads} x {head_dim}");
    check(place, limit(F16), &text, &got[0], &want);
}

#[test]
fn folded_projections() {
    everywhere("cross", |place| {
        case(place, [2, 2, 64, 77], [4, 40]);
        case(place, [2, 4, 70, 80], [2, 64]);
        case(place, [1, 2, 33, 8], [4, 16]);
    });
}

#[test]
fn ragged_shapes() {
    everywhere("cross", |place| {
        // Every one is a kernel of its own, slow to compile for a software device.
        let most = if place.gpu.caps().is_cpu() { 3 } else { usize::MAX };
        for mut draw in Draws::cases(1).take(most) {
            let prompts = draw.of(1, 2);
            let [images, tokens, keys] = [draw.of(1, 3), draw.of(64, 100), draw.of(1, 80)];
            case(place, [prompts, prompts * images, tokens, keys], [2, 32 * draw.of(1, 2)]);
        }
    });
}

/// More than one chunk of text, and more heads than it pays for, stay apart.
#[test]
fn what_does_not_suit_stays_apart() {
    everywhere("cross", |place| {
        for (keys, heads) in [(154, 8), (77, 20)] {
            let c = heads * 64;
            let mut run = place.start(F16);
            let kv = run.bind(&normal(1, [2, 1, keys, 2 * c], F16));
            let layer = Linear { weight: weights(2, c, c, F16).param(&run.gpu), bias: None };
            assert!(fold(&mut run.g, &layer, &layer, kv, heads).is_none(), "{keys} keys, {heads} heads");
        }
    });
    assert_eq!(VARIANTS.last().map(|row| row.0), Some("apart"));
}
