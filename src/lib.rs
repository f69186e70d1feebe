//! Stable Diffusion with Self-Attention Guidance, in hand-written WGSL compute kernels on wgpu.

pub mod error;
pub mod gpu;

pub mod model;
pub mod ops;



pub mod weights;

pub use error::{Error, Result};
