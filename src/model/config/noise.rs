//! The noise that a model was trained with.

use std::path::Path;

use serde::Deserialize;

use super::{parse, unsupported};
use crate::error::Result;

/// diffusers' scheduler_config.json: the noise schedule that the model was trained with.
#[derive(Clone, Debug, Deserialize)]
pub struct NoiseConfig {
    /// `scaled_linear` or `linear`.
    #[serde(default = "scaled_linear")]
    pub beta_schedule: String,
    /// First beta.
    #[serde(default = "beta_start")]
    pub beta_start: f64,
    /// Last beta.
    #[serde(default = "beta_end")]
    pub beta_end: f64,
    /// Steps of training.
    #[serde(default = "train_timesteps")]
    pub num_train_timesteps: usize,
    /// `epsilon` or `v_prediction`.
    #[serde(default = "epsilon")]
    pub prediction_type: String,
    /// Betas rescaled so that the last step has no signal (Lin et al. 2023).
    #[serde(default)]
    pub rescale_betas_zero_snr: bool,
}

impl Default for NoiseConfig {
    fn default() -> Self {
        NoiseConfig {
            beta_schedule: scaled_linear(),
            beta_start: beta_start(),
            beta_end: beta_end(),
            num_train_timesteps: train_timesteps(),
            prediction_type: epsilon(),
            rescale_betas_zero_snr: false,
        }
    }
}

fn scaled_linear() -> String {
    "scaled_linear".into()
}

fn beta_start() -> f64 {
    0.00085
}

fn beta_end() -> f64 {
    0.012
}

fn train_timesteps() -> usize {
    1000
}

fn epsilon() -> String {
    "epsilon".into()
}

impl NoiseConfig {
    /// Parse the JSON of a diffusers scheduler.
    ///
    /// # Errors
    /// As [`UNetConfig::parse`].
    pub fn parse(path: &Path, json: &str) -> Result<NoiseConfig> {
        let config: NoiseConfig = parse(path, json)?;
        if !["scaled_linear", "linear"].contains(&config.beta_schedule.as_str()) {
            return Err(unsupported(path, "beta_schedule", "scaled_linear or linear", &config.beta_schedule));
        }
        if !["epsilon", "v_prediction"].contains(&config.prediction_type.as_str()) {
            return Err(unsupported(path, "prediction_type", "epsilon or v_prediction", &config.prediction_type));
        }
        let ordered = 0.0 < config.beta_start && config.beta_start <= config.beta_end && config.beta_end < 1.0;
        if !ordered || !(2..=10_000).contains(&config.num_train_timesteps) {
            let found = format!("{} .. {}, {} steps", config.beta_start, config.beta_end, config.num_train_timesteps);
            return Err(unsupported(path, "betas", "0 < beta_start <= beta_end < 1 and 2 to 10000 steps", found));
        }
        Ok(config)
    }
}
