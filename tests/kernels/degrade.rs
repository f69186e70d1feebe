//! degrade against SAG's definition (sag.md): mask of the mass, nearest upsample, 9x9 Gaussian with reflected edges where
//! the mask holds, the noise added again.

use scumble::denoiser::Step;
use scumble::gpu::DType;
use scumble::ops::degrade::{blur_weights, degrade, mask_stride};

use crate::compare::{F32, check};
use crate::conv2d::nearest;
use crate::harness::{Place, everywhere};
use crate::values::{Host, normal};

/// One call's inputs. D = c_skip x + c_out output.
struct Case {
    x: Host,
    outputs: Host,
    mass: Host,
    mid: [u32; 2],
    step: Step,
    sigma: f32,
}

/// Masses around 1 for `batch` grids of `mid`.
fn masses(seed: u64, batch: u32, mid: [u32; 2]) -> Host {
    let count = batch * mid[0] * mid[1];
    let padded = normal(seed, [1, 1, 1, count.next_multiple_of(4)], DType::F32);
    Host::new(padded.dims, DType::F32, padded.values.iter().map(|v| 1.0 + 0.1 * v))
}

impl Case {
    fn new(batch: u32, size: [u32; 2], mid: [u32; 2], sigma: f32) -> Case {
        let dims = [batch, size[0], size[1], 4];
        Case {
            x: normal(91, dims, DType::F32),
            // Uncond, then cond, which must not be looked at.
            outputs: normal(92, [2 * batch, size[0], size[1], 4], DType::F32),
            mass: masses(93, batch, mid),
            mid,
            step: Step { c_skip: 1.0, c_out: -0.8, threshold: 1.0, blur: blur_weights(sigma), ..Default::default() },
            sigma,
        }
    }

    /// D_u, exact.
    fn denoised(&self) -> Vec<f64> {
        let (skip, out) = (f64::from(self.step.c_skip), f64::from(self.step.c_out));
        self.x.values.iter().zip(&self.outputs.values).map(|(x, o)| skip * x + out * o).collect()
    }

    /// 1 where the mass under a latent pixel is above the threshold, [B, h, w].
    fn mask(&self) -> Vec<f64> {
        let [batch, h, w, _] = self.x.dims;
        let [mid_h, mid_w] = self.mid;
        let mut mask = Vec::new();
        for b in 0..batch as usize {
            for i in 0..h as usize {
                for j in 0..w as usize {
                    let at = (b * mid_h as usize + nearest(i, mid_h, h)) * mid_w as usize + nearest(j, mid_w, w);
                    mask.push(if self.mass.values[at] > f64::from(self.step.threshold) { 1.0 } else { 0.0 });
                }
            }
        }
        mask
    }

    /// [degraded, renoised], by the 81 taps of the two-dimensional Gaussian.
    fn reference(&self) -> [Vec<f64>; 2] {
        let [batch, h, w, _] = self.x.dims.map(|d| d as i32);
        let (clean, mask) = (self.denoised(), self.mask());
        let gauss = |t: i32| {
            if self.sigma == 0.0 {
                f64::from(t == 0)
            } else {
                (-0.5 * (f64::from(t) / f64::from(self.sigma)).powi(2)).exp()
            }
        };
        let total: f64 = (-4..=4).map(gauss).sum();
        let reflect = |i: i32, n: i32| {
            if i < 0 {
                -i
            } else if i >= n {
                2 * (n - 1) - i
            } else {
                i
            }
        };
        let mut degraded = clean.clone();
        for at in 0..batch * h * w {
            let (b, i, j) = (at / (h * w), at / w % h, at % w);
            for c in (0..4).filter(|_| mask[at as usize] > 0.0) {
                let mut sum = 0.0;
                for (dy, dx) in (-4..=4).flat_map(|dy| (-4..=4).map(move |dx| (dy, dx))) {
                    let pixel = (b * h + reflect(i + dy, h)) * w + reflect(j + dx, w);
                    sum += gauss(dy) * gauss(dx) / (total * total) * clean[(pixel * 4 + c) as usize];
                }
                degraded[(at * 4 + c) as usize] = sum;
            }
        }
        let renoised = degraded.iter().zip(&self.x.values).zip(&clean).map(|((d, x), clean)| d + (x - clean)).collect();
        [degraded, renoised]
    }

    /// degraded, renoised, and the masks of `calls` calls with these steps.
    fn run(&self, place: &Place, calls: u32, steps: &[Step]) -> Vec<Vec<f64>> {
        let [batch, h, w, _] = self.x.dims;
        let mut run = place.start(DType::F32);
        let (x, outputs, mass) = (run.bind(&self.x), run.bind(&self.outputs), run.bind(&self.mass));
        let mask = run.output([calls, batch, 1, mask_stride(h, w)]);
        let (degraded, renoised) = degrade(&mut run.g, x, outputs, mass, self.mid, mask);
        run.finish_steps(steps, &[degraded, renoised, mask])
    }

    fn check(&self, place: &Place) {
        let [batch, h, w, _] = self.x.dims;
        let case = format!("{batch} x {h}x{w}, mid {:?}, sigma {}", self.mid, self.sigma);
        let got = self.run(place, 1, &[self.step]);
        for ((got, expected), what) in got.iter().zip(self.reference()).zip(["degraded", "renoised"]) {
            check(place, F32, &format!("{case}: {what}"), got, &expected);
        }
        for (got, expected) in got[2].chunks(mask_stride(h, w) as usize).zip(self.mask().chunks((h * w) as usize)) {
            check(place, F32, &format!("{case}: mask"), got, expected);
        }
    }
}

#[test]
fn latents_of_models() {
    everywhere("degrade", |place| {
        Case::new(1, [32, 32], [4, 4], 2.0).check(place);
        Case::new(2, [64, 64], [8, 8], 1.0).check(place);
    });
}

/// The mid block's grid comes by halving three times, rounded up: not a divisor of the latent's.
#[test]
fn odd_and_oblong_sizes() {
    everywhere("degrade", |place| {
        for (size, mid) in [
            ([9, 17], [2, 3]),
            ([65, 65], [9, 9]),
            ([13, 40], [2, 5]),
            ([25, 7], [4, 1]),
            ([5, 5], [1, 1]),
            ([30, 23], [4, 3]),
        ] {
            for batch in [1, 3] {
                Case::new(batch, size, mid, 2.0).check(place);
            }
        }
    });
}

#[test]
fn sigma_zero_changes_nothing() {
    assert_eq!(blur_weights(0.0), [1.0, 0.0, 0.0, 0.0, 0.0]);
    everywhere("degrade", |place| {
        let mut case = Case::new(1, [16, 16], [2, 2], 0.0);
        case.step.threshold = -1.0;
        case.check(place);
        let got = case.run(place, 1, &[case.step]);
        check(place, F32, "sigma 0: degraded is D_u", &got[0], &case.denoised());
        check(place, F32, "sigma 0: renoised is x", &got[1], &case.x.values);
    });
}

/// A threshold that all masses pass, one that none passes, one that some pass; a mass equal to the threshold does not.
#[test]
fn thresholds() {
    everywhere("degrade", |place| {
        for (threshold, share) in [(-1.0, Some(1.0)), (100.0, Some(0.0)), (0.95, None)] {
            let mut case = Case::new(1, [16, 24], [2, 3], 3.0);
            case.step.threshold = threshold;
            case.check(place);
            let mask = case.mask();
            let mean = mask.iter().sum::<f64>() / mask.len() as f64;
            assert!(share.is_none_or(|share| share == mean), "threshold {threshold}: mask of mean {mean}");
        }
        let mut case = Case::new(1, [16, 24], [2, 3], 3.0);
        case.mass = Host::new([1, 1, 1, 8], DType::F32, [1.0; 8]);
        assert!(case.run(place, 1, &[case.step])[2].iter().all(|&m| m == 0.0), "1 > 1");
    });
}

/// renoised - degraded is x - D_u: the noise that was there, whatever was blurred.
#[test]
fn the_noise_stays() {
    everywhere("degrade", |place| {
        let case = Case::new(1, [12, 20], [2, 3], 2.0);
        let got = case.run(place, 1, &[case.step]);
        let noise: Vec<f64> = got[1].iter().zip(&got[0]).map(|(r, d)| r - d).collect();
        let expected: Vec<f64> = case.x.values.iter().zip(case.denoised()).map(|(x, d)| x - d).collect();
        check(place, F32, "renoised - degraded", &noise, &expected);
    });
}

/// Every call's mask has its own place; earlier ones stay.
#[test]
fn masks_of_calls_side_by_side() {
    everywhere("degrade", |place| {
        let case = Case::new(2, [9, 7], [2, 1], 2.0);
        let call = |call, threshold| Step { call, threshold, ..case.step };
        let got = case.run(place, 4, &[call(0, -1.0), call(2, 1.0), call(3, 100.0)]).remove(2);
        let stride = mask_stride(9, 7) as usize;
        for (i, image) in got.chunks_exact(stride).enumerate() {
            let expected = match i / 2 {
                0 => vec![1.0; 63],
                1 => Vec::new(),
                2 => case.mask()[i % 2 * 63..][..63].to_vec(),
                _ => vec![0.0; 63],
            };
            check(place, F32, &format!("call {}, image {}", i / 2, i % 2), image, &expected);
        }
    });
}

/// sag.md, section 0: latent 4 x 16 x 24, u = sin(0.1 i) with i over [c, h, w]; mass of the golden map; mid 2 x 3.
fn golden(sigma: f32) -> Case {
    let (h, w) = (16, 24);
    let u = (0..h * w * 4).map(|at| (0.1 * f64::from(at % 4 * h * w + at / 4)).sin());
    let outputs = Host::new([1, h, w, 4], DType::F32, u);
    let mass = [1.033983, 1.100898, 0.867001, 0.999338, 1.102617, 0.896163, 0.0, 0.0];
    let step = Step { c_skip: 0.0, c_out: 1.0, threshold: 1.0, blur: blur_weights(sigma), ..Default::default() };
    Case {
        x: normal(94, [1, h, w, 4], DType::F32),
        outputs,
        mass: Host::new([1, 1, 1, 8], DType::F32, mass),
        mid: [2, 3],
        step,
        sigma,
    }
}

#[test]
fn the_golden_blur() {
    let weights = blur_weights(2.0);
    for (got, golden) in weights.iter().zip([0.2041636854, 0.1801738143, 0.1238315329, 0.0662822425, 0.0276305489]) {
        // The page's weights were printed from f32.
        assert!((f64::from(*got) - golden).abs() < 3e-8, "{weights:?}");
    }
    everywhere("degrade", |place| {
        for (sigma, first, last, sum) in
            [(1.0, 0.2292846527, 0.2245933515, 461.7202621), (2.0, 0.0887050277, 0.0689282807, 493.7213574)]
        {
            let case = golden(sigma);
            let [degraded, _, mask] = case.run(place, 1, &[case.step]).try_into().expect("three results");
            assert_eq!(mask.iter().sum::<f64>(), 192.0);
            let moved: f64 = degraded.iter().zip(&case.outputs.values).map(|(d, u)| (d - u).abs()).sum();
            assert!((moved - sum).abs() < 1e-4, "sigma {sigma}: sum {moved} for {sum}");
            // The golden B is of the whole picture: masked everywhere.
            let all = case.run(place, 1, &[Step { threshold: -1.0, ..case.step }]).remove(0);
            let ends = [all[0], all[(15 * 24 + 23) * 4 + 3]];
            assert!((ends[0] - first).abs() < 1e-6 && (ends[1] - last).abs() < 1e-6, "sigma {sigma}: {ends:?}");
        }
    });
}

/// One of PyTorch's cases (tests/data/sag.json, made by tools/reference/sag.py): [B, 4, h, w], row by row.
#[derive(serde::Deserialize)]
struct Golden {
    shape: [u32; 4],
    denoised: Vec<f64>,
    mass: Vec<f64>,
    mid: [u32; 2],
    blur_sigma: f32,
    threshold: f32,
    mask: Vec<f64>,
    degraded: Vec<f64>,
}

#[test]
fn pytorchs_cases() {
    let text = include_str!("../data/sag.json");
    let goldens: Vec<Golden> = serde_json::from_str(text).expect("sag.json holds cases");
    for (number, golden) in goldens.iter().enumerate() {
        let [b, _, h, w] = golden.shape;
        let nchw = |at: u32| (at / (4 * h * w) * 4 + at % 4) * h * w + at / 4 % (h * w);
        let channels_last =
            |values: &[f64]| (0..b * h * w * 4).map(|at| values[nchw(at) as usize]).collect::<Vec<f64>>();
        let mut mass = golden.mass.clone();
        mass.resize(mass.len().next_multiple_of(4), 0.0);
        let blur = blur_weights(golden.blur_sigma);
        let case = Case {
            x: normal(95, [b, h, w, 4], DType::F32),
            outputs: Host::new([b, h, w, 4], DType::F32, channels_last(&golden.denoised)),
            mass: Host::new([1, 1, 1, mass.len() as u32], DType::F32, mass),
            mid: golden.mid,
            step: Step { c_out: 1.0, threshold: golden.threshold, blur, ..Default::default() },
            sigma: golden.blur_sigma,
        };
        everywhere("degrade", |place| {
            let got = case.run(place, 1, &[case.step]);
            check(place, F32, &format!("sag.json {number}: degraded"), &got[0], &channels_last(&golden.degraded));
            for (got, expected) in got[2].chunks(mask_stride(h, w) as usize).zip(golden.mask.chunks((h * w) as usize)) {
                check(place, F32, &format!("sag.json {number}: mask"), got, expected);
            }
        });
    }
}
