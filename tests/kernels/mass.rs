//! SAG's attention mass per key against the column sums of the head-mean softmax.

use scumble::gpu::DType;
use scumble::ops::attention::{Attention, attention_with_mass};

use crate::attention::Case;
use crate::compare::{F32, check, limit};
use crate::harness::{Place, everywhere};
use crate::values::Host;

/// The mass of the first `batch` images; the attention beside it must be right too.
fn check_case(place: &Place, case: &Case, batch: u32) {
    let mut run = place.start(case.q.dtype);
    let bound = case.bind(&mut run);
    let (out, mass) = attention_with_mass(&mut run.g, &bound, batch);
    assert!(run.forced(place));
    let got = run.finish(&[out, mass]);
    let (expected, masses) = case.reference();
    let text =
        format!("{:?} {:?} heads {} x {}, mass of {batch}", case.q.dtype, case.q.dims, case.heads, case.head_dim);
    check(place, limit(case.q.dtype), &format!("{text}: attention"), &got[0], &expected);
    let count = batch as usize * case.keys();
    check(place, F32, &text, &got[1], &masses[..count]);
    for image in got[1][..count].chunks_exact(case.keys()) {
        let mean = image.iter().sum::<f64>() / case.keys() as f64;
        assert!((mean - 1.0).abs() < 1e-5, "{text}: the mean of the mass is {mean}, but rows of a softmax sum to 1");
    }
}

#[test]
fn of_awkward_token_counts() {
    everywhere("attention_mass", |place| {
        for tokens in [1, 6, 35, 64, 130] {
            check_case(place, &Case::fused(2, tokens, 2, 8, DType::F32), 2);
        }
    });
}

#[test]
fn of_every_type_and_head_dim() {
    everywhere("attention_mass", |place| {
        for dtype in place.activations() {
            for head_dim in [4, 40, 96, 160] {
                check_case(place, &Case::fused(1, 35, 3, head_dim, dtype), 1);
            }
        }
    });
}

/// Uncond comes first in the batch, and only its mass is wanted.
#[test]
fn of_the_first_images_only() {
    everywhere("attention_mass", |place| {
        check_case(place, &Case::fused(2, 15, 2, 8, DType::F32), 1);
        check_case(place, &Case::fused(4, 15, 2, 8, DType::F32), 2);
    });
}

/// sag.md, section 0: heads 2, 6 tokens, d 4, q = sin(0.37 i), k = cos(0.53 i) with i over [head, token, d].
#[test]
fn the_golden_map() {
    let index = |head: u32, token: u32, d: u32| f64::from((head * 6 + token) * 4 + d);
    let mut values = Vec::new();
    for token in 0..6 {
        values.extend((0..8).map(|c| (0.37 * index(c / 4, token, c % 4)).sin()));
        values.extend((0..8).map(|c| (0.53 * index(c / 4, token, c % 4)).cos()));
        values.extend([0.0; 8]);
    }
    let qkv = Host::new([1, 1, 6, 24], DType::F32, values);
    let golden = [1.033983, 1.100898, 0.867001, 0.999338, 1.102617, 0.896163];
    everywhere("attention_mass", |place| {
        let mut run = place.start(DType::F32);
        let tensor = run.bind(&qkv);
        let (_, mass) = attention_with_mass(&mut run.g, &Attention::fused(tensor, 2), 1);
        let got = run.finish(&[mass]).remove(0);
        for (got, golden) in got.iter().zip(golden) {
            assert!((got - golden).abs() < 1e-6, "{got} for {golden}");
        }
        let mask: Vec<bool> = got[..6].iter().map(|&m| m > 1.0).collect();
        assert_eq!(mask, [true, true, false, false, true, false]);
    });
}
