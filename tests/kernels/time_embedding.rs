//! time_embedding against cos and sin of t · frequency.

use scumble::gpu::DType;
use scumble::ops::time_embedding::{Rows, frequencies, time_embedding};

use crate::compare::{F32, check};
use crate::harness::everywhere;
use crate::values::Host;

/// The angle is an f32 product, as in diffusers; its cosine and sine are exact.
fn reference(times: &[f64], table: &[f32], cos_first: bool) -> Vec<f64> {
    let mut out = Vec::new();
    for &t in times {
        let angles: Vec<f64> = table.iter().map(|f| f64::from(t as f32 * f)).collect();
        let (cos, sin) = (angles.iter().map(|a| a.cos()), angles.iter().map(|a| a.sin()));
        if cos_first { out.extend(cos.chain(sin)) } else { out.extend(sin.chain(cos)) }
    }
    out
}

/// The embeddings of `calls` calls of one timestep each.
fn check_case(times: &Host, calls: u32, half: u32, shift: f32, cos_first: bool) {
    everywhere("time_embedding", |place| {
        let table = frequencies(half, shift);
        let mut run = place.start(DType::F32);
        let timesteps = run.bind(times);
        let host = Host::new([1, 1, 1, half], DType::F32, table.iter().map(|&f| f64::from(f)));
        let param = host.param(&run.gpu);
        let rows = Rows { calls, given: 1, out: 1 };
        let out = time_embedding(&mut run.g, timesteps, &param, rows, cos_first);
        assert_eq!((out.dims, out.dtype), ([1, 1, calls, 2 * half], DType::F32));
        let got = run.finish(&[out]);
        let case = format!("{calls} calls half {half} shift {shift} cos first {cos_first}");
        let own = &times.values[..calls as usize];
        check(place, F32, &case, &got[0], &reference(own, &table, cos_first));
    });
}

#[test]
fn every_timestep() {
    let times = Host::new([1, 1, 1, 1000], DType::F32, (0..1000).map(f64::from));
    for cos_first in [true, false] {
        check_case(&times, 1000, 160, 0.0, cos_first);
    }
}

/// Karras' sigmas fall between the training's timesteps.
#[test]
fn timesteps_between_whole_numbers() {
    let times = Host::new([1, 1, 1, 1000], DType::F32, (0..1000).map(|t| f64::from(t) * 0.999 + 0.123));
    check_case(&times, 1000, 16, 1.0, true);
}

#[test]
fn fewer_calls_than_room() {
    let times = Host::new([1, 1, 1, 8], DType::F32, [999.0, 801.0, 601.5, 400.0, 250.25, 100.0, 1.0, 0.0]);
    check_case(&times, 5, 48, 0.0, true);
}

/// diffusers' get_timestep_embedding: exp(-ln(10000) i / (half - shift)).
#[test]
fn the_frequencies_fall_from_one() {
    let table = frequencies(4, 1.0);
    let expected = [1.0, 10_000f64.powf(-1.0 / 3.0), 10_000f64.powf(-2.0 / 3.0), 1e-4];
    for (got, expected) in table.iter().zip(expected) {
        assert!((f64::from(*got) / expected - 1.0).abs() < 1e-7, "{got} for {expected}");
    }
}

/// One timestep for two prompts, as SDXL needs it, and timesteps of a call for more rows.
#[test]
fn rows_repeat_the_timesteps() {
    everywhere("time_embedding", |place| {
        let table = frequencies(8, 0.0);
        let times = Host::new([1, 1, 1, 4], DType::F32, [3.0, 500.0, 7.0, 999.0]);
        let param = Host::new([1, 1, 1, 8], DType::F32, table.iter().map(|&f| f64::from(f)));
        for (rows, expected) in [
            (Rows { calls: 4, given: 1, out: 2 }, vec![3.0, 500.0, 7.0, 999.0, 3.0, 500.0, 7.0, 999.0]),
            (Rows { calls: 2, given: 2, out: 4 }, vec![3.0, 7.0, 500.0, 999.0, 3.0, 7.0, 500.0, 999.0]),
        ] {
            let mut run = place.start(DType::F32);
            let timesteps = run.bind(&times);
            let param = param.param(&run.gpu);
            let out = time_embedding(&mut run.g, timesteps, &param, rows, true);
            assert_eq!(out.dims, [rows.out, 1, rows.calls, 16]);
            let got = run.finish(&[out]);
            check(place, F32, &format!("{rows:?}"), &got[0], &reference(&expected, &table, true));
        }
    });
}
