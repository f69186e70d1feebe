//! The networks of Stable Diffusion as functions over a recording; each file reads top to bottom.

pub mod blocks;
pub mod clip;
pub mod config;
pub(crate) mod detect;
pub mod names;
pub mod unet;
pub mod vae;
