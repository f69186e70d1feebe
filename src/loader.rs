//! Weights onto the device: streamed as they lie in the file and packed there for the kernels, with LoRAs merged.

use safetensors::Dtype;

use crate::denoiser::Step;
use crate::error::{Error, Result};
use crate::gpu::upload::{Uploader, upload_bytes};
use crate::gpu::{Buffer, DType, Gpu, Graph, Program, Tensor};
use crate::lora::Patches;
use crate::ops::repack::{FileType, LowRank, Repack, repack};
use crate::ops::row_sums::{self, Normed};
use crate::ops::{Conv, Linear, Norm, Param};
use crate::weights::Weights;

/// Loads a network's parameters, or only plans them: shapes are checked and bytes counted, nothing is read or allocated.
pub struct Loader<'a> {
    gpu: &'a Gpu,
    weights: &'a Weights,
    patches: &'a Patches,
    /// Element type of activations beside these weights.
    act: DType,
    /// Bytes of the parameters so far.
    bytes: u64,
    upload: Option<Upload>,
}

/// What is under way to the device.
#[derive(Default)]
struct Upload {
    uploader: Option<Uploader>,
    /// What is in the present chunk.
    pending: Vec<Pending>,
    /// Two words for each matrix: not finite, too large for f16.
    found: Option<Buffer>,
    /// The names of those matrices.
    names: Vec<String>,
    /// Bytes of LoRAs' factors that wait for the chunk.
    factors: u64,
    /// Norms to fold into their layers once those are packed: what is under way before them is.
    folds: Vec<(Norm, Linear)>,
}

struct Pending {
    repack: Repack,
    out: Param,
    /// up [n, rank], down [rank, k].
    factors: Option<(Buffer, Buffer, u32)>,
}

/// A matrix or the filters of a convolution in the file.
struct Matrix {
    name: String,
    shape: Vec<usize>,
    n: usize,
    c: usize,
    taps: usize,
}

impl Matrix {
    fn conv(name: String, n: usize, c: usize, kernel: usize) -> Matrix {
        Matrix { name, shape: vec![n, c, kernel, kernel], n, c, taps: kernel * kernel }
    }
}

impl<'a> Loader<'a> {
    /// A loader of `weights` for a network with activations of `act`.
    pub fn new(gpu: &'a Gpu, weights: &'a Weights, act: DType) -> Self {
        Loader { upload: Some(Upload::default()), ..Self::plan(gpu, weights, act) }
    }

    /// A loader that loads nothing: the network that it makes can be recorded and planned with, not run.
    pub fn plan(gpu: &'a Gpu, weights: &'a Weights, act: DType) -> Self {
        static NONE: std::sync::LazyLock<Patches> = std::sync::LazyLock::new(Patches::none);
        Loader { gpu, weights, patches: &NONE, act, bytes: 0, upload: None }
    }

    /// With LoRAs for this network.
    pub fn with(self, patches: &'a Patches) -> Self {
        Loader { patches, ..self }
    }

    /// The file.
    pub fn weights(&self) -> &'a Weights {
        self.weights
    }

    /// The element type that weights are stored for.
    pub fn activations(&self) -> DType {
        self.act
    }

    /// Bytes of the parameters on the device so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that loading needs at most beside the parameters, for a moment: chunks, findings and their readback, the packing's
    /// dims, LoRAs' factors.
    pub fn transient_bytes(&self) -> u64 {
        let alignment = u64::from(self.gpu.caps().uniform_alignment.max(64));
        let dims = FOUND_BYTES / 8 * alignment + SCALARS;
        let factors = if self.patches.is_empty() { 0 } else { 2 * FACTORS };
        upload_bytes(self.weights.sizes().0) + 2 * FOUND_BYTES + dims + factors
    }

    /// How weights of these names are stored: f16 where the network computes in f16, or where the file is f16 and no LoRA
    /// changes them; on software devices f32, which they read fastest.
    fn storage(&self, matrices: &[Matrix]) -> DType {
        let exact = |m: &Matrix| self.weights.dtype(&m.name) == Some(Dtype::F16) && !self.patches.has(&m.name);
        let half = matrices.iter().all(exact);
        match (self.act, half, self.gpu.caps()) {
            (DType::F16, _, _) => DType::F16,
            (_, true, caps) if !caps.is_cpu() => {
                if caps.f16 {
                    DType::F16
                } else {
                    DType::Packed
                }
            }
            _ => DType::F32,
        }
    }

    async fn allocate(&mut self, label: &str, dims: [u32; 4], dtype: DType) -> Result<Param> {
        let bytes = dims.iter().map(|&d| u64::from(d)).product::<u64>() * dtype.bytes();
        self.gpu.check_size(label, bytes)?;
        let buffer = match self.upload {
            Some(_) => self.gpu.storage(label, bytes).await?,
            None => Buffer::planned(self.gpu, bytes),
        };
        self.bytes += buffer.bytes();
        Ok(Param { buffer, dims, dtype })
    }

    /// A vector of our own making, f32, padded with zeros to a multiple of four; `values` is called only if it is loaded.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn values(
        &mut self,
        label: &str,
        len: usize,
        values: impl FnOnce(&Weights) -> Result<Vec<f32>>,
    ) -> Result<Param> {
        let padded = len.next_multiple_of(4);
        let param = self.allocate(label, [1, 1, 1, padded as u32], DType::F32).await?;
        if self.upload.is_some() {
            let mut values = values(self.weights)?;
            assert_eq!(values.len(), len, "{label}");
            values.resize(padded, 0.0);
            param.buffer.write(&values);
        }
        Ok(param)
    }

    /// Vectors of the file one after the other.
    async fn vectors(&mut self, label: &str, names: &[String], lengths: &[usize]) -> Result<Param> {
        for (name, &len) in names.iter().zip(lengths) {
            self.weights.entry(name, &[len])?;
        }
        let all = |weights: &Weights| {
            let mut all = Vec::new();
            for (name, &len) in names.iter().zip(lengths) {
                all.extend(weights.finite(name, &[len])?);
            }
            Ok(all)
        };
        self.values(label, lengths.iter().sum(), all).await
    }

    /// A vector of the file.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn vector(&mut self, name: &str, len: usize) -> Result<Param> {
        self.vectors(name, &[name.to_owned()], &[len]).await
    }

    /// gamma and beta of a norm over `channels`.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn norm(&mut self, prefix: &str, channels: usize, eps: f32) -> Result<Norm> {
        let gamma = self.vector(&format!("{prefix}.weight"), channels).await?;
        let beta = self.vector(&format!("{prefix}.bias"), channels).await?;
        Ok(Norm { gamma, beta, eps })
    }

    /// The norm before a linear layer, folded into it where the device multiplies so (`ops::row_sums`): the layer then has a bias.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn normed(&mut self, prefix: &str, eps: f32, mut linear: Linear) -> Result<Normed> {
        let [_, _, k, n] = linear.weight.dims.map(|d| d as usize);
        let norm = self.norm(prefix, k, eps).await?;
        let gpu = self.gpu;
        let folded = row_sums::folds(gpu.caps(), |op| gpu.forced_variant(op), self.act);
        if folded {
            if linear.bias.is_none() {
                linear.bias = Some(self.values(prefix, n, |_| Ok(vec![0.0; n])).await?);
            }
            if let Some(upload) = &mut self.upload {
                upload.folds.push((norm.clone(), linear.clone()));
            }
        }
        Ok(Normed { norm, linear, folded })
    }

    /// `[n, k]` of a linear layer, or `[n, k, 1, 1]` of a 1x1 convolution in its place.
    fn matrix(&self, prefix: &str, k: usize, n: usize) -> Matrix {
        let name = format!("{prefix}.weight");
        match self.weights.shape(&name) {
            Some([_, _, 1, 1]) => Matrix::conv(name, n, k, 1),
            _ => Matrix { name, shape: vec![n, k], n, c: k, taps: 1 },
        }
    }

    /// A linear layer k → n.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn linear(&mut self, prefix: &str, k: usize, n: usize, bias: bool) -> Result<Linear> {
        self.fused(&[prefix.to_owned()], k, &[n], bias).await
    }

    /// Linear layers of one input side by side: [W0 | W1 | ..], as for q, k, v.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn fused(&mut self, prefixes: &[String], k: usize, widths: &[usize], bias: bool) -> Result<Linear> {
        let matrices: Vec<Matrix> = prefixes.iter().zip(widths).map(|(p, &n)| self.matrix(p, k, n)).collect();
        let weight = self.matrices(&matrices, false).await?;
        let names: Vec<String> = prefixes.iter().map(|prefix| format!("{prefix}.bias")).collect();
        let bias = if bias { Some(self.vectors(&prefixes[0], &names, widths).await?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// The up-projection of a GEGLU, k → 2·n (values, then gates): columns packed as four values, their four gates, in turn.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn geglu(&mut self, prefix: &str, k: usize, n: usize) -> Result<Linear> {
        let weight = self.matrices(&[self.matrix(prefix, k, 2 * n)], true).await?;
        let name = format!("{prefix}.bias");
        self.weights.entry(&name, &[2 * n])?;
        let interleaved = |weights: &Weights| {
            let mut bias = vec![0f32; 2 * n];
            for (column, value) in weights.finite(&name, &[2 * n])?.into_iter().enumerate() {
                let (gate, c) = (column / n, column % n);
                bias[c / 4 * 8 + gate * 4 + c % 4] = value;
            }
            Ok(bias)
        };
        let bias = Some(self.values(prefix, 2 * n, interleaved).await?);
        Ok(Linear { weight, bias })
    }

    /// A convolution c_in → c_out of `kernel` taps a side; channels are padded with zeros to multiples of four.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn conv(&mut self, prefix: &str, c_in: usize, c_out: usize, kernel: usize) -> Result<Conv> {
        let matrix = Matrix::conv(format!("{prefix}.weight"), c_out, c_in, kernel);
        let weight = self.matrices(&[matrix], false).await?;
        let bias = Some(self.vector(&format!("{prefix}.bias"), c_out).await?);
        Ok(Conv { weight, bias, kernel: kernel as u32 })
    }

    /// Matrices of the same depth side by side, packed [taps · c, Σ n].
    async fn matrices(&mut self, matrices: &[Matrix], geglu: bool) -> Result<Param> {
        for m in matrices {
            self.weights.entry(&m.name, &m.shape)?;
        }
        let k = matrices[0].taps * matrices[0].c.next_multiple_of(4);
        let columns: usize = matrices.iter().map(|m| m.n.next_multiple_of(4)).sum();
        let dtype = self.storage(matrices);
        let out = self.allocate(&matrices[0].name, [1, 1, k as u32, columns as u32], dtype).await?;
        let mut first = 0;
        for m in matrices {
            if self.upload.is_some() {
                self.put(m, first as u32, geglu, out.clone()).await?;
            }
            first += m.n.next_multiple_of(4);
        }
        Ok(out)
    }

    /// Put a matrix into the chunk under way.
    async fn put(&mut self, m: &Matrix, first: u32, geglu: bool, out: Param) -> Result<()> {
        let entry = self.weights.entry(&m.name, &m.shape)?;
        let converted: Vec<u8>;
        let (file, bytes) = match entry.dtype {
            Dtype::F32 => (FileType::F32, entry.bytes()),
            Dtype::F16 => (FileType::F16, entry.bytes()),
            Dtype::BF16 => (FileType::Bf16, entry.bytes()),
            Dtype::F64 => {
                converted = bytemuck::cast_slice(&self.weights.f32(&m.name, &m.shape)?).to_vec();
                (FileType::F32, &converted[..])
            }
            other => return Err(self.weights.not_float(&m.name, other)),
        };
        let factors = match self.patches.product(&m.name, m.n, m.c * m.taps)? {
            None => None,
            Some(product) => {
                let up = self.gpu.upload("LoRA up", &product.up).await?;
                let down = self.gpu.upload("LoRA down", &product.down).await?;
                Some((up, down, product.rank as u32))
            }
        };
        let factor_bytes = factors.as_ref().map_or(0, |(up, down, _)| up.bytes() + down.bytes());
        let Some(upload) = &mut self.upload else { unreachable!("a loader that plans puts nothing") };
        if upload.uploader.is_none() {
            upload.uploader = Some(Uploader::new(self.gpu, self.weights.sizes().0).await?);
        }
        if upload.found.is_none() {
            upload.found = Some(self.gpu.upload("found", &vec![0u32; FOUND_BYTES as usize / 4]).await?);
        }
        let full = upload.uploader.as_ref().is_some_and(|u| !u.fits(bytes.len()))
            || (upload.factors > 0 && upload.factors + factor_bytes > FACTORS);
        if full || upload.names.len() as u64 * 8 == FOUND_BYTES {
            self.flush().await?;
        }
        let Some(upload) = &mut self.upload else { unreachable!("checked above") };
        let Some(uploader) = &mut upload.uploader else { unreachable!("made above") };
        if !uploader.fits(bytes.len()) {
            uploader.grow(bytes.len()).await?;
        }
        let base = uploader.put(bytes).await?;
        let slot = upload.names.len() as u32 * 2;
        upload.names.push(m.name.clone());
        upload.factors += factor_bytes;
        let repack = Repack { file, base, n: m.n as u32, c: m.c as u32, taps: m.taps as u32, first, geglu, slot };
        upload.pending.push(Pending { repack, out, factors });
        Ok(())
    }

    /// Send the chunk under way and pack what is in it.
    async fn flush(&mut self) -> Result<()> {
        let Some(upload) = &mut self.upload else { return Ok(()) };
        let (Some(uploader), Some(found)) = (&mut upload.uploader, &upload.found) else { return Ok(()) };
        if upload.pending.is_empty() && upload.folds.is_empty() {
            return Ok(());
        }
        uploader.send();
        let mut g = Graph::new(self.gpu, DType::F32);
        let vector = |g: &mut Graph, label, buffer: &Buffer| -> Tensor {
            g.bind(label, buffer, [1, 1, 1, (buffer.bytes() / 4) as u32], DType::F32)
        };
        let raw = vector(&mut g, "upload", uploader.raw());
        let words = vector(&mut g, "found", found);
        for Pending { repack: r, out, factors } in &upload.pending {
            let lora = factors.as_ref().map(|(up, down, rank)| LowRank {
                up: vector(&mut g, "LoRA up", up),
                down: vector(&mut g, "LoRA down", down),
                rank: *rank,
            });
            let out = out.bind(&mut g);
            repack(&mut g, raw, out, words, r, lora);
        }
        for (norm, linear) in &upload.folds {
            row_sums::fold(&mut g, norm, linear);
        }
        let program = Program::new(self.gpu, g).await?;
        let scalars = self.gpu.steps(&[Step::default()]).await?;
        let mut step = self.gpu.record(false);
        step.run(&program, &[], &scalars, 0);
        step.submit(None).await?;
        for (norm, _) in upload.folds.drain(..) {
            norm.gamma.buffer.write(&vec![1f32; norm.gamma.dims[3] as usize]);
            norm.beta.buffer.write(&vec![0f32; norm.beta.dims[3] as usize]);
        }
        upload.pending.clear();
        upload.factors = 0;
        if upload.names.len() as u64 * 8 == FOUND_BYTES {
            self.check().await?;
        }
        Ok(())
    }

    /// What the packing found wrong with the values so far.
    async fn check(&mut self) -> Result<()> {
        let Some(upload) = &mut self.upload else { return Ok(()) };
        let Some(found) = &upload.found else { return Ok(()) };
        let words: Vec<u32> = found.read(upload.names.len() * 2).await?;
        for (name, pair) in upload.names.iter().zip(words.chunks_exact(2)) {
            if pair[0] != 0 {
                return Err(self.weights.not_finite(name, "NaN or infinity"));
            }
            if pair[1] != 0 {
                let problem = format!("tensor {name} holds numbers beyond f16's 65504");
                return Err(Error::file(self.weights.path(), problem, "run with --precision f32"));
            }
        }
        found.write(&vec![0u32; upload.names.len() * 2]);
        upload.names.clear();
        Ok(())
    }

    /// Wait for everything to be on the device.
    ///
    /// # Errors
    /// [`Error::File`] for weights that are not finite, or too large for f16; of the device.
    pub async fn finish(&mut self) -> Result<()> {
        self.flush().await?;
        self.check().await?;
        if let Some(upload) = &mut self.upload {
            upload.uploader = None;
            self.gpu.flush().await?;
        }
        Ok(())
    }
}

/// Bytes of the scalars' slot that the packing binds.
const SCALARS: u64 = 256;

/// Bytes of LoRAs' factors beyond which a chunk is sent.
const FACTORS: u64 = 64 << 20;

/// Bytes of the findings of one batch: 2048 matrices.
const FOUND_BYTES: u64 = 2048 * 8;
