//! Throughput: every heavy op at every shape of the models, a denoising step, a picture. What is timed is checked first.

pub mod kernels;
pub mod limits;
pub mod op;
pub mod shapes;
pub mod step;

/// Times of one thing, milliseconds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Samples {
    /// The middle one.
    pub median_ms: f64,
    /// The fastest.
    pub min_ms: f64,
    /// Between the quarters: how far they spread.
    pub iqr_ms: f64,
    /// How many.
    pub samples: usize,
}

impl Samples {
    /// Of at least one time.
    ///
    /// # Panics
    /// If there is none.
    pub fn of(mut times: Vec<f64>) -> Samples {
        assert!(!times.is_empty(), "samples of nothing");
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        Samples { median_ms: at(0.5), min_ms: times[0], iqr_ms: at(0.75) - at(0.25), samples: times.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_ordered() {
        let s = Samples::of(vec![5.0, 1.0, 2.0, 4.0, 3.0]);
        assert_eq!((s.median_ms, s.min_ms, s.iqr_ms, s.samples), (3.0, 1.0, 2.0, 5));
        let s = Samples::of(vec![7.0]);
        assert_eq!((s.median_ms, s.min_ms, s.iqr_ms, s.samples), (7.0, 7.0, 0.0, 1));
    }
}
