//! Buffers in device memory: counted, written, read back, used again; what a buffer's size is without one.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::device::Gpu;
use super::wait::{Waiter, lock, signal};
use crate::error::{Error, Result};

/// A buffer in device memory, counted in [`Gpu::memory_in_use`]; freed with its last clone, or idle then if it is scratch.
#[derive(Clone)]
pub struct Buffer(Arc<Owned>);

struct Owned {
    gpu: Gpu,
    /// None: a size without memory, in which a model is planned before it is loaded.
    raw: Option<wgpu::Buffer>,
    bytes: u64,
    id: u64,
    /// See [`Gpu::scratch`].
    scratch: bool,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let Some(raw) = self.raw.take() else { return };
        self.gpu.count(-(self.bytes as i64));
        if let Some(raw) = if self.scratch { self.gpu.keep_idle(raw, self.bytes) } else { Some(raw) } {
            raw.destroy();
        }
    }
}

/// Scratch buffers that nobody uses, by bytes, each with the picture that let go of it: the next picture asks for the same sizes, and
/// drivers take milliseconds for a gigabyte got or given back (benches/NOTES.md).
#[derive(Default)]
pub(super) struct Idle {
    picture: u64,
    bytes: u64,
    buffers: HashMap<u64, Vec<(u64, wgpu::Buffer)>>,
    programs: Option<Waiting>,
}

/// Programs and their buffers that wait for the next picture of the same kind.
struct Waiting {
    /// What they are for.
    key: String,
    programs: Programs,
    bytes: u64,
}

/// What waits: in a browser nothing can leave its thread, nor needs to.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) type Programs = Box<dyn std::any::Any + Send>;
/// What waits.
#[cfg(target_arch = "wasm32")]
pub(crate) type Programs = Box<dyn std::any::Any>;

impl Idle {
    /// Free those that were let go of before picture `since`.
    fn free(&mut self, since: u64) {
        for (bytes, buffers) in &mut self.buffers {
            buffers.retain(|(picture, raw)| {
                let stays = *picture >= since;
                if !stays {
                    raw.destroy();
                    self.bytes -= bytes;
                }
                stays
            });
        }
        self.buffers.retain(|_, buffers| !buffers.is_empty());
    }
}

impl Buffer {
    pub(super) fn new(gpu: Gpu, raw: wgpu::Buffer, bytes: u64) -> Self {
        gpu.count(bytes as i64);
        Self::with(gpu, Some(raw), bytes)
    }

    fn with(gpu: Gpu, raw: Option<wgpu::Buffer>, bytes: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Buffer(Arc::new(Owned { gpu, raw, bytes, id: NEXT.fetch_add(1, Ordering::Relaxed), scratch: false }))
    }

    /// A buffer's size without its memory: it can be recorded and planned with, not run.
    pub fn planned(gpu: &Gpu, bytes: u64) -> Self {
        Self::with(gpu.clone(), None, bytes.max(16).next_multiple_of(16))
    }

    pub(super) fn raw(&self) -> &wgpu::Buffer {
        match &self.0.raw {
            Some(raw) => raw,
            None => unreachable!("a planned buffer of {} bytes has no memory", self.bytes()),
        }
    }

    /// Tells it from all others of this process.
    pub(super) fn id(&self) -> u64 {
        self.0.id
    }

    /// Size in bytes (the size asked for, rounded up to 16).
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Write from the start; takes effect before the next submit.
    pub fn write<T: bytemuck::NoUninit>(&self, data: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert!(bytes.len() as u64 <= self.bytes(), "writing {} bytes into a buffer of {}", bytes.len(), self.bytes());
        self.0.gpu.inner.queue.write_buffer(self.raw(), 0, bytes);
    }

    /// Copy from the start into all of `other`, when everything submitted so far is done; takes effect before what is submitted next.
    pub fn copy_to(&self, other: &Buffer) {
        let bytes = other.bytes();
        assert!(bytes <= self.bytes(), "copying {bytes} bytes from a buffer of {}", self.bytes());
        let gpu = &self.0.gpu;
        let mut encoder = gpu.inner.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(self.raw(), 0, other.raw(), 0, bytes);
        gpu.inner.queue.submit([encoder.finish()]);
    }

    /// Read the first `count` elements back, when everything submitted so far is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], [`Error::OutOfMemory`].
    pub async fn read<T: bytemuck::Pod>(&self, count: usize) -> Result<Vec<T>> {
        self.read_with(count, <[T]>::to_vec).await
    }

    /// As [`Buffer::read`], but what `made` makes of them where they lie: megabytes more take a millisecond each.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub async fn read_with<T: bytemuck::Pod, R>(&self, count: usize, made: impl FnOnce(&[T]) -> R) -> Result<R> {
        self.begin_read((count * size_of::<T>()) as u64).await?.finish(made).await
    }

    /// Have the first `bytes` read back, when everything submitted so far is done: what is submitted next need not be waited for.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub async fn begin_read(&self, bytes: u64) -> Result<Reading> {
        let gpu = &self.0.gpu;
        assert!(bytes <= self.bytes(), "reading {bytes} bytes from a buffer of {}", self.bytes());
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        let staging = gpu.create_buffer("readback", bytes, usage).await?;
        let mut encoder = gpu.inner.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(self.raw(), 0, staging.raw(), 0, bytes.next_multiple_of(4));
        gpu.inner.queue.submit([encoder.finish()]);
        let (signal, mapped) = signal();
        staging.raw().map_async(wgpu::MapMode::Read, .., move |result| signal.set(result));
        gpu.drive();
        Ok(Reading { staging, bytes, mapped })
    }
}

/// Bytes on their way to the host: see [`Buffer::begin_read`].
pub struct Reading {
    staging: Buffer,
    bytes: u64,
    mapped: Waiter<std::result::Result<(), wgpu::BufferAsyncError>>,
}

impl Reading {
    /// What `made` makes of them where they lie, once they are there.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub async fn finish<T: bytemuck::Pod, R>(self, made: impl FnOnce(&[T]) -> R) -> Result<R> {
        let Reading { staging, bytes, mapped } = self;
        let gpu = &staging.0.gpu;
        let mapped = mapped.await;
        gpu.check_alive()?;
        match mapped {
            Some(Ok(())) => {}
            Some(Err(e)) => return Err(Error::DeviceLost { device: gpu.caps().name.clone(), reason: e.to_string() }),
            None => return Err(gpu.lost_silently()),
        }
        let view = staging.raw().get_mapped_range(..bytes).map_err(|e| gpu.refused("a readback".into(), &e))?;
        Ok(match bytemuck::try_cast_slice(&view) {
            Ok(values) => made(values),
            // A browser's copy lies anywhere.
            Err(_) => made(&bytemuck::pod_collect_to_vec::<u8, T>(&view)),
        })
    }
}

impl Gpu {
    /// A storage buffer for tensors, weights or scalars.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`], [`Error::OutOfMemory`].
    pub async fn storage(&self, label: &str, bytes: u64) -> Result<Buffer> {
        use wgpu::BufferUsages as Use;
        self.create_buffer(label, bytes, Use::STORAGE | Use::COPY_DST | Use::COPY_SRC).await
    }

    /// A storage buffer for what a picture needs and nothing else does: an idle one of as many bytes, whatever is in it, or a new one.
    ///
    /// # Errors
    /// As [`Gpu::storage`].
    pub async fn scratch(&self, label: &str, bytes: u64) -> Result<Buffer> {
        let bytes = bytes.max(16).next_multiple_of(16);
        let found = {
            let mut idle = lock(&self.inner.idle);
            let found = idle.buffers.get_mut(&bytes).and_then(Vec::pop);
            idle.bytes -= if found.is_some() { bytes } else { 0 };
            found
        };
        let mut buffer = match found {
            Some((_, raw)) => Buffer::new(self.clone(), raw, bytes),
            None => self.storage(label, bytes).await?,
        };
        if let Some(owned) = Arc::get_mut(&mut buffer.0) {
            owned.scratch = true;
        }
        Ok(buffer)
    }

    /// Keep a scratch buffer for the next who asks, while all buffers together take no more than half of the device's memory; else it
    /// comes back.
    fn keep_idle(&self, raw: wgpu::Buffer, bytes: u64) -> Option<wgpu::Buffer> {
        let mut idle = lock(&self.inner.idle);
        let all = self.memory_in_use().0 + idle.bytes + bytes;
        if self.check_alive().is_err() || self.caps().memory.is_none_or(|memory| all > memory / 2) {
            return Some(raw);
        }
        let picture = idle.picture;
        idle.bytes += bytes;
        idle.buffers.entry(bytes).or_default().push((picture, raw));
        None
    }

    /// A picture begins: see [`Gpu::free_unused`].
    pub(crate) fn begin_picture(&self) {
        lock(&self.inner.idle).picture += 1;
    }

    /// Free the scratch buffers that the picture begun last did not use.
    pub(crate) fn free_unused(&self) {
        let mut idle = lock(&self.inner.idle);
        let picture = idle.picture;
        idle.free(picture);
    }

    /// Let programs with `bytes` of buffers of their own wait for the next picture that asks for `key`; dropped, if with them all buffers take more than
    /// half of the device's memory. They hold this device: [`Gpu::free_idle`] must be called before it is let go of.
    pub(crate) fn set_aside(&self, key: String, programs: Programs, bytes: u64) {
        self.free_aside(None);
        let mut idle = lock(&self.inner.idle);
        let all = self.memory_in_use().0 + idle.bytes;
        if self.check_alive().is_err() || self.caps().memory.is_none_or(|memory| all > memory / 2) {
            // Their buffers may wait, one by one.
            drop(idle);
            return drop(programs);
        }
        idle.programs = Some(Waiting { key, programs, bytes });
        drop(idle);
        self.count(-(bytes as i64));
    }

    /// The programs that wait, if they are for `key`.
    pub(crate) fn take<T: 'static>(&self, key: &str) -> Option<T> {
        let waiting = lock(&self.inner.idle).programs.take_if(|waiting| waiting.key == key)?;
        self.count(waiting.bytes as i64);
        waiting.programs.downcast().ok().map(|programs| *programs)
    }

    /// Drop the programs that wait, unless they wait for `key`: their buffers wait by themselves then.
    pub(crate) fn free_aside(&self, key: Option<&str>) {
        let other = |waiting: &mut Waiting| key != Some(&waiting.key);
        let waiting = lock(&self.inner.idle).programs.take_if(other);
        if let Some(waiting) = &waiting {
            self.recount(waiting.bytes);
        }
    }

    /// Free the memory that waits for the next picture of the same size, as PyTorch's `empty_cache` does.
    pub fn free_idle(&self) {
        // Their buffers come here, too.
        self.free_aside(None);
        lock(&self.inner.idle).free(u64::MAX);
    }

    /// Bytes in buffers that wait for the next picture of the same size.
    pub fn idle_bytes(&self) -> u64 {
        let idle = lock(&self.inner.idle);
        idle.bytes + idle.programs.as_ref().map_or(0, |waiting| waiting.bytes)
    }

    /// A storage buffer filled with `data`.
    ///
    /// # Errors
    /// As [`Gpu::storage`].
    pub async fn upload<T: bytemuck::NoUninit>(&self, label: &str, data: &[T]) -> Result<Buffer> {
        let buffer = self.storage(label, size_of_val(data) as u64).await?;
        buffer.write(data);
        Ok(buffer)
    }
}
