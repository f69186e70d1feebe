//! Buffers in device memory: counted, written, read back; what a buffer's size is without one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::device::Gpu;
use super::wait::signal;
use crate::error::{Error, Result};

/// A buffer in device memory, counted in [`Gpu::memory_in_use`]; freed with its last clone.
#[derive(Clone)]
pub struct Buffer(Arc<Owned>);

struct Owned {
    gpu: Gpu,
    /// None: a size without memory, in which a model is planned before it is loaded.
    raw: Option<wgpu::Buffer>,
    bytes: u64,
    id: u64,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(raw) = &self.raw {
            raw.destroy();
            self.gpu.count(-(self.bytes as i64));
        }
    }
}

impl Buffer {
    pub(super) fn new(gpu: Gpu, raw: wgpu::Buffer, bytes: u64) -> Self {
        gpu.count(bytes as i64);
        Self::with(gpu, Some(raw), bytes)
    }

    fn with(gpu: Gpu, raw: Option<wgpu::Buffer>, bytes: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Buffer(Arc::new(Owned { gpu, raw, bytes, id: NEXT.fetch_add(1, Ordering::Relaxed) }))
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

    /// Read the first `count` elements back, when everything submitted so far is done.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], [`Error::OutOfMemory`].
    pub async fn read<T: bytemuck::Pod>(&self, count: usize) -> Result<Vec<T>> {
        let gpu = &self.0.gpu;
        let bytes = (count * size_of::<T>()) as u64;
        assert!(bytes <= self.bytes(), "reading {bytes} bytes from a buffer of {}", self.bytes());
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        let staging = gpu.create_buffer("readback", bytes, usage).await?;
        let mut encoder = gpu.inner.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(self.raw(), 0, staging.raw(), 0, bytes.next_multiple_of(4));
        gpu.inner.queue.submit([encoder.finish()]);
        let (signal, mapped) = signal();
        staging.raw().map_async(wgpu::MapMode::Read, .., move |result| signal.set(result));
        gpu.drive();
        let mapped = mapped.await;
        gpu.check_alive()?;
        match mapped {
            Some(Ok(())) => {}
            Some(Err(e)) => return Err(Error::DeviceLost { device: gpu.caps().name.clone(), reason: e.to_string() }),
            None => return Err(gpu.lost_silently()),
        }
        let view = staging.raw().get_mapped_range(..bytes).map_err(|e| gpu.refused("a readback".into(), &e))?;
        let mut values = vec![T::zeroed(); count];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(&view);
        Ok(values)
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
