//! What the device can do at most, measured on the spot: a copy, the best product, and multiply-adds alone.

use web_time::{Duration, Instant};

use super::op::{Op, Types};
use super::shapes::Case;
use crate::denoiser::Step;
use crate::error::Result;
use crate::gpu::{DType, Gpu, Graph, Program};
use crate::ops::fma::fma;
use crate::ops::lincomb::{MAX_TERMS, lincomb};

/// Measured limits.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Limits {
    /// Gigabytes read and written in a second by a copy larger than the caches.
    pub copy_gb_s: f64,
    /// Its bytes.
    pub copy_bytes: u64,
    /// The best product found, TFLOP/s.
    pub product_tflops: f64,
    /// Which.
    pub product: String,
    /// Multiply-adds in f32 without matrix units, TFLOP/s.
    pub fma_f32_tflops: f64,
    /// The same in f16, where the device has it.
    pub fma_f16_tflops: Option<f64>,
}

/// Work for so long, so that a card's clock has risen, then measure `run`, which takes a number of repetitions and tells milliseconds:
/// one sample is at least a millisecond or one run; samples until `budget` is spent, at least 3.
pub(super) async fn samples(
    budget: Duration,
    warm: Duration,
    run: &mut (impl AsyncFnMut(usize) -> Result<f64> + ?Sized),
) -> Result<Vec<f64>> {
    let once = run(1).await?.max(1e-4);
    let times = ((2.0 / once) as usize).clamp(1, 1000);
    let since = Instant::now();
    while since.elapsed() < warm {
        run(times).await?;
    }
    let since = Instant::now();
    let mut all = Vec::new();
    while all.len() < 3 || (since.elapsed() < budget && all.len() < 200) {
        all.push(run(times).await? / times as f64);
    }
    Ok(all)
}

/// How long a device works before it is measured: the clock of an idle card takes some 300 ms to rise.
pub(super) fn warm_up(gpu: &Gpu) -> Duration {
    Duration::from_millis(if gpu.caps().is_cpu() { 0 } else { 300 })
}

/// Measure the device's limits, `budget` for each.
///
/// # Errors
/// Of the device.
pub async fn measure(gpu: &Gpu, budget: Duration) -> Result<Limits> {
    let warm = warm_up(gpu);
    let least = |times: Vec<f64>| times.into_iter().fold(f64::MAX, f64::min);
    let cpu = gpu.caps().is_cpu();

    // A copy of 1 GiB, less where the device has little memory.
    let free = gpu.caps().memory.map_or(1 << 30, |memory| memory.saturating_sub(gpu.memory_in_use().0));
    let most = gpu.caps().max_binding.min(gpu.caps().max_buffer).min(free / 4);
    let bytes = most.min(if cpu { 64 << 20 } else { 1 << 30 }) / 1024 * 1024;
    let [from, to] = [gpu.storage("from", bytes).await?, gpu.storage("to", bytes).await?];
    let mut g = Graph::new(gpu, DType::F32);
    let dims = [1, 1, (bytes / 1024) as u32, 256];
    let (x, out) = (g.bind("from", &from, dims, DType::F32), g.bind("to", &to, dims, DType::F32));
    lincomb(&mut g, out, &[x]);
    let copy = Program::new(gpu, g).await?;
    let steps = gpu.steps(&[[1f32; MAX_TERMS]]).await?;
    let ms = least(samples(budget, warm, &mut async |times| copy.time(&[], &steps, times).await).await?);
    drop((copy, from, to));
    let copy_gb_s = 2.0 * bytes as f64 / ms / 1e6;

    let mut best = (0.0, String::new());
    let sides: &[u32] = if cpu { &[512] } else { &[4096, 8192] };
    for &side in sides {
        let case = Case::Linear { m: side, n: side, k: side, geglu: false };
        let op = Op::new(gpu, case, 1, Types::of(gpu, false)).await?;
        let ms = least(samples(budget, warm, &mut async |times| op.time(times).await).await?);
        let rate = case.flops() as f64 / ms / 1e9;
        if rate > best.0 {
            best = (rate, format!("{side} cubed, {}", op.variants.join(" + ")));
        }
    }

    let mut rates = Vec::new();
    for dtype in [DType::F32, DType::F16] {
        if dtype == DType::F16 && (cpu || !gpu.caps().f16) {
            continue;
        }
        let factors: Vec<f32> = (0..256u16).map(|i| f32::from(i) / 1024.0).collect();
        let factors = gpu.upload("factors", &factors).await?;
        let mut g = Graph::new(gpu, DType::F32);
        let x = g.bind("factors", &factors, [1, 1, 1, 256], DType::F32);
        let (threads, rounds) = if cpu { (1 << 12, 1 << 10) } else { (1 << 20, 1 << 10) };
        let out = fma(&mut g, x, dtype, threads, rounds);
        let buffer = gpu.storage("fma", out.bytes()).await?;
        g.keep(out, &buffer);
        let flops = g.nodes()[0].flops as f64;
        let program = Program::new(gpu, g).await?;
        let steps = gpu.steps(&[Step::default()]).await?;
        let ms = least(samples(budget, warm, &mut async |times| program.time(&[], &steps, times).await).await?);
        rates.push(flops / ms / 1e9);
    }
    Ok(Limits {
        copy_gb_s,
        copy_bytes: bytes,
        product_tflops: best.0,
        product: best.1,
        fma_f32_tflops: rates[0],
        fma_f16_tflops: rates.get(1).copied(),
    })
}
