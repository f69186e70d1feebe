//! The device: adapters, opening one, creation of buffers with scopes, memory in use, and waiting without blocking.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::buffer::{Buffer, Idle};
use super::cache::Cache;
use super::caps::{COOP, Caps, adapter_caps};
use super::kernel::Pipeline;
#[cfg(not(target_arch = "wasm32"))]
use super::noop::NoopProfile;
#[cfg(not(target_arch = "wasm32"))]
use super::wait::Threads;
use super::wait::{lock, signal};
use crate::error::{Error, Result};

/// How to choose and open a device.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// A part of the adapter's name (any case), or its index in [`Gpu::adapters`]. `None`: the fastest kind.
    pub device: Option<String>,
    /// A folder in which compiled pipelines and tuned choices are kept from run to run, one folder in it for each adapter and
    /// driver. It is made when there is something to keep, and safe to delete. `None`: nothing is kept.
    pub cache: Option<PathBuf>,
    /// Build every kernel with all of wgpu's runtime checks: indices clamped, loops bounded, divisions guarded, workgroup memory zeroed.
    /// Slower; the results are the same, unless a kernel has a fault.
    pub checked: bool,
    /// Kernel variants forced by name, `(op, variant)`, to bisect a fault: `("conv2d", "portable")`.
    pub variants: Vec<(String, String)>,
}

/// An open device with its queue, capabilities, and pipelines. Cheap to clone.
#[derive(Clone)]
pub struct Gpu {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    #[cfg(not(target_arch = "wasm32"))]
    waits: Threads,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub caps: Caps,
    pub pipelines: Mutex<HashMap<String, Arc<Pipeline>>>,
    pub cache: Option<Cache>,
    /// The way that tuning chose for what was asked.
    pub choices: Mutex<BTreeMap<String, String>>,
    /// See [`Gpu::memo`].
    memo: Mutex<HashMap<String, Arc<dyn Any + Send + Sync>>>,
    /// Build kernels with all runtime checks.
    pub checked: bool,
    variants: BTreeMap<String, String>,
    lost: Arc<Mutex<Option<String>>>,
    live_bytes: Mutex<Live>,
    pub idle: Mutex<Idle>,
}

/// Bytes in buffers that this [`Gpu`] created: now, and at most since the last reset.
#[derive(Clone, Copy, Default)]
struct Live {
    now: u64,
    peak: u64,
}

/// Memos above which all are forgotten.
const MOST_MEMOS: usize = 8192;

const NO_ADAPTER: &str = "no GPU adapter found: scumble needs Vulkan, Metal or DX12; install your graphics driver, \
    or on Debian/Ubuntu a software device with `apt-get install libvulkan1 mesa-vulkan-drivers` (slower)";

/// Leave to use matrix units, which wgpu calls experimental.
#[allow(unsafe_code)]
fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: the token says that the caller knows such features to be less tested than others. Ours is tested: every kernel
    // that uses it is held against a reference, on the device that runs it.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
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
        use wgpu::Features as Feature;
        for wanted in [Feature::SHADER_F16, Feature::SUBGROUP, Feature::TIMESTAMP_QUERY, Feature::PIPELINE_CACHE] {
            features |= adapter.features() & wanted;
        }
        if caps.coop().is_some() {
            features |= COOP;
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("scumble"),
            experimental_features: experimental(),
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
        let gpu = Self::wrap(device, queue, caps, options)?;
        let lost = gpu.inner.lost.clone();
        gpu.inner.device.set_device_lost_callback(move |_, message| {
            lock(&lost).get_or_insert(message);
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
        Self::wrap(device, queue, caps, &GpuOptions { variants: variants.to_vec(), ..Default::default() })
    }

    fn wrap(device: wgpu::Device, queue: wgpu::Queue, caps: Caps, options: &GpuOptions) -> Result<Gpu> {
        for (op, variant) in &options.variants {
            crate::ops::check_variant(op, variant)?;
        }
        let cache = options.cache.as_ref().map(|dir| Cache::open(dir, &caps, &device));
        let choices = Mutex::new(cache.as_ref().map(Cache::choices).unwrap_or_default());
        let inner = Inner {
            #[cfg(not(target_arch = "wasm32"))]
            waits: Threads::default(),
            device,
            queue,
            caps,
            pipelines: Mutex::default(),
            cache,
            choices,
            memo: Mutex::default(),
            checked: options.checked,
            variants: options.variants.iter().cloned().collect(),
            lost: Arc::default(),
            live_bytes: Mutex::default(),
            idle: Mutex::default(),
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
        features.set(COOP, !profile.cooperative.is_empty());
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: profile.max_binding,
            max_buffer_size: profile.max_buffer,
            max_storage_buffers_per_shader_stage: profile.storage_buffers,
            max_compute_workgroup_storage_size: profile.workgroup_memory,
            max_compute_invocations_per_workgroup: profile.invocations,
            max_compute_workgroup_size_x: profile.invocations,
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
        // The backend calls itself a software device whatever it is told.
        caps.kind = if profile.cpu { super::caps::DeviceKind::Cpu } else { super::caps::DeviceKind::Discrete };
        caps.memory = profile.memory;
        caps.cooperative = profile.cooperative.to_vec();
        let variants = profile.variants.iter().map(|(op, variant)| ((*op).into(), (*variant).into())).collect();
        Self::from_adapter(adapter, caps, &GpuOptions { variants, ..Default::default() }).await
    }

    /// What this device can do.
    pub fn caps(&self) -> &Caps {
        &self.inner.caps
    }

    /// The variant that the user forced for an op, if any.
    pub fn forced_variant(&self, op: &str) -> Option<&str> {
        self.inner.variants.get(op).map(String::as_str)
    }

    /// Keep the pipelines compiled so far in the cache's folder, if there is one.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn save_pipelines(&self) -> Result<()> {
        self.inner.cache.as_ref().map_or(Ok(()), |cache| cache.save_pipelines(self.compiled()))
    }

    /// What `make` makes for this device, made once for each `key`; the key tells which `T` it is.
    pub(crate) fn memo<T: Any + Send + Sync>(&self, key: &str, make: impl FnOnce() -> T) -> Arc<T> {
        let known = lock(&self.inner.memo).get(key).cloned();
        if let Some(known) = known.and_then(|known| known.downcast().ok()) {
            return known;
        }
        let made = Arc::new(make());
        let mut memo = lock(&self.inner.memo);
        if memo.len() >= MOST_MEMOS {
            memo.clear();
        }
        memo.insert(key.to_owned(), made.clone());
        made
    }

    /// Pipelines compiled so far.
    pub(crate) fn compiled(&self) -> usize {
        lock(&self.inner.pipelines).len()
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

    /// Count bytes that are about to be let go of: no peak is made of them.
    pub(super) fn recount(&self, bytes: u64) {
        lock(&self.inner.live_bytes).now += bytes;
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
        self.create_buffer_mapped(label, bytes, usage, false).await
    }

    /// [`Gpu::create_buffer`], mapped at once if `mapped`.
    pub(super) async fn create_buffer_mapped(
        &self,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
        mapped: bool,
    ) -> Result<Buffer> {
        let bytes = bytes.max(16).next_multiple_of(16);
        self.check_size(label, bytes)?;
        let device = &self.inner.device;
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size: bytes, usage, mapped_at_creation: mapped };
        let idle = self.idle_bytes();
        if self.caps().memory.is_some_and(|memory| self.memory_in_use().0 + idle + bytes > memory) {
            self.free_idle();
        }
        let create = || {
            let invalid = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
            let raw = device.create_buffer(&descriptor);
            (raw, memory.pop(), invalid.pop())
        };
        let (mut raw, mut memory, mut invalid) = create();
        if memory.await.is_some() {
            // What was let go of is free again when the device is done with it.
            self.free_idle();
            self.wait().await?;
            (raw, memory, invalid) = create();
            if memory.await.is_some() {
                return Err(Error::OutOfMemory { what: label.into(), device: self.caps().name.clone(), needed: bytes });
            }
        }
        if let Some(e) = invalid.await {
            return Err(self.refused(format!("buffer {label} of {bytes} bytes"), &e));
        }
        // wgpu reports a lost device to its callback alone, not to scopes.
        self.check_alive()?;
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

    /// Would `bytes` more fit the device's memory, by what is in use already? `hint`: what to do if not.
    pub(crate) fn check_memory(&self, what: &str, bytes: u64, hint: &str) -> Result<()> {
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
            hint: hint.into(),
        })
    }

    /// Would every tensor of this recording fit a binding?
    pub(crate) fn check_graph(&self, what: &str, g: &super::Graph) -> Result<()> {
        self.check_size(what, g.largest_tensor())
    }

    /// What an error in a scope means: the device is gone, or it refused `what`.
    pub(super) fn refused(&self, what: String, reason: &dyn std::fmt::Display) -> Error {
        if let Err(lost) = self.check_alive() {
            return lost;
        }
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
            self.inner.waits.spawn(move || {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_device_is_an_error_and_no_hang() {
        let gpu = pollster::block_on(Gpu::noop(&NoopProfile::H200)).expect("noop");
        gpu.inner.device.destroy();
        // Awaiting must end; the driver's thread may report the loss a moment later.
        let _ = pollster::block_on(gpu.wait());
        for _ in 0..1000 {
            let _ = gpu.inner.device.poll(wgpu::PollType::Poll);
            if gpu.check_alive().is_err() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let lost = |result: Result<()>| matches!(result, Err(Error::DeviceLost { .. }));
        assert!(lost(pollster::block_on(gpu.storage("a buffer", 64)).map(drop)));
        assert!(lost(pollster::block_on(gpu.wait())));
    }
}
