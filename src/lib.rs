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
pub mod request;

pub mod conditioning;
pub mod denoiser;
pub mod forecast;
pub mod guidance;
pub mod image;
pub mod inpaint;
mod layout;
pub mod model;
pub mod noise;
pub mod parts;
pub mod picture;
pub mod sampler;
mod sampling;
pub mod schedule;
pub mod text;
mod tiles;

pub mod bench;

pub mod checkpoint;
pub mod files;
pub mod loader;
pub mod lora;
pub mod weights;

pub mod disk;
pub mod error;
pub mod gpu;
pub mod ops;

pub use checkpoint::{Checkpoint, Source};
pub use error::{Error, Result};
pub use pipeline::{LoadOptions, Pipeline};
pub use request::{Generated, Precision, Progress, Request};
