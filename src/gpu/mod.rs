//! The only code that names wgpu: device, kernel loader, recorder, planner, runner.
//!
//! Above it, ops record nodes into a [`graph::Graph`]; [`plan`] turns lifetimes into buffer slots; [`run`] encodes.

pub mod device;
pub mod graph;
pub mod kernel;
pub mod plan;
pub mod run;

pub use device::{Caps, DeviceKind, Gpu, GpuOptions};
pub use graph::{DType, Graph, Tensor};
pub use run::{Buffer, Program};
