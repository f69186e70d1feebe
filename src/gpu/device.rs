//! The device: adapters, what they can do ([`Caps`]), creation of buffers with scopes, and waiting without blocking.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use super::kernel::Pipeline;
use super::run::Buffer;
use crate::error::{Error, Result};

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
    /// Invocations in a workgroup.
    pub invocations: u32,
    /// Storage buffers in one stage.
    pub storage_buffers: u32,
    /// Alignment of a uniform binding's offset, bytes.
    pub uniform_alignment: u32,
    /// Bytes of the largest device-local memory heap, where the backend tells (Vulkan); of the host, for software devices.
    pub memory: Option<u64>,
}

impl Caps {
    fn new(info: &wgpu::AdapterInfo, features: wgpu::Features, limits: &wgpu::Limits) -> Self {
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
            invocations: limits.max_compute_invocations_per_workgroup,
            storage_buffers: limits.max_storage_buffers_per_shader_stage,
            uniform_alignment: limits.min_uniform_buffer_offset_alignment,
            memory: None,
        }
    }

    /// Are subgroups always of `size`? (wgpu cannot ask for one size where a device has several.)
    pub fn subgroup_of(&self, size: u32) -> bool {
        self.subgroups && self.subgroup_size == [size, size]
    }

    /// Is this a software device, where barriers cost more than arithmetic?
    pub fn is_cpu(&self) -> bool {
        self.kind == DeviceKind::Cpu
    }
}

/// How to choose and open a device.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// A part of the adapter's name (any case), or its index in [`Gpu::adapters`]. `None`: the fastest kind.
    pub device: Option<String>,
    /// Kernel variants forced by name, `(op, variant)`, to bisect a fault: `("conv2d", "portable")`.
    pub variants: Vec<(String, String)>,
}

/// An open device with its queue, capabilities, and pipelines. Cheap to clone.
#[derive(Clone)]
pub struct Gpu {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub caps: Caps,
    pub pipelines: Mutex<HashMap<String, Arc<Pipeline>>>,
    variants: BTreeMap<String, String>,
    lost: Arc<Mutex<Option<String>>>,
    live_bytes: Mutex<Live>,
}

/// Bytes in buffers that this [`Gpu`] created: now, and at most since the last reset.
#[derive(Clone, Copy, Default)]
struct Live {
    now: u64,
    peak: u64,
}

const NO_ADAPTER: &str = "no GPU adapter found: scumble needs Vulkan, Metal or DX12; install your graphics driver, \
    or on Debian/Ubuntu a software device with `apt-get install libvulkan1 mesa-vulkan-drivers` (slower)";

/// A poisoned lock only says that another thread panicked; the data under these locks is whole at all times.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Gpu {
    /// The capabilities of every adapter of this machine, in the order that `--device INDEX` counts.
    pub async fn adapters() -> Vec<Caps> {
        list_adapters().await.iter().map(adapter_caps).collect()
    }

    /// Open an adapter: the one that `options.device` names, else the best kind (discrete, integrated, virtual, CPU).
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none; [`Error::Invalid`] if the name or index fits none (the list is told).
    pub async fn open(options: &GpuOptions) -> Result<Gpu> {
        let adapters = list_adapters().await;
        if adapters.is_empty() {
            return Err(Error::NoAdapter(NO_ADAPTER.into()));
        }
        let caps: Vec<Caps> = adapters.iter().map(adapter_caps).collect();
        let index = match &options.device {
            None => (0..caps.len()).min_by_key(|&i| (caps[i].kind as u32, i)).unwrap_or(0),
            Some(wanted) => choose(&caps, wanted)?,
        };
        Self::from_adapter(&adapters[index], caps[index].clone(), options).await
    }

    async fn from_adapter(adapter: &wgpu::Adapter, caps: Caps, options: &GpuOptions) -> Result<Gpu> {
        let mut features = wgpu::Features::empty();
        for wanted in [wgpu::Features::SHADER_F16, wgpu::Features::SUBGROUP, wgpu::Features::TIMESTAMP_QUERY] {
            features |= adapter.features() & wanted;
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("scumble"),
            required_features: features,
            required_limits: adapter.limits(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let refused = |e: wgpu::RequestDeviceError| {
            Error::NoAdapter(format!(
                "{} refused to open a device: {e}; update its driver or choose another with --device",
                caps.name
            ))
        };
        let (device, queue) = adapter.request_device(&descriptor).await.map_err(refused)?;
        let gpu = Self::wrap(device, queue, caps, &options.variants)?;
        let lost = gpu.inner.lost.clone();
        gpu.inner.device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                lock(&lost).get_or_insert(message);
            }
        });
        // An error outside every scope would otherwise panic; the next wait reports it instead.
        let lost = gpu.inner.lost.clone();
        gpu.inner.device.on_uncaptured_error(Arc::new(move |error| {
            lock(&lost).get_or_insert(error.to_string());
        }));
        Ok(gpu)
    }

    /// Run on a device that the host program owns (a game engine, a browser app). Its features and limits decide the
    /// kernels; its error handlers stay the host's.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `variants` names an unknown op or variant.
    pub fn from_device(device: wgpu::Device, queue: wgpu::Queue, variants: &[(String, String)]) -> Result<Gpu> {
        let caps = Caps::new(&device.adapter_info(), device.features(), &device.limits());
        Self::wrap(device, queue, caps, variants)
    }

    fn wrap(device: wgpu::Device, queue: wgpu::Queue, caps: Caps, variants: &[(String, String)]) -> Result<Gpu> {
        for (op, variant) in variants {
            crate::ops::check_variant(op, variant)?;
        }
        let inner = Inner {
            device,
            queue,
            caps,
            pipelines: Mutex::default(),
            variants: variants.iter().cloned().collect(),
            lost: Arc::default(),
            live_bytes: Mutex::default(),
        };
        Ok(Gpu { inner: Arc::new(inner) })
    }

    /// A device that computes nothing but validates everything, with the capabilities given: for tests of plans.
    #[cfg(not(target_arch = "wasm32"))]
    pub async fn noop(profile: &NoopProfile) -> Result<Gpu> {
        let mut features = wgpu::Features::empty();
        features.set(wgpu::Features::SHADER_F16, profile.f16);
        features.set(wgpu::Features::SUBGROUP, profile.subgroups);
        features.set(wgpu::Features::TIMESTAMP_QUERY, true);
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: profile.max_binding,
            max_buffer_size: profile.max_buffer,
            max_storage_buffers_per_shader_stage: profile.storage_buffers,
            max_compute_workgroup_storage_size: profile.workgroup_memory,
            max_compute_invocations_per_workgroup: profile.invocations,
            ..Default::default()
        };
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::NOOP;
        descriptor.backend_options.noop = wgpu::NoopBackendOptions {
            enable: true,
            limits: Some(limits),
            features: Some(features),
            device_type: Some(if profile.cpu { wgpu::DeviceType::Cpu } else { wgpu::DeviceType::DiscreteGpu }),
            subgroup_min_size: Some(profile.subgroup_size),
            subgroup_max_size: Some(profile.subgroup_size),
        };
        let adapters = wgpu::Instance::new(descriptor).enumerate_adapters(wgpu::Backends::NOOP).await;
        let adapter = adapters.first().ok_or_else(|| Error::NoAdapter("the noop backend is not there".into()))?;
        let mut caps = adapter_caps(adapter);
        caps.name = profile.name.into();
        let variants = profile.variants.iter().map(|(op, variant)| ((*op).into(), (*variant).into())).collect();
        Self::from_adapter(adapter, caps, &GpuOptions { device: None, variants }).await
    }

    /// What this device can do.
    pub fn caps(&self) -> &Caps {
        &self.inner.caps
    }

    /// The variant that the user forced for an op, if any.
    pub fn forced_variant(&self, op: &str) -> Option<&str> {
        self.inner.variants.get(op).map(String::as_str)
    }

    /// Bytes in buffers that this device holds for scumble now, and the most since [`Gpu::reset_peak`].
    pub fn memory_in_use(&self) -> (u64, u64) {
        let live = *lock(&self.inner.live_bytes);
        (live.now, live.peak)
    }

    /// Start a new measurement of the peak.
    pub fn reset_peak(&self) {
        let mut live = lock(&self.inner.live_bytes);
        live.peak = live.now;
    }

    /// Bytes that the driver's allocator reports as allocated, where the backend tells; the check of our own count.
    pub fn allocator_bytes(&self) -> Option<u64> {
        self.inner.device.generate_allocator_report().map(|report| report.total_allocated_bytes)
    }

    pub(super) fn count(&self, bytes: i64) {
        let mut live = lock(&self.inner.live_bytes);
        live.now = live.now.saturating_add_signed(bytes);
        live.peak = live.peak.max(live.now);
    }

    /// Create a buffer of `bytes` (rounded up to 16) in an out-of-memory and a validation scope.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] above the device's limits, [`Error::OutOfMemory`], [`Error::Device`].
    pub(super) async fn create_buffer(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<Buffer> {
        let bytes = bytes.max(16).next_multiple_of(16);
        self.check_size(label, bytes)?;
        let device = &self.inner.device;
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size: bytes, usage, mapped_at_creation: false };
        let (raw, memory, invalid) = {
            let invalid = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let raw = device.create_buffer(&descriptor);
            (raw, memory.pop(), invalid.pop())
        };
        if memory.await.is_some() {
            return Err(Error::OutOfMemory { what: label.into(), device: self.caps().name.clone(), needed: bytes });
        }
        if let Some(e) = invalid.await {
            return Err(self.refused(format!("buffer {label} of {bytes} bytes"), &e));
        }
        Ok(Buffer::new(self.clone(), raw, bytes))
    }

    /// Would one tensor of `bytes` fit a binding of this device?
    pub(crate) fn check_size(&self, label: &str, bytes: u64) -> Result<()> {
        let available = self.caps().max_binding.min(self.caps().max_buffer);
        if bytes <= available {
            return Ok(());
        }
        Err(Error::DoesNotFit {
            what: label.into(),
            device: self.caps().name.clone(),
            needed: bytes,
            available,
            hint: "the device binds no larger buffer: ask for a smaller picture or batch".into(),
        })
    }

    /// Would `bytes` more fit the device's memory, by what is in use already?
    pub(crate) fn check_memory(&self, what: &str, bytes: u64) -> Result<()> {
        let Some(memory) = self.caps().memory else { return Ok(()) };
        let available = memory.saturating_sub(self.memory_in_use().0);
        if bytes <= available {
            return Ok(());
        }
        Err(Error::DoesNotFit {
            what: what.into(),
            device: self.caps().name.clone(),
            needed: bytes,
            available,
            hint: "ask for a smaller picture or batch, or choose another device with --device".into(),
        })
    }

    /// Would every tensor of this recording fit a binding?
    pub(crate) fn check_graph(&self, what: &str, g: &super::Graph) -> Result<()> {
        match g.tensors.iter().map(|info| info.tensor.bytes()).max() {
            Some(largest) => self.check_size(what, largest),
            None => Ok(()),
        }
    }

    pub(super) fn refused(&self, what: String, reason: &dyn std::fmt::Display) -> Error {
        let reason = reason.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Error::Device { device: self.caps().name.clone(), what, reason }
    }

    /// An error if the device was lost or reported an error outside a scope.
    pub(super) fn check_alive(&self) -> Result<()> {
        match lock(&self.inner.lost).clone() {
            Some(reason) => {
                Err(Error::DeviceLost { device: self.caps().name.clone(), reason: reason.replace('\n', " ") })
            }
            None => Ok(()),
        }
    }

    /// Wait until everything submitted so far is done, without blocking the caller's thread.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub async fn wait(&self) -> Result<()> {
        self.ticket().await
    }

    /// A future of what was submitted before this call; more may be submitted before it is awaited.
    pub fn ticket(&self) -> impl Future<Output = Result<()>> + use<> {
        let (signal, done) = signal();
        self.inner.queue.on_submitted_work_done(move || signal.set(()));
        self.drive();
        let gpu = self.clone();
        async move {
            let done = done.await;
            gpu.check_alive()?;
            done.ok_or_else(|| gpu.lost_silently())
        }
    }

    pub(super) fn lost_silently(&self) -> Error {
        Error::DeviceLost { device: self.caps().name.clone(), reason: "the driver gave no reason".into() }
    }

    /// Have callbacks of the work submitted so far called: on native by a short-lived thread that waits in the
    /// driver (so that futures wake without a busy loop), in the browser by the browser itself.
    pub(super) fn drive(&self) {
        #[cfg(not(target_arch = "wasm32"))]
        {
            let device = self.inner.device.clone();
            std::thread::spawn(move || {
                // A failed wait means a lost device: the lost callback has its reason.
                let _ = device.poll(wgpu::PollType::Wait { submission_index: None, timeout: None });
            });
        }
    }

    /// Submit what was written so far and wait for it, so that staging memory is free again.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub async fn flush(&self) -> Result<()> {
        self.inner.queue.submit([]);
        self.wait().await
    }
}

/// A capability set for [`Gpu::noop`].
#[cfg(not(target_arch = "wasm32"))]
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
    /// See [`GpuOptions::variants`].
    pub variants: &'static [(&'static str, &'static str)],
}

#[cfg(not(target_arch = "wasm32"))]
impl NoopProfile {
    /// The least that WebGPU guarantees: no f16, no subgroups, 128 MiB bindings, 8 storage buffers, 16 KiB.
    pub const BROWSER: NoopProfile = NoopProfile {
        name: "browser minimum",
        cpu: false,
        f16: false,
        subgroups: false,
        subgroup_size: 32,
        max_binding: 128 << 20,
        max_buffer: 256 << 20,
        storage_buffers: 8,
        workgroup_memory: 16 << 10,
        invocations: 256,
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
        max_binding: (2 << 30) - 4,
        max_buffer: 64 << 30,
        storage_buffers: 96,
        workgroup_memory: 48 << 10,
        invocations: 1024,
        ..Self::BROWSER
    };
}

async fn list_adapters() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    // Refuse a buffer before the driver starts to swap or kills the process.
    descriptor.memory_budget_thresholds.for_resource_creation = Some(97);
    let instance = wgpu::Instance::new(descriptor);
    #[cfg(not(target_arch = "wasm32"))]
    return instance.enumerate_adapters(wgpu::Backends::PRIMARY).await;
    #[cfg(target_arch = "wasm32")]
    return instance.request_adapter(&wgpu::RequestAdapterOptions::default()).await.into_iter().collect();
}

fn adapter_caps(adapter: &wgpu::Adapter) -> Caps {
    let mut caps = Caps::new(&adapter.get_info(), adapter.features(), &adapter.limits());
    for shape in adapter.cooperative_matrix_properties() {
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

/// The index of the adapter that `wanted` names by number or by part of its name.
fn choose(caps: &[Caps], wanted: &str) -> Result<usize> {
    let index = match wanted.parse::<usize>() {
        Ok(index) => (index < caps.len()).then_some(index),
        Err(_) => caps.iter().position(|c| c.name.to_lowercase().contains(&wanted.to_lowercase())),
    };
    index.ok_or_else(|| {
        let list: Vec<String> =
            caps.iter().enumerate().map(|(i, c)| format!("{i}: {} ({})", c.name, c.backend)).collect();
        Error::invalid("--device", format!("an index or part of a name from [{}]", list.join(", ")), wanted)
    })
}

/// A value that a callback sets and one future awaits; `None` if the callback is dropped unset (a lost device).
pub(super) fn signal<T>() -> (Signal<T>, Waiter<T>) {
    let state = Arc::new(Mutex::new(State { value: None, closed: false, waker: None }));
    (Signal(state.clone()), Waiter(state))
}

struct State<T> {
    value: Option<T>,
    closed: bool,
    waker: Option<Waker>,
}

/// The sending half of [`signal`].
pub(super) struct Signal<T>(Arc<Mutex<State<T>>>);

/// The awaited half of [`signal`].
pub(super) struct Waiter<T>(Arc<Mutex<State<T>>>);

impl<T> Signal<T> {
    pub fn set(self, value: T) {
        lock(&self.0).value = Some(value);
    }
}

impl<T> Drop for Signal<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = lock(&self.0);
            state.closed = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Waiter<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = lock(&self.0);
        if state.closed {
            return Poll::Ready(state.value.take());
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}
