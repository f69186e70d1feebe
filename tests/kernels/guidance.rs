//! guidance against D_u + cfg (D_c - D_u) + s (degraded - D(renoised)), D = c_skip x + c_out output.

use scumble::denoiser::Step;
use scumble::gpu::DType;
use scumble::ops::guidance::{Degraded, guidance};

use crate::compare::{F32, check};
use crate::harness::everywhere;
use crate::values::{Host, normal};

const STEP: Step = Step {
    call: 0,
    c_in: 0.3,
    c_skip: 0.9,
    c_out: -2.5,
    sigma: 0.0,
    cfg: 7.5,
    sag_scale: 0.75,
    threshold: 1.0,
    blur: [0.0; 5],
};

/// D = c_skip x + c_out output
fn denoised(step: &Step, x: f64, output: f64) -> f64 {
    f64::from(step.c_skip) * x + f64::from(step.c_out) * output
}

/// x, the network's outputs for it (uncond first, if there), and SAG's three tensors.
struct Inputs {
    x: Host,
    outputs: Host,
    sag: [Host; 3],
}

impl Inputs {
    fn new(batch: u32, uncond: bool) -> Inputs {
        let dims = [batch, 5, 7, 4];
        let outputs = if uncond { [2 * batch, 5, 7, 4] } else { dims };
        Inputs {
            x: normal(81, dims, DType::F32),
            outputs: normal(82, outputs, DType::F32),
            sag: [83, 84, 85].map(|s| normal(s, dims, DType::F32)),
        }
    }

    fn reference(&self, step: &Step, sag: bool) -> Vec<f64> {
        let (x, out, count) = (&self.x.values, &self.outputs.values, self.x.values.len());
        let [degraded, renoised, again] = &self.sag;
        let value = |i: usize| {
            let first = denoised(step, x[i], out[i]);
            let cfg = match out.len() > count {
                true => first + f64::from(step.cfg) * (denoised(step, x[i], out[count + i]) - first),
                false => first,
            };
            let term = degraded.values[i] - denoised(step, renoised.values[i], again.values[i]);
            if sag { cfg + f64::from(step.sag_scale) * term } else { cfg }
        };
        (0..count).map(value).collect()
    }
}

fn check_case(batch: u32, uncond: bool, sag: bool) {
    everywhere("guidance", |place| {
        let inputs = Inputs::new(batch, uncond);
        let mut run = place.start(DType::F32);
        let (x, outputs) = (run.bind(&inputs.x), run.bind(&inputs.outputs));
        let degraded = sag.then(|| {
            let [degraded, renoised, again] = inputs.sag.each_ref().map(|host| run.bind(host));
            Degraded { degraded, renoised, again }
        });
        let out = run.output(inputs.x.dims);
        guidance(&mut run.g, x, outputs, degraded, out);
        let got = run.finish_steps(&[STEP], &[out]);
        check(place, F32, &format!("batch {batch} uncond {uncond} sag {sag}"), &got[0], &inputs.reference(&STEP, sag));
    });
}

#[test]
fn cond_alone() {
    check_case(1, false, false);
}

#[test]
fn classifier_free() {
    check_case(1, true, false);
    check_case(3, true, false);
}

#[test]
fn self_attention() {
    check_case(1, true, true);
    check_case(3, true, true);
}

#[test]
fn self_attention_without_uncond() {
    check_case(2, false, true);
}

/// Scale 0 adds nothing, bit for bit.
#[test]
fn a_sag_scale_of_zero_is_plain_guidance() {
    everywhere("guidance", |place| {
        let inputs = Inputs::new(1, true);
        let step = Step { sag_scale: 0.0, ..STEP };
        let both = [true, false].map(|sag| {
            let mut run = place.start(DType::F32);
            let (x, outputs) = (run.bind(&inputs.x), run.bind(&inputs.outputs));
            let degraded = sag.then(|| {
                let [degraded, renoised, again] = inputs.sag.each_ref().map(|host| run.bind(host));
                Degraded { degraded, renoised, again }
            });
            let out = run.output(inputs.x.dims);
            guidance(&mut run.g, x, outputs, degraded, out);
            run.finish_steps(&[step], &[out]).remove(0)
        });
        assert_eq!(both[0], both[1]);
    });
}
