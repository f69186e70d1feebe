//! The samplers against k-diffusion's trajectories (tools/reference/sampling.py): their recordings are replayed here on the
//! CPU in f64, with the denoiser and the noise of the reference.

use scumble::noise::Generator;
use scumble::sampler::{Command, Latent, Recording, SAMPLERS, sampler};

#[derive(serde::Deserialize)]
struct Trajectory {
    sampler: String,
    sigmas: Vec<f64>,
    start: Vec<f64>,
    steps: Vec<Vec<f64>>,
    noise: Vec<Vec<f64>>,
}

fn denoiser(x: f64, sigma: f64) -> f64 {
    (0.3 * x + 0.1).tanh() / (1.0 + 0.5 * sigma) + 0.2 * sigma.sin()
}

/// Replays a recording in the buffers that its plan gives, so that a wrong lifetime shows.
fn replay(recording: &Recording, start: &[f64], noise: &mut impl FnMut() -> Vec<f64>) -> Vec<Vec<f64>> {
    let plan = recording.plan();
    let mut slots = vec![Vec::new(); plan.slots.len()];
    let slot = |latent: Latent| plan.slot_of[latent.0];
    slots[slot(Recording::START)] = start.to_vec();
    let mut after = Vec::new();
    for step in &recording.steps {
        // The host writes a step's noise before the step runs.
        for command in step {
            if let Command::Noise { out } = command {
                slots[slot(*out)] = noise();
            }
        }
        let mut last = Latent(0);
        for command in step {
            match command {
                Command::Noise { .. } => continue,
                Command::Denoise { out, x, sigma } => {
                    assert_ne!(slot(*out), slot(*x), "a dispatch cannot read what it writes");
                    slots[slot(*out)] = slots[slot(*x)].iter().map(|&v| denoiser(v, *sigma)).collect();
                    last = *out;
                }
                Command::Lincomb { out, terms } => {
                    assert!(terms.iter().all(|(_, x)| slot(*x) != slot(*out)) && terms.len() <= 4);
                    let value = |i: usize| terms.iter().map(|(c, x)| c * slots[slot(*x)][i]).sum();
                    slots[slot(*out)] = (0..start.len()).map(value).collect();
                    last = *out;
                }
            }
        }
        after.push(slots[slot(last)].clone());
    }
    after
}

#[test]
fn trajectories_are_k_diffusions() {
    let text = include_str!("data/trajectories.json");
    let cases: Vec<Trajectory> = serde_json::from_str(text).expect("trajectories.json");
    for row in SAMPLERS {
        assert!(cases.iter().any(|case| case.sampler == row.name), "no trajectory of {}", row.name);
    }
    for case in cases {
        let recording = Recording::new(sampler(&case.sampler).expect("a row of the table"), &case.sigmas);
        let mut noise = case.noise.iter().cloned();
        let found = replay(&recording, &case.start, &mut || noise.next().expect("as many draws as the reference"));
        assert!(noise.next().is_none(), "{}: fewer draws than the reference", case.sampler);
        for (step, (found, expected)) in found.iter().zip(&case.steps).enumerate() {
            for (f, e) in found.iter().zip(expected) {
                assert!((f - e).abs() <= 1e-9 * (1.0 + e.abs()), "{} step {step}: {f} for {e}", case.sampler);
            }
        }
        assert_eq!(found.len(), case.steps.len());
    }
}

#[test]
fn the_references_noise_is_our_generators() {
    let cases: Vec<Trajectory> =
        serde_json::from_str(include_str!("data/trajectories.json")).expect("trajectories.json");
    let case = cases.iter().find(|case| case.sampler == "euler_ancestral").expect("one");
    let mut generator = Generator::new(7);
    for draw in &case.noise {
        // As f32 again: JSON's decimals need not come back to the last bit of an f64.
        let theirs: Vec<f32> = draw.iter().map(|&v| v as f32).collect();
        assert_eq!(generator.randn(16), theirs);
    }
}

#[test]
fn an_unknown_sampler_is_told_the_list() {
    let error = sampler("eular").err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("eular") && SAMPLERS.iter().all(|row| error.contains(row.name)), "{error}");
}
