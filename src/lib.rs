//! Stable Diffusion with Self-Attention Guidance, in hand-written WGSL compute kernels on wgpu.
//!
//! The data's way is one straight line, and the modules follow it:
//!
//! ```text
//! prompt ── text ── clip ──────────────┐ context (uncond, cond)
//! seed ── noise ── x [B, h, w, 4] ─────┤
//!                                      ▼
//!  sampler   for each step:  denoised = denoise(x, sigma);  x = lincomb(...)
//!            guidance   UNet on [uncond, cond] → degrade → UNet on [degraded] → denoised
//!                                      ▼
//!  vae ── image ── PNG
//! ```

pub mod pipeline;
pub mod probe;
pub mod text;

pub mod denoiser;
pub mod guidance;
pub mod image;
pub mod model;
pub mod noise;
pub mod sampler;
pub mod schedule;
pub mod weights;

pub mod error;
pub mod gpu;
pub mod ops;

pub use error::{Error, Result};
pub use pipeline::{Generated, Pipeline, Precision, Progress, Request};
