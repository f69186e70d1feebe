//! Capability sets for wgpu's `noop` backend, which computes nothing and validates everything: plans are tested on them.

/// A capability set for [`Gpu::noop`].
#[derive(Clone, Debug)]
pub struct NoopProfile {
    /// A name for messages.
    pub name: &'static str,
    /// A software device?
    pub cpu: bool,
    /// f16 in shaders?
    pub f16: bool,
    /// Subgroup operations?
    pub subgroups: bool,
    /// The one subgroup size.
    pub subgroup_size: u32,
    /// See [`Caps::cooperative`].
    pub cooperative: &'static [u32],
    /// See [`Caps::max_binding`].
    pub max_binding: u64,
    /// See [`Caps::max_buffer`].
    pub max_buffer: u64,
    /// See [`Caps::storage_buffers`].
    pub storage_buffers: u32,
    /// See [`Caps::workgroup_memory`].
    pub workgroup_memory: u32,
    /// See [`Caps::invocations`].
    pub invocations: u32,
    /// See [`Caps::memory`]; what the backend says, if `None`.
    pub memory: Option<u64>,
    /// See [`GpuOptions::variants`].
    pub variants: &'static [(&'static str, &'static str)],
}

impl NoopProfile {
    /// The least that WebGPU guarantees: no f16, no subgroups, 128 MiB bindings, 8 storage buffers, 16 KiB.
    pub const BROWSER: NoopProfile = NoopProfile {
        name: "browser minimum",
        cpu: false,
        f16: false,
        subgroups: false,
        subgroup_size: 32,
        cooperative: &[],
        max_binding: 128 << 20,
        max_buffer: 256 << 20,
        storage_buffers: 8,
        workgroup_memory: 16 << 10,
        invocations: 256,
        memory: None,
        variants: &[],
    };
    /// Mesa's software device.
    pub const LAVAPIPE: NoopProfile = NoopProfile {
        name: "lavapipe",
        cpu: true,
        f16: true,
        subgroups: true,
        subgroup_size: 8,
        max_buffer: 2 << 30,
        storage_buffers: 32,
        workgroup_memory: 32 << 10,
        invocations: 1024,
        ..Self::BROWSER
    };
    /// Mesa's software device since it has matrix units.
    pub const LAVAPIPE_26: NoopProfile = NoopProfile { name: "lavapipe 26", cooperative: &[8], ..Self::LAVAPIPE };
    /// An Apple GPU through Metal.
    pub const APPLE: NoopProfile = NoopProfile {
        name: "Apple",
        f16: true,
        subgroups: true,
        max_binding: 4 << 30,
        max_buffer: 4 << 30,
        storage_buffers: 31,
        workgroup_memory: 32 << 10,
        invocations: 1024,
        ..Self::BROWSER
    };
    /// An NVIDIA H200 through Vulkan.
    pub const H200: NoopProfile = NoopProfile {
        name: "H200",
        f16: true,
        subgroups: true,
        cooperative: &[16],
        max_binding: (2 << 30) - 4,
        max_buffer: 64 << 30,
        storage_buffers: 96,
        workgroup_memory: 48 << 10,
        invocations: 1024,
        ..Self::BROWSER
    };
}
