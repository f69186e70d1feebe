//! What several test crates share: the host's side of the step scalars, and parameters without values.

/// The scalars of one model call, as `kernels/lib/step.wgsl` declares them. The lead's `src/denoiser.rs` holds the one
/// that runs; `kernel_text.rs` compares this one with the kernels, so that a test that uses it measures the real layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[allow(missing_docs)]
pub struct Step {
    pub call: u32,
    pub c_in: f32,
    pub c_skip: f32,
    pub c_out: f32,
    pub cfg: f32,
    pub sag_scale: f32,
    pub threshold: f32,
    pub blur: [f32; 5],
}

/// The field names of [`Step`] word by word, as the kernels spell them.
#[allow(dead_code)] // Every test crate compiles this file for itself, and only kernel_text.rs reads the names.
pub const STEP_FIELDS: [&str; 12] =
    ["call", "c_in", "c_skip", "c_out", "cfg", "sag_scale", "threshold", "blur0", "blur1", "blur2", "blur3", "blur4"];
