//! What a device can do: the only thing that the variant tables look at besides shapes.

/// What the kernels on matrix units use: the matrices, and barriers of a subgroup, with which each goes its own way between those of its workgroup.
pub(super) const COOP: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SUBGROUP_BARRIER);

/// What kind of device runs the kernels; software devices get kernels without barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A graphics card with its own memory.
    Discrete,
    /// A GPU that shares memory with the processor.
    Integrated,
    /// A GPU of a virtual machine.
    Virtual,
    /// A software device (lavapipe, SwiftShader, WARP).
    Cpu,
    /// Unknown (browsers do not say).
    Other,
}

/// What a device can do: the only thing that the variant tables look at besides shapes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Caps {
    /// The adapter's name, as the driver gives it.
    pub name: String,
    /// The API behind wgpu: vulkan, metal, dx12, webgpu, noop.
    pub backend: String,
    /// The driver's name and version.
    pub driver: String,
    /// Graphics card, integrated, software.
    pub kind: DeviceKind,
    /// `f16` in storage buffers and arithmetic.
    pub f16: bool,
    /// Subgroup operations.
    pub subgroups: bool,
    /// Smallest and largest subgroup size.
    pub subgroup_size: [u32; 2],
    /// Time stamps at pass boundaries.
    pub timestamps: bool,
    /// Square cooperative-matrix shapes with f16 inputs and f32 accumulators, by edge (8, 16).
    pub cooperative: Vec<u32>,
    /// Bytes of one storage binding.
    pub max_binding: u64,
    /// Bytes of one buffer.
    pub max_buffer: u64,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations in a workgroup, all in a row.
    pub invocations: u32,
    /// Storage buffers in one stage.
    pub storage_buffers: u32,
    /// Alignment of a uniform binding's offset, bytes.
    pub uniform_alignment: u32,
    /// Bytes of the largest device-local memory heap, where the backend tells (Vulkan); of the host, for software devices.
    pub memory: Option<u64>,
}

impl Caps {
    pub(super) fn new(info: &wgpu::AdapterInfo, features: wgpu::Features, limits: &wgpu::Limits) -> Self {
        Caps {
            name: if info.name.is_empty() { "browser GPU".into() } else { info.name.clone() },
            backend: info.backend.to_string(),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            kind: match info.device_type {
                wgpu::DeviceType::DiscreteGpu => DeviceKind::Discrete,
                wgpu::DeviceType::IntegratedGpu => DeviceKind::Integrated,
                wgpu::DeviceType::VirtualGpu => DeviceKind::Virtual,
                wgpu::DeviceType::Cpu => DeviceKind::Cpu,
                wgpu::DeviceType::Other => DeviceKind::Other,
            },
            f16: features.contains(wgpu::Features::SHADER_F16),
            subgroups: features.contains(wgpu::Features::SUBGROUP),
            subgroup_size: [info.subgroup_min_size, info.subgroup_max_size],
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            cooperative: Vec::new(),
            max_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            invocations: limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
            storage_buffers: limits.max_storage_buffers_per_shader_stage,
            uniform_alignment: limits.min_uniform_buffer_offset_alignment,
            memory: None,
        }
    }

    /// Are subgroups always of `size`? (wgpu cannot ask for one size where a device has several.)
    pub fn subgroup_of(&self, size: u32) -> bool {
        self.subgroups && self.subgroup_size == [size, size]
    }

    /// Lanes of a subgroup, where all subgroups have as many.
    pub fn lanes(&self) -> Option<u32> {
        let [lanes, most] = self.subgroup_size;
        (self.subgroups && lanes == most && lanes > 0).then_some(lanes)
    }

    /// Edge of the matrices that the coop kernels use, and lanes of the subgroups that hold them; none where the device or
    /// its subgroups do not suit (wgpu cannot ask for one size of several).
    pub fn coop(&self) -> Option<[u32; 2]> {
        let edge = self.cooperative.iter().copied().filter(|edge| [8, 16].contains(edge)).max()?;
        let lanes = self.lanes()?;
        // Metal's compiler refuses what naga writes for matrices in memory of vectors.
        let suits = self.f16 && self.backend != "metal";
        (suits && self.workgroup_memory >= 32 << 10).then_some([edge, lanes])
    }

    /// Is this a software device, where barriers cost more than arithmetic?
    pub fn is_cpu(&self) -> bool {
        self.kind == DeviceKind::Cpu
    }
}

/// The capabilities of an adapter, with what only its native handle or the system tells.
pub(super) fn adapter_caps(adapter: &wgpu::Adapter) -> Caps {
    let mut caps = Caps::new(&adapter.get_info(), adapter.features(), &adapter.limits());
    let suits = adapter.features().contains(COOP);
    for shape in adapter.cooperative_matrix_properties().into_iter().filter(|_| suits) {
        use wgpu::CooperativeScalarType::{F16, F32};
        let square = shape.m_size == shape.n_size && shape.n_size == shape.k_size;
        if square && matches!((shape.ab_type, shape.cr_type), (F16, F32)) && !caps.cooperative.contains(&shape.m_size) {
            caps.cooperative.push(shape.m_size);
        }
    }
    // A software device lives in the host's memory, whatever heap it claims.
    caps.memory = if caps.is_cpu() { host_memory() } else { device_memory(adapter) };
    caps
}

/// Bytes that the host could still give, where the system tells (Linux).
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Bytes of the largest device-local heap; only Vulkan tells through wgpu's native handle.
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
#[allow(unsafe_code)] // Reads two properties through the raw handle of a live adapter; nothing is created or freed.
fn device_memory(adapter: &wgpu::Adapter) -> Option<u64> {
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let properties = unsafe {
        hal.shared_instance().raw_instance().get_physical_device_memory_properties(hal.raw_physical_device())
    };
    // Flag 1 is VK_MEMORY_HEAP_DEVICE_LOCAL_BIT.
    properties.memory_heaps_as_slice().iter().filter(|heap| heap.flags.as_raw() & 1 != 0).map(|heap| heap.size).max()
}

#[cfg(any(target_arch = "wasm32", target_vendor = "apple"))]
fn device_memory(_: &wgpu::Adapter) -> Option<u64> {
    None
}
