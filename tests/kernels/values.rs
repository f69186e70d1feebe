//! Host tensors: seeded numbers, rounded as the device stores them, so that a reference sees what the kernel sees.

use half::f16;
use pollster::block_on;
use scumble::gpu::{Buffer, DType, Gpu};
use scumble::ops::{Norm, Param};

/// Elements after a tensor's end: those of inputs are never read, those of results keep their poison.
pub const GUARD: usize = 32;

/// A tensor on the host: channels last, its values exact in `dtype`.
#[derive(Clone, Debug)]
pub struct Host {
    pub dims: [u32; 4],
    pub dtype: DType,
    pub values: Vec<f64>,
}

impl Host {
    /// `values` rounded to `dtype`.
    pub fn new(dims: [u32; 4], dtype: DType, values: impl IntoIterator<Item = f64>) -> Host {
        let values: Vec<f64> = values.into_iter().map(|v| round(dtype, v)).collect();
        assert_eq!(values.len(), dims.iter().product::<u32>() as usize, "values for {dims:?}");
        Host { dims, dtype, values }
    }

    /// The values in device memory, and NaNs behind them: what reads beyond the end is poisoned.
    pub fn upload(&self, gpu: &Gpu) -> Buffer {
        let buffer = match self.dtype {
            DType::F32 => block_on(gpu.upload("test input", &[self.f32s(), vec![f32::NAN; GUARD]].concat())),
            // Packed weights are the same bytes, read two in a u32.
            DType::F16 | DType::Packed => {
                let mut halves: Vec<f16> = self.values.iter().map(|&v| f16::from_f64(v)).collect();
                halves.resize(halves.len() + GUARD, f16::NAN);
                block_on(gpu.upload("test input", &halves))
            }
        };
        buffer.expect("a small buffer fits")
    }

    /// The values as f32.
    pub fn f32s(&self) -> Vec<f32> {
        self.values.iter().map(|&v| v as f32).collect()
    }

    /// The tensor as a parameter of a layer.
    pub fn param(&self, gpu: &Gpu) -> Param {
        Param { buffer: self.upload(gpu), dims: self.dims, dtype: self.dtype }
    }

    /// Channels.
    pub fn channels(&self) -> usize {
        self.dims[3] as usize
    }
}

/// `value` as `dtype` stores it.
pub fn round(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        DType::F16 | DType::Packed => f16::from_f64(value).to_f64(),
    }
}

/// Seeded standard normals.
pub fn normal(seed: u64, dims: [u32; 4], dtype: DType) -> Host {
    normal_at(seed, dims, dtype, 0.0, 1.0)
}

/// Seeded normals of a mean and a standard deviation.
pub fn normal_at(seed: u64, dims: [u32; 4], dtype: DType, mean: f64, deviation: f64) -> Host {
    let mut random = Random(seed);
    let count = dims.iter().product::<u32>();
    Host::new(dims, dtype, (0..count).map(|_| mean + deviation * random.normal()))
}

/// Weights [k, n] of a size that keeps the product's variance at 1.
pub fn weights(seed: u64, k: u32, n: u32, dtype: DType) -> Host {
    normal_at(seed, [1, 1, k, n], dtype, 0.0, f64::from(k).powf(-0.5))
}

/// Gamma around 1 and beta around 0 of a norm over `channels`.
pub struct HostNorm {
    pub gamma: Host,
    pub beta: Host,
    pub eps: f32,
}

impl HostNorm {
    pub fn new(seed: u64, channels: u32, eps: f32) -> HostNorm {
        let vector = |seed, mean| normal_at(seed, [1, 1, 1, channels], DType::F32, mean, 0.3);
        HostNorm { gamma: vector(seed, 1.0), beta: vector(seed + 1, 0.0), eps }
    }

    pub fn norm(&self, gpu: &Gpu) -> Norm {
        Norm { gamma: self.gamma.param(gpu), beta: self.beta.param(gpu), eps: self.eps }
    }
}

/// Seeded draws of shapes: what a planner could ask for, none of it round. Each case's text is in the failure's message.
pub struct Draws(Random);

impl Draws {
    /// Cases for one variant and one seed: SCUMBLE_CASES of them, else a dozen.
    pub fn cases(seed: u64) -> impl Iterator<Item = Draws> {
        let count = std::env::var("SCUMBLE_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
        (0..count).map(move |i| Draws(Random(seed ^ (i << 32))))
    }

    /// A whole number of `low..=high`.
    pub fn of(&mut self, low: u32, high: u32) -> u32 {
        low + (self.0.next() % u64::from(high - low + 1)) as u32
    }

    /// One of a list.
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.of(0, list.len() as u32 - 1) as usize]
    }
}

/// splitmix64 (Steele, Lea & Flood 2014): small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller.
    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}
