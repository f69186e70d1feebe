//! Is what the device computed what the reference says? One table of limits, by what is stored.

use crate::harness::Place;

/// How far a result may be from its reference.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// The row's name.
    pub name: &'static str,
    /// Squared differences over squared references.
    pub nmse: f64,
    /// The largest difference over the largest reference.
    pub max: f64,
}

/// Results stored in f32, computed in f32. Lavapipe: at most 2e-13 and 9e-7.
pub const F32: Limit = Limit { name: "f32", nmse: 1e-12, max: 4e-6 };
/// Results stored in f16, computed in f32. Lavapipe: 6e-8 and 4.2e-4, which is rounding to nearest; WGSL leaves the
/// direction open, and rounding towards zero has four times the first and twice the second.
pub const F16: Limit = Limit { name: "f16", nmse: 3e-7, max: 1e-3 };
/// Sums of eight products in f16. Lavapipe: 1.8e-7 and 1.0e-3. Twice the room of [`F16`], since the variant is taken only by name.
pub const HALF: Limit = Limit { name: "half", nmse: 6e-7, max: 2e-3 };
/// Convolutions in Winograd's tiles, of transforms of inputs and of weights and products in f16. Lavapipe: 4.7e-7 and 9.2e-4.
pub const WINOGRAD: Limit = Limit { name: "winograd", nmse: 6e-7, max: 2e-3 };
/// Norms in f32 of inputs whose mean is a thousand times their spread: an ulp of the mean is 6e-5 of the spread.
/// Lavapipe: 9e-9 and 7e-5. A sum of squares would be off by some tenths.
pub const F32_LARGE_MEAN: Limit = Limit { name: "f32, mean 1000", nmse: 3e-8, max: 2e-4 };

/// The row for an element type.
pub fn limit(dtype: scumble::gpu::DType) -> Limit {
    match dtype {
        scumble::gpu::DType::F32 => F32,
        _ => F16,
    }
}

/// The row for an element type and a variant.
pub fn limit_of(place: &Place, dtype: scumble::gpu::DType) -> Limit {
    if place.variant == "half" { HALF } else { limit(dtype) }
}

/// Compare all elements. The device's NaNs (poison that nothing overwrote, too) fail; beyond the reference's end the
/// poison must still be there.
pub fn check(place: &Place, limit: Limit, case: &str, got: &[f64], expected: &[f64]) {
    let device = &place.gpu.caps().name;
    let here = format!("{}/{} on {device}, {case}", place.op, place.variant);
    assert!(got.len() >= expected.len(), "{here}: {} elements, expected {}", got.len(), expected.len());
    let (got, rest) = got.split_at(expected.len());
    assert!(rest.iter().all(|v| v.is_nan()), "{here}: something was written beyond the last element");
    if expected.is_empty() {
        return;
    }
    if let Some(at) = got.iter().position(|v| !v.is_finite()) {
        panic!(
            "{here}: element {at} of {} is {} (NaN: perhaps not written), expected {}",
            got.len(),
            got[at],
            expected[at]
        );
    }
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let scale: f64 = expected.iter().map(|v| v * v).sum();
    let (mut worst, mut sum) = (0, 0.0);
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        sum += (g - e) * (g - e);
        if (g - e).abs() > (got[worst] - expected[worst]).abs() {
            worst = i;
        }
    }
    // A reference of zeros asks for zeros.
    let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { part };
    let (nmse, max) = (ratio(sum, scale), ratio((got[worst] - expected[worst]).abs(), largest));
    if std::env::var_os("SCUMBLE_MEASURE").is_some() {
        println!("measured\t{}\t{}\t{}\t{nmse:.1e}\t{max:.1e}\t{case}", place.op, place.variant, limit.name);
    }
    assert!(
        nmse <= limit.nmse && max <= limit.max,
        "{here}: NMSE {nmse:.1e} (limit {:.0e}), largest difference {max:.1e} (limit {:.0e}): element {worst} is {}, expected {}",
        limit.nmse,
        limit.max,
        got[worst],
        expected[worst]
    );
}
