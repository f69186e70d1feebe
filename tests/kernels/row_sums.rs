//! row_sums: a layer norm folded into the layer after it, between two products, against both written out.

use half::f16;
use pollster::block_on;
use scumble::gpu::DType::{F16, F32};
use scumble::gpu::{Gpu, Graph, Program};
use scumble::ops::cross::{cross, fold as fold_context};
use scumble::ops::matmul::matmul;
use scumble::ops::row_sums::{Normed, VARIANTS, fold};
use scumble::ops::{Activation, Epilogue, Linear};

use crate::attention::Case;
use crate::compare::{check, limit};
use crate::epilogue::{Bias, Form, HostEpilogue, PLAIN};
use crate::harness::{Place, Run, everywhere};
use crate::layer_norm;
use crate::matmul::product;
use crate::values::{Draws, Host, HostNorm, normal, normal_at, weights};

/// A norm and a layer [k, n], folded: in place, so once, where recordings here run twice.
fn normed(gpu: &Gpu, norm: &HostNorm, weight: &Host, bias: &Host) -> Normed {
    let linear = Linear { weight: weight.param(gpu), bias: Some(bias.param(gpu)) };
    let normed = Normed { norm: norm.norm(gpu), linear, folded: true };
    let mut g = Graph::new(gpu, F16);
    fold(&mut g, &normed.norm, &normed.linear);
    let program = block_on(Program::new(gpu, g)).unwrap_or_else(|e| panic!("{e}"));
    let steps = block_on(gpu.steps(&[0u32])).unwrap_or_else(|e| panic!("{e}"));
    let mut recording = gpu.record(false);
    recording.run(&program, &[], &steps, 0);
    block_on(recording.submit(None)).unwrap_or_else(|e| panic!("{e}"));
    normed
}

/// `rows` of a product of depth `k` to `c` channels with this epilogue, normed, times [c, n], each in one of the ways that tuning tries.
/// Which of the two came in shares.
fn case(
    place: &Place,
    ways: [usize; 2],
    rows: u32,
    [k, c, n]: [u32; 3],
    form: Form,
    activation: Activation,
) -> [bool; 2] {
    // A bias with a mean, as networks have it: what the norm takes away.
    let (a, first) = (normal(1, [1, 1, rows, k], F16), weights(2, k, c, F16));
    let before = HostEpilogue::new(form, rows, c, F16);
    let norm = HostNorm::new(3, c, 1e-5);
    let (second, bias) = (weights(5, c, n, F16), normal_at(6, [1, 1, 1, n], F32, 0.5, 1.0));
    let after = Form { activation, bias: Bias::None, ..PLAIN };
    let mut run = place.start(F16);
    let layer = normed(&run.gpu, &norm, &second, &bias);
    let input = run.bind(&a);
    let producer = Linear { weight: first.param(&run.gpu), bias: before.own(&run.gpu) };
    let bound = before.bind(&mut run, [1, 1, rows, c]);
    let shares = |run: &Run| run.g.nodes().last().is_some_and(|node| node.variant == "reduce");
    run.g.trial = Some(ways[0]);
    let x = matmul(&mut run.g, input, &producer, bound);
    run.g.trial = None;
    let first_shares = shares(&run);
    let epilogue = HostEpilogue::new(after, rows, n, F16).bind(&mut run, [1, 1, rows, n]);
    let sums = layer.sums(&mut run.g, x);
    let what = format!("ways {ways:?}, {rows} rows, {k} to {c} to {n}, after {form:?}, {activation:?}");
    assert!(sums.is_some(), "{what}: rows are not summed");
    run.g.trial = Some(ways[1]);
    let y = matmul(&mut run.g, x, &layer.linear, Epilogue { normed: sums, ..epilogue });
    let shares = [first_shares, shares(&run)];
    let got = run.finish(&[x, y]);
    let x = Host::new([1, 1, rows, c], F16, before.reference(&product(&a, &first)));
    check(place, limit(F16), &what, &got[0], &x.values);
    let h = Host::new(x.dims, F32, layer_norm::reference(&x, &norm));
    let sums: Vec<f64> =
        product(&h, &second).iter().enumerate().map(|(i, v)| v + bias.values[i % n as usize]).collect();
    check(place, limit(F16), &what, &got[1], &HostEpilogue::new(after, rows, n, F16).reference(&sums));
    shares
}

/// The folding alone, on every device that has f16: scaled rows, centred columns, and the shift in the bias.
#[test]
fn folding() {
    everywhere("row_sums_fold", |place| {
        if !place.takes(&[F16]) {
            return;
        }
        for [k, n] in [[4, 4], [36, 260], [320, 64]] {
            let (norm, weight, bias) = (HostNorm::new(1, k, 1e-5), weights(3, k, n, F16), normal(4, [1, 1, 1, n], F32));
            let folded = normed(&place.gpu, &norm, &weight, &bias).linear;
            let found: Vec<f16> =
                block_on(folded.weight.buffer.read((k * n) as usize)).unwrap_or_else(|e| panic!("{e}"));
            let found: Vec<f64> = found.iter().map(|v| v.to_f64()).collect();
            let scaled = |i: u32, j: u32| norm.gamma.values[i as usize] * weight.values[(i * n + j) as usize];
            let mean = |j: u32| (0..k).map(|i| scaled(i, j)).sum::<f64>() / f64::from(k);
            let want: Vec<f64> =
                (0..k).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| scaled(i, j) - mean(j)).collect();
            check(place, limit(F16), &format!("weight [{k}, {n}]"), &found, &want);
            let Some(own) = &folded.bias else { unreachable!("given above") };
            let found: Vec<f32> = block_on(own.buffer.read(n as usize)).unwrap_or_else(|e| panic!("{e}"));
            let found: Vec<f64> = found.iter().map(|&v| f64::from(v)).collect();
            let shift = |j: u32| {
                (0..k).map(|i| norm.beta.values[i as usize] * weight.values[(i * n + j) as usize]).sum::<f64>()
            };
            let want: Vec<f64> = (0..n).map(|j| bias.values[j as usize] + shift(j)).collect();
            check(place, limit(F32), &format!("bias [{k}, {n}]"), &found, &want);
        }
    });
}

/// Whole products and shares, before whole products and shares; rows and columns that tiles do not divide.
#[test]
fn norms_between_products() {
    everywhere("row_sums", |place| {
        if place.variant != "coop" {
            return;
        }
        let added = Form { residual: true, ..PLAIN };
        let rows = Form { bias: Bias::Rows { rows: 33, offset: 8 }, ..added };
        let mut found = [0; 4];
        let mut see = |[first, second]: [bool; 2]| found[usize::from(first) + 2 * usize::from(second)] += 1;
        see(case(place, [0, 0], 640, [64, 160, 320], PLAIN, Activation::None));
        see(case(place, [0, 0], 70, [64, 160, 320], added, Activation::Geglu));
        // A software device compiles each for a second.
        let ways = if place.gpu.caps().is_cpu() { vec![0, 7] } else { (0..8).collect() };
        for (first, second) in ways.iter().flat_map(|&first| ways.iter().map(move |&second| (first, second))) {
            let (form, activation) = if first == 0 { (added, Activation::Geglu) } else { (rows, Activation::None) };
            see(case(place, [first, second], 66, [512, 320, 40], form, activation));
        }
        assert!(
            found.iter().all(|&times| times > 0),
            "whole and whole, shares and whole, whole and shares, shares and shares: {found:?}"
        );
    });
    assert_eq!(VARIANTS.last().map(|row| row.0), Some("apart"));
}

#[test]
fn ragged_shapes() {
    everywhere("row_sums", |place| {
        // Every one is several kernels of its own, slow to compile for a software device.
        let most = if place.gpu.caps().is_cpu() { 1 } else { usize::MAX };
        for mut draw in Draws::cases(7).take(if place.variant == "coop" { most } else { 0 }) {
            let widths = [32 * draw.of(1, 30), 32 * draw.of(1, 20), 8 * draw.of(1, 40)];
            let form = Form { residual: draw.of(0, 1) == 1, ..PLAIN };
            let activation = draw.pick(&[Activation::None, Activation::Geglu]);
            case(place, [0, 0], draw.of(64, 200), widths, form, activation);
        }
    });
}

/// Attention to a prompt whose query projection holds a norm: after a product whose rows were summed.
#[test]
fn norms_before_prompts() {
    everywhere("row_sums", |place| {
        if place.variant != "coop" {
            return;
        }
        // Matrices of 8, a software device's, make tiles so small that the second has no shares either.
        let cases = [(64, [2, 4, 70, 77]), (1536, [1, 1, 66, 80])];
        for (k, [prompts, batch, tokens, keys]) in cases.into_iter().take(if place.gpu.caps().is_cpu() { 1 } else { 2 })
        {
            let (heads, head_dim) = (4, 40);
            let c = heads * head_dim;
            let rows = batch * tokens;
            let (a, first) = (normal(1, [batch, 1, tokens, k], F16), weights(2, k, c, F16));
            let (norm, kv) = (HostNorm::new(3, c, 1e-5), normal(5, [prompts, 1, keys, 2 * c], F16));
            let (wq, bq) = (weights(6, c, c, F16), normal(7, [1, 1, 1, c], F32));
            let (wo, bo) = (weights(8, c, c, F16), normal(9, [1, 1, 1, c], F32));
            let mut run = place.start(F16);
            let q = normed(&run.gpu, &norm, &wq, &bq);
            let [a_in, kv_in] = [&a, &kv].map(|host| run.bind(host));
            let out = Linear { weight: wo.param(&run.gpu), bias: Some(bo.param(&run.gpu)) };
            let Some(folded) = fold_context(&mut run.g, &q.linear, &out, kv_in, heads) else { panic!("not folded") };
            let x = matmul(&mut run.g, a_in, &Linear { weight: first.param(&run.gpu), bias: None }, Default::default());
            let sums = q.sums(&mut run.g, x);
            assert!(sums.is_some(), "the product does not sum its rows");
            let y = cross(&mut run.g, x, sums, &folded, &out, x);
            let got = run.finish(&[x, y]);
            let x = Host::new([1, 1, rows, c], F16, product(&a, &first));
            let h = Host::new(x.dims, F32, layer_norm::reference(&x, &norm));
            let added = |values: Vec<f64>, bias: &Host| -> Vec<f64> {
                values.iter().enumerate().map(|(i, v)| v + bias.values[i % c as usize]).collect()
            };
            let q = Host::new([batch, 1, tokens, c], F32, added(product(&h, &wq), &bq));
            let attended = Host::new([1, 1, rows, c], F32, Case::to_prompts(q, kv, heads).reference().0);
            let want: Vec<f64> =
                added(product(&attended, &wo), &bo).iter().zip(&x.values).map(|(v, x)| v + x).collect();
            check(place, limit(F16), &format!("[{prompts}, {batch}, {tokens}, {keys}]"), &got[1], &want);
        }
    });
}
