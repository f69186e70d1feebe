//! One op of the benchmark on the device: its inputs by formula, so that any of its results can be computed again on the host in f64.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::shapes::Case;
use crate::denoiser::Step;
use crate::error::Result;
use crate::gpu::run::Steps;
use crate::gpu::{Buffer, DType, Gpu, Graph, Program, Tensor};
use crate::model::blocks::convolved;
use crate::ops::attention::{Attention, attention};
use crate::ops::conv2d::{Taps, conv2d, doubled, fold};
use crate::ops::group_norm::group_norm;
use crate::ops::layer_norm::layer_norm;
use crate::ops::matmul::matmul;
use crate::ops::winograd;
use crate::ops::{Activation, Conv, Epilogue, Linear, Norm, Param};
use crate::pipeline::run_once;

/// Numbers by formula: uniform, of mean 0 and deviation `scale`, as `dtype` stores them.
#[derive(Clone, Copy)]
struct Numbers {
    seed: u64,
    scale: f64,
    dtype: DType,
}

impl Numbers {
    fn at(&self, index: usize) -> f64 {
        // splitmix64 (Steele et al. 2014).
        let mut z = (index as u64).wrapping_add(self.seed << 40).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = (z >> 40) as f64 / (1u64 << 23) as f64 - 1.0;
        let value = unit * 3f64.sqrt() * self.scale;
        if self.dtype == DType::F32 { f64::from(value as f32) } else { half::f16::from_f64(value).to_f64() }
    }

    async fn upload(&self, gpu: &Gpu, count: u64) -> Result<Buffer> {
        let all = 0..count as usize;
        match self.dtype {
            DType::F32 => gpu.upload("numbers", &all.map(|i| self.at(i) as f32).collect::<Vec<_>>()).await,
            _ => gpu.upload("numbers", &all.map(|i| half::f16::from_f64(self.at(i))).collect::<Vec<_>>()).await,
        }
    }

    async fn param(&self, gpu: &Gpu, dims: [u32; 4]) -> Result<Param> {
        let count = dims.iter().map(|&d| u64::from(d)).product();
        Ok(Param { buffer: self.upload(gpu, count).await?, dims, dtype: self.dtype })
    }
}

/// In which types an op runs.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    /// Activations.
    pub activations: DType,
    /// What norms make for products to take.
    pub operands: DType,
    /// Weights.
    pub weights: DType,
}

impl Types {
    /// Those of networks on this device: of a UNet, or of a VAE.
    pub fn of(gpu: &Gpu, vae: bool) -> Types {
        let half = if gpu.caps().f16 && !gpu.caps().is_cpu() { DType::F16 } else { DType::F32 };
        let operands = if vae && gpu.caps().coop().is_none() { DType::F32 } else { half };
        Types { activations: if vae { DType::F32 } else { half }, operands, weights: half }
    }
}

/// An op ready to run, and what its results should be.
pub struct Op {
    case: Case,
    batch: u32,
    program: Program,
    steps: Steps,
    out: Buffer,
    dims: [u32; 4],
    stored: DType,
    x: Numbers,
    y: Numbers,
    w: Numbers,
    b: Numbers,
    /// The rows of the ops' tables that run.
    pub variants: Vec<&'static str>,
    /// Kernel launches.
    pub dispatches: usize,
    /// Of an image's group: mean, 1 / deviation. Once known, for all results that are checked.
    statistics: RefCell<BTreeMap<(usize, usize), [f64; 2]>>,
}

const EPS: f32 = 1e-5;

impl Op {
    /// Allocate, record and compile.
    ///
    /// # Errors
    /// As [`Program::new`].
    pub async fn new(gpu: &Gpu, case: Case, batch: u32, types: Types) -> Result<Op> {
        let (k, dtype) = (depth(&case), types.activations);
        let x = Numbers { seed: 1, scale: 1.0, dtype };
        let y = Numbers { seed: 2, ..x };
        let w = Numbers { seed: 3, scale: f64::from(k).powf(-0.5), dtype: types.weights };
        let b = Numbers { seed: 4, scale: 1.0, dtype: DType::F32 };
        let mut g = Graph::new(gpu, dtype);
        g.operands = types.operands;
        let out = Self::record(gpu, &mut g, &case, batch, types, [x, y, w, b]).await?;
        let buffer = gpu.storage("result", out.bytes()).await?;
        g.keep(out, &buffer);
        let mut variants: Vec<&'static str> = g.nodes().iter().map(|node| node.variant).collect();
        variants.dedup();
        let dispatches = g.nodes().len();
        let program = Program::new(gpu, g).await?;
        let steps = gpu.steps(&[Step::default()]).await?;
        Ok(Op {
            case,
            batch,
            program,
            steps,
            out: buffer,
            dims: out.dims,
            stored: out.dtype,
            x,
            y,
            w,
            b,
            variants,
            dispatches,
            statistics: RefCell::default(),
        })
    }

    async fn record(
        gpu: &Gpu,
        g: &mut Graph,
        case: &Case,
        batch: u32,
        types: Types,
        [x, y, w, b]: [Numbers; 4],
    ) -> Result<Tensor> {
        // What a norm made is what products take.
        let operands = Numbers { dtype: types.operands, ..x };
        let input = async |g: &mut Graph, numbers: Numbers, dims: [u32; 4]| -> Result<Tensor> {
            let buffer = numbers.upload(gpu, dims.iter().map(|&d| u64::from(d)).product()).await?;
            Ok(g.bind("input", &buffer, dims, numbers.dtype))
        };
        Ok(match *case {
            Case::Linear { m, n, k, geglu } => {
                let weight = w.param(gpu, [1, 1, k, n]).await?;
                let layer = Linear { weight, bias: Some(b.param(gpu, [1, 1, 1, n]).await?) };
                let x = input(g, operands, [batch, 1, m, k]).await?;
                matmul(g, x, &layer, Epilogue::act(if geglu { Activation::Geglu } else { Activation::None }))
            }
            Case::Conv { h, w: width, c, c2, n, kernel, stride, doubled: double } => {
                let weight = w.param(gpu, [1, 1, kernel * kernel * (c + c2), n]).await?;
                let layer = Conv { weight, bias: Some(b.param(gpu, [1, 1, 1, n]).await?), kernel };
                let source = if c2 > 0 || double || stride > 1 { x } else { operands };
                let first = input(g, source, [batch, h, width, c]).await?;
                let second = if c2 > 0 { Some(input(g, y, [batch, h, width, c2]).await?) } else { None };
                match (double, stride) {
                    (true, _) => {
                        match folded(gpu, g, |g| fold(g, &layer, batch * h * width), |weight| *weight).await? {
                            Some((_, folded)) => doubled(g, first, &layer, folded, Epilogue::default()),
                            None => {
                                conv2d(g, first, None, &layer, Taps::resized([2 * h, 2 * width]), Epilogue::default())
                            }
                        }
                    }
                    (_, 2) => conv2d(g, first, None, &layer, Taps::half(), Epilogue::default()),
                    _ => conv2d(g, first, second, &layer, Taps::same(kernel), Epilogue::default()),
                }
            }
            Case::Normed { h, w: width, c, n } => {
                let weight = w.param(gpu, [1, 1, 9 * c, n]).await?;
                let layer = Conv { weight, bias: Some(b.param(gpu, [1, 1, 1, n]).await?), kernel: 3 };
                let [gamma, beta] = [b.param(gpu, [1, 1, 1, c]).await?, b.param(gpu, [1, 1, 1, c]).await?];
                let norm = Norm { gamma, beta, eps: EPS };
                let x = input(g, x, [batch, h, width, c]).await?;
                let tiles = folded(gpu, g, |g| winograd::fold(g, &layer, [h, width]), |tiles| tiles.weight).await?;
                let tiles = tiles.map(|(tiles, weight)| tiles.map(|_| weight));
                convolved(g, (x, None), GROUPS, (&norm, &layer, tiles), |_| Epilogue::default())
            }
            Case::Attention { tokens, heads, d, own: true, .. } => {
                let qkv = input(g, x, [batch, 1, tokens, 3 * heads * d]).await?;
                attention(g, &Attention::fused(qkv, heads))
            }
            Case::Attention { tokens, keys, heads, d, .. } => {
                let q = input(g, x, [batch, 1, tokens, heads * d]).await?;
                let kv = input(g, y, [batch, 1, keys, 2 * heads * d]).await?;
                attention(g, &Attention::cross(q, kv, heads))
            }
            Case::GroupNorm { pixels, c, c2, silu } => {
                let [gamma, beta] = [b.param(gpu, [1, 1, 1, c + c2]).await?, b.param(gpu, [1, 1, 1, c + c2]).await?];
                let first = input(g, x, [batch, 1, pixels, c]).await?;
                let second = if c2 > 0 { Some(input(g, y, [batch, 1, pixels, c2]).await?) } else { None };
                group_norm(g, first, second, &Norm { gamma, beta, eps: EPS }, GROUPS, silu)
            }
            Case::LayerNorm { tokens, c } => {
                let [gamma, beta] = [b.param(gpu, [1, 1, 1, c]).await?, b.param(gpu, [1, 1, 1, c]).await?];
                let x = input(g, x, [batch, 1, tokens, c]).await?;
                layer_norm(g, x, &Norm { gamma, beta, eps: EPS })
            }
        })
    }

    /// Milliseconds of `times` runs together.
    ///
    /// # Errors
    /// Of the device.
    pub async fn time(&self, times: usize) -> Result<f64> {
        self.program.time(&[], &self.steps, times).await
    }

    /// Run once, and hold `count` results against the definition: the root of the squared differences over that of the squares, and
    /// the most that it may be.
    ///
    /// # Errors
    /// Of the device.
    pub async fn error(&self, count: usize) -> Result<[f64; 2]> {
        self.time(1).await?;
        let all = self.dims.iter().map(|&d| d as usize).product::<usize>();
        let stored: Vec<f64> = match self.stored {
            DType::F32 => self.out.read::<f32>(all).await?.into_iter().map(f64::from).collect(),
            _ => self.out.read::<half::f16>(all).await?.into_iter().map(half::f16::to_f64).collect(),
        };
        let (mut difference, mut square) = (0.0, 0.0);
        let pick = Numbers { seed: 9, scale: 1.0, dtype: DType::F32 };
        for i in 0..count {
            // First, last, and what chance brings.
            let at = match i {
                0 => 0,
                1 => all - 1,
                _ => ((pick.at(i) / 3f64.sqrt() + 1.0) / 2.0 * all as f64) as usize % all,
            };
            let expected = self.expected(at);
            difference += (stored[at] - expected).powi(2);
            square += expected.powi(2);
        }
        let halves = [self.stored, self.x.dtype, self.w.dtype].contains(&DType::F16) || self.stored != self.x.dtype;
        // Rounding to f16 is 3e-4; sums of f32 over 10,000 terms some 1e-6.
        let most = if halves { 2e-3 } else { 2e-5 };
        Ok([(difference / square.max(1e-30)).sqrt(), most])
    }

    /// The result at a flat index, in f64.
    fn expected(&self, at: usize) -> f64 {
        let channels = self.dims[3] as usize;
        let (row, column) = (at / channels, at % channels);
        match self.case {
            Case::Linear { n, k, geglu, .. } => {
                let (n, k) = (n as usize, k as usize);
                let product = |j: usize| {
                    (0..k).map(|i| self.operand(row * k + i) * self.w.at(i * n + j)).sum::<f64>() + self.b.at(j)
                };
                // Four values, then their four gates.
                let value = column / 4 * 8 + column % 4;
                if geglu { product(value) * gelu(product(value + 4)) } else { product(column) }
            }
            Case::Conv { c, c2, .. } => {
                self.expected_conv(self.case, [row, column], &|pixel, ch| match ch.checked_sub(c as usize) {
                    None => self.operand(pixel * c as usize + ch),
                    Some(other) => self.y.at(pixel * c2 as usize + other),
                })
            }
            Case::Normed { h, w, c, n } => {
                let conv = Case::Conv { h, w, c, c2: 0, n, kernel: 3, stride: 1, doubled: false };
                let size = [h * w, c].map(|n| n as usize);
                let value = |pixel: usize, ch: usize| self.x.at(pixel * size[1] + ch);
                self.expected_conv(conv, [row, column], &|pixel, ch| {
                    let normed = self.group_normed(size, [pixel, ch], &value);
                    normed / (1.0 + (-normed).exp())
                })
            }
            Case::Attention { tokens, keys, heads, d, own } => {
                let [tokens, keys, width, d] = [tokens, keys, heads * d, d].map(|n| n as usize);
                let (image, head) = (row / tokens, column / d * d);
                let (q_row, kv_row, key_at) = if own { (3 * width, 3 * width, width) } else { (width, 2 * width, 0) };
                let kv = if own { &self.x } else { &self.y };
                let key = |j: usize, c: usize| kv.at((image * keys + j) * kv_row + key_at + c);
                let score =
                    |j: usize| (0..d).map(|c| self.x.at(row * q_row + head + c) * key(j, head + c)).sum::<f64>();
                let scores: Vec<f64> = (0..keys).map(|j| score(j) / (d as f64).sqrt()).collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let sum: f64 = weights.iter().sum();
                weights.iter().enumerate().map(|(j, weight)| weight / sum * key(j, width + column)).sum()
            }
            Case::GroupNorm { pixels, c, silu, .. } => {
                let (pixels, c) = (pixels as usize, c as usize);
                let value = |pixel: usize, ch: usize| match ch.checked_sub(c) {
                    None => self.x.at(pixel * c + ch),
                    Some(other) => self.y.at(pixel * (channels - c) + other),
                };
                let normed = self.group_normed([pixels, channels], [row, column], &value);
                if silu { normed / (1.0 + (-normed).exp()) } else { normed }
            }
            Case::LayerNorm { .. } => {
                let values: Vec<f64> = (0..channels).map(|ch| self.x.at(row * channels + ch)).collect();
                self.normed(&values, values[column], column)
            }
        }
    }

    /// What a product takes, as a norm stored it.
    fn operand(&self, index: usize) -> f64 {
        Numbers { dtype: self.program.nodes()[0].reads[0].dtype, ..self.x }.at(index)
    }

    fn normed(&self, values: &[f64], value: f64, channel: usize) -> f64 {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (value - mean) / (variance + f64::from(EPS)).sqrt() * self.b.at(channel) + self.b.at(channel)
    }

    /// Group norm of one of the values [pixel, channel] of images of [pixels, channels].
    fn group_normed(
        &self,
        [pixels, channels]: [usize; 2],
        [pixel, channel]: [usize; 2],
        value: &dyn Fn(usize, usize) -> f64,
    ) -> f64 {
        let width = channels / GROUPS as usize;
        let (image, group) = (pixel / pixels, channel / width);
        let mut known = self.statistics.borrow_mut();
        let [mean, scale] = *known.entry((image, group)).or_insert_with(|| {
            let average = |of: &dyn Fn(f64) -> f64| {
                let all = image * pixels..(image + 1) * pixels;
                let own = group * width..(group + 1) * width;
                all.map(|pixel| own.clone().map(|ch| of(value(pixel, ch))).sum::<f64>()).sum::<f64>()
                    / (pixels * width) as f64
            };
            let mean = average(&|value| value);
            [mean, 1.0 / (average(&|value| (value - mean).powi(2)) + f64::from(EPS)).sqrt()]
        });
        (value(pixel, channel) - mean) * scale * self.b.at(channel) + self.b.at(channel)
    }

    /// The sum over the taps of `case`'s, of the values [pixel, channel] of its input.
    fn expected_conv(&self, case: Case, [row, column]: [usize; 2], value: &dyn Fn(usize, usize) -> f64) -> f64 {
        let Case::Conv { h, w, c, c2, n, kernel, stride, doubled } = case else {
            unreachable!("a convolution's result of {case:?}")
        };
        let [h, w, depth, n, kernel, stride] = [h, w, c + c2, n, kernel, stride].map(|n| n as usize);
        let [out_h, out_w] = [self.dims[1] as usize, self.dims[2] as usize];
        let (image, line, place) = (row / (out_h * out_w), row / out_w % out_h, row % out_w);
        let scale = if doubled { 2 } else { 1 };
        let mut sum = self.b.at(column);
        for tap in 0..kernel * kernel {
            let iy = (line * stride + tap / kernel).wrapping_sub(kernel / 2);
            let ix = (place * stride + tap % kernel).wrapping_sub(kernel / 2);
            if iy >= h * scale || ix >= w * scale {
                continue;
            }
            let pixel = (image * h + iy / scale) * w + ix / scale;
            sum += (0..depth).map(|ch| value(pixel, ch) * self.w.at((tap * depth + ch) * n + column)).sum::<f64>();
        }
        sum
    }

    /// Bytes of inputs and outputs, each once.
    pub fn bytes(&self) -> f64 {
        let [moved, weights] = self.case.elements(self.batch);
        moved as f64 * self.x.dtype.bytes() as f64 + weights as f64 * self.w.dtype.bytes() as f64
    }

    /// Images.
    pub fn batch(&self) -> u32 {
        self.batch
    }
}

/// Groups of every group norm.
const GROUPS: u32 = 32;

/// Terms of a sum.
fn depth(case: &Case) -> u32 {
    match *case {
        Case::Linear { k, .. } => k,
        Case::Conv { c, c2, kernel, .. } => kernel * kernel * (c + c2),
        Case::Normed { c, .. } => 9 * c,
        _ => 1,
    }
}

/// x Φ(x), erf by its series or continued fraction to f64's digits that matter here (Abramowitz & Stegun 7.1.6, 7.1.14).
fn gelu(x: f64) -> f64 {
    let z = x.abs() / 2f64.sqrt();
    let erf = if z < 3.0 {
        let mut term = z;
        let mut sum = z;
        for n in 1..80 {
            term *= 2.0 * z * z / f64::from(2 * n + 1);
            sum += term;
        }
        2.0 / std::f64::consts::PI.sqrt() * (-z * z).exp() * sum
    } else {
        let fraction = (1..60).rev().fold(z, |below, n| z + f64::from(n) / 2.0 / below);
        1.0 - (-z * z).exp() / std::f64::consts::PI.sqrt() / fraction
    };
    x * 0.5 * (1.0 + erf.copysign(x))
}

/// What `fold` makes of weights, if anything, computed once; and its tensor as it is bound in `g`.
async fn folded<T>(
    gpu: &Gpu,
    g: &mut Graph,
    fold: impl FnOnce(&mut Graph) -> Option<T>,
    of: impl FnOnce(&T) -> Tensor,
) -> Result<Option<(T, Tensor)>> {
    let mut before = Graph::new(gpu, g.dtype);
    before.operands = g.operands;
    let Some(made) = fold(&mut before) else { return Ok(None) };
    let weights = of(&made);
    let buffer = gpu.storage("folded weights", weights.bytes()).await?;
    before.keep(weights, &buffer);
    run_once(gpu, before, &Step::default(), None).await?;
    let bound = g.bind("folded weights", &buffer, weights.dims, weights.dtype);
    Ok(Some((made, bound)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::GpuOptions;
    use pollster::block_on;

    /// Every kind of op is right where it is right, and wrong where its input is another than the definition's.
    #[test]
    fn a_wrong_result_is_found() {
        let gpu = block_on(Gpu::open(&Default::default())).expect("a GPU or a software device");
        let cases = [
            Case::Linear { m: 9, n: 64, k: 32, geglu: true },
            Case::Conv { h: 5, w: 6, c: 32, c2: 32, n: 32, kernel: 3, stride: 1, doubled: false },
            Case::Conv { h: 5, w: 6, c: 32, c2: 0, n: 32, kernel: 3, stride: 2, doubled: false },
            Case::Conv { h: 5, w: 6, c: 32, c2: 0, n: 32, kernel: 3, stride: 1, doubled: true },
            Case::Attention { tokens: 12, keys: 12, heads: 2, d: 40, own: true },
            Case::Attention { tokens: 12, keys: 7, heads: 2, d: 40, own: false },
            Case::GroupNorm { pixels: 30, c: 64, c2: 32, silu: true },
            Case::LayerNorm { tokens: 7, c: 96 },
            Case::Normed { h: 6, w: 4, c: 64, n: 32 },
        ];
        let named = [("winograd", "f2x2"), ("conv2d", "tile"), ("group_norm", "chunks")];
        let variants = named.map(|(op, name)| (op.to_owned(), name.to_owned())).into_iter().collect();
        let in_tiles = GpuOptions { variants, ..Default::default() };
        let in_tiles = block_on(Gpu::open(&in_tiles)).expect("a GPU or a software device");
        let normed = Case::Normed { h: 6, w: 4, c: 64, n: 32 };
        for (gpu, case) in cases.map(|case| (&gpu, case)).into_iter().chain([(&in_tiles, normed)]) {
            let mut op = block_on(Op::new(gpu, case, 2, Types::of(gpu, false))).expect("ready");
            assert!(!std::ptr::eq(gpu, &in_tiles) || op.variants.contains(&"reduce"), "{:?}", op.variants);
            let [error, most] = block_on(op.error(64)).expect("run");
            assert!(error <= most, "{}: {error:.1e}", case.name());
            op.x.seed = 7;
            op.statistics.take();
            let [error, most] = block_on(op.error(64)).expect("run");
            assert!(error > 100.0 * most, "{}: {error:.1e} with another input", case.name());
        }
    }
}
