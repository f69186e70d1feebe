//! Uploads of weights: chunks of mapped memory, filled by all cores, while the device works on the chunk before.

use std::collections::VecDeque;

use super::buffer::Buffer;
use super::device::Gpu;
use super::wait::{Waiter, signal};
use crate::error::Result;

/// Bytes of a chunk, unless one tensor is larger.
const CHUNK: u64 = 64 << 20;

/// Bytes below which one core copies alone.
const ALONE: usize = 4 << 20;

/// Chunks on the host's side: one is filled while the device reads the other.
const RING: usize = 2;

/// A chunk of memory that the host fills again and again, and its copy on the device.
pub struct Uploader {
    gpu: Gpu,
    capacity: u64,
    ring: VecDeque<Staging>,
    filled: u64,
    raw: Buffer,
}

struct Staging {
    buffer: Buffer,
    /// Set while the device still reads it.
    mapping: Option<Waiter<std::result::Result<(), wgpu::BufferAsyncError>>>,
}

/// Bytes that an [`Uploader`] for `total` bytes allocates.
pub fn upload_bytes(total: u64) -> u64 {
    (RING as u64 + 1) * capacity(total)
}

fn capacity(total: u64) -> u64 {
    total.clamp(16, CHUNK).next_multiple_of(16)
}

impl Uploader {
    /// For `total` bytes in all, as far as that is known.
    ///
    /// # Errors
    /// As [`Gpu::storage`].
    pub async fn new(gpu: &Gpu, total: u64) -> Result<Uploader> {
        let capacity = capacity(total);
        let raw = gpu.storage("upload", capacity).await?;
        let mut uploader = Uploader { gpu: gpu.clone(), capacity, ring: VecDeque::new(), filled: 0, raw };
        uploader.fill_ring().await?;
        Ok(uploader)
    }

    async fn fill_ring(&mut self) -> Result<()> {
        for _ in 0..RING {
            let buffer = self.gpu.create_mapped("upload staging", self.capacity).await?;
            self.ring.push_back(Staging { buffer, mapping: None });
        }
        Ok(())
    }

    /// The chunk on the device: what was put, from the word on that [`Uploader::put`] told, once it is sent.
    pub fn raw(&self) -> &Buffer {
        &self.raw
    }

    /// Is there room for so many bytes more in this chunk?
    pub fn fits(&self, bytes: usize) -> bool {
        self.filled + (bytes as u64).next_multiple_of(16) <= self.capacity
    }

    /// Make chunks of at least so many bytes; the present one must be empty.
    ///
    /// # Errors
    /// As [`Gpu::storage`].
    pub async fn grow(&mut self, bytes: usize) -> Result<()> {
        assert_eq!(self.filled, 0, "growing a chunk that holds something");
        let bytes = (bytes as u64).next_multiple_of(16);
        if bytes > self.capacity {
            self.gpu.wait().await?;
            self.ring.clear();
            self.capacity = bytes;
            self.raw = self.gpu.storage("upload", bytes).await?;
            self.fill_ring().await?;
        }
        Ok(())
    }

    /// Put bytes into the chunk; the result is where they begin, in u32.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`].
    pub async fn put(&mut self, bytes: &[u8]) -> Result<u32> {
        assert!(
            self.fits(bytes.len()),
            "{} bytes into a chunk of {} that holds {}",
            bytes.len(),
            self.capacity,
            self.filled
        );
        let staging = &mut self.ring[0];
        if let Some(mapping) = staging.mapping.take() {
            self.gpu.drive();
            let mapped = mapping.await;
            self.gpu.check_alive()?;
            match mapped {
                Some(Ok(())) => {}
                Some(Err(e)) => return Err(self.gpu.refused("an upload".into(), &e)),
                None => return Err(self.gpu.lost_silently()),
            }
        }
        let at = self.filled;
        let end = at + bytes.len() as u64;
        let padded = end.next_multiple_of(16);
        let mut view = staging
            .buffer
            .raw()
            .get_mapped_range_mut(at..padded)
            .map_err(|e| self.gpu.refused("an upload".into(), &e))?;
        copy(view.slice(..bytes.len()), bytes);
        self.filled = padded;
        Ok((at / 4) as u32)
    }

    /// Send the chunk to the device, and begin the next.
    pub fn send(&mut self) {
        let Some(mut staging) = self.ring.pop_front() else { unreachable!("a ring of {RING}") };
        let buffer = staging.buffer.raw();
        buffer.unmap();
        let mut encoder = self.gpu.inner.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(buffer, 0, self.raw.raw(), 0, self.filled);
        self.gpu.inner.queue.submit([encoder.finish()]);
        let (signal, mapping) = signal();
        buffer.map_async(wgpu::MapMode::Write, .., move |result| signal.set(result));
        staging.mapping = Some(mapping);
        self.ring.push_back(staging);
        self.filled = 0;
    }
}

/// Copy by all cores where it is worth it: one core reads mapped files at a fraction of the memory's speed.
fn copy(mut to: wgpu::WriteOnly<'_, [u8]>, from: &[u8]) {
    let cores = match cfg!(target_arch = "wasm32") {
        true => 1,
        false => std::thread::available_parallelism().map_or(1, |n| n.get().min(8)),
    };
    if from.len() < ALONE || cores == 1 {
        to.copy_from_slice(from);
        return;
    }
    let piece = from.len().div_ceil(cores);
    std::thread::scope(|scope| {
        let mut rest = to;
        for bytes in from.chunks(piece) {
            let (target, after) = rest.split_at(bytes.len());
            rest = after;
            let target = Piece(target);
            scope.spawn(move || target.fill(bytes));
        }
    });
}

/// A part of a mapped chunk on its way to a thread.
struct Piece<'a>(wgpu::WriteOnly<'a, [u8]>);

#[allow(unsafe_code)]
// SAFETY: it is an exclusive slice of bytes, as `&mut [u8]` is; wgpu says so itself for types of a known size alone.
unsafe impl Send for Piece<'_> {}

impl Piece<'_> {
    fn fill(mut self, bytes: &[u8]) {
        self.0.copy_from_slice(bytes);
    }
}

impl Gpu {
    /// Memory of the host's that is mapped for writing and can be copied from.
    async fn create_mapped(&self, label: &str, bytes: u64) -> Result<Buffer> {
        let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
        self.create_buffer_mapped(label, bytes, usage, true).await
    }
}
