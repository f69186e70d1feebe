//! The only code that names wgpu: device, kernel loader, recorder, planner, buffers, runner.
//!
//! Above it, ops record nodes into a [`graph::Graph`]; [`plan`] turns lifetimes into buffer slots; [`run`] encodes.

mod buffer;
mod cache;
pub mod caps;
pub mod device;
pub mod graph;
pub mod kernel;
#[cfg(not(target_arch = "wasm32"))]
pub mod noop;
pub mod plan;
pub mod profile;
pub mod run;
pub mod tune;
mod unroll;
pub mod upload;
pub(crate) mod wait;

pub use buffer::{Buffer, Reading};
pub use caps::{Caps, DeviceKind};
pub use device::{Gpu, GpuOptions};
pub use graph::{DType, Graph, Statistics, Sums, Tensor, Tile};
pub use run::Program;
