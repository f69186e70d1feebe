//! Files and weights: a model's folder (or the embedded one), safetensors without copies, parameters packed for the kernels.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::gpu::{DType, Gpu};
use crate::ops::{Conv, Linear, Norm, Param};

/// Where a model's files are.
#[derive(Clone, Debug)]
pub enum Files {
    /// A diffusers folder.
    Folder(PathBuf),
    /// Files in the program's own memory, by their path in the folder.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// A file's bytes: mapped or in the program.
pub enum Bytes {
    /// Mapped from disk; pages come in as they are read.
    Mapped(memmap2::Mmap),
    /// In the program.
    Static(&'static [u8]),
    /// In memory.
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl Files {
    /// Open `path` as a model.
    ///
    /// # Errors
    /// [`Error::File`] if it is no folder with a model_index.json.
    pub fn open(path: &Path) -> Result<Files> {
        let hint = "give a diffusers folder (with model_index.json), or leave -m out for the embedded model";
        if !path.exists() {
            return Err(Error::file(path, "no such file or folder", hint));
        }
        if !path.is_dir() {
            return Err(Error::file(path, "this is a file, expected a folder", hint));
        }
        if !path.join("model_index.json").is_file() {
            return Err(Error::file(path, "the folder holds no model_index.json", hint));
        }
        Ok(Files::Folder(path.to_owned()))
    }

    /// The path of a part, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Files::Folder(folder) => folder.join(name),
            Files::Embedded(_) => Path::new("(embedded)").join(name),
        }
    }

    /// Is the file there?
    pub fn has(&self, name: &str) -> bool {
        match self {
            Files::Folder(folder) => folder.join(name).is_file(),
            Files::Embedded(files) => files.iter().any(|(path, _)| *path == name),
        }
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing or unreadable.
    pub fn read(&self, name: &str) -> Result<Bytes> {
        let path = self.path(name);
        let hint = "is the model folder complete?";
        match self {
            Files::Folder(_) => map(&path).map_err(|e| Error::file(&path, io_problem(&e), hint)),
            Files::Embedded(files) => match files.iter().find(|(path, _)| *path == name) {
                Some((_, bytes)) => Ok(Bytes::Static(bytes)),
                None => Err(Error::file(path, "no such file", hint)),
            },
        }
    }

    /// A text file.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing or no UTF-8.
    pub fn text(&self, name: &str) -> Result<String> {
        let bytes = self.read(name)?;
        let text = std::str::from_utf8(&bytes);
        text.map(str::to_owned)
            .map_err(|e| Error::file(self.path(name), format!("not a text file: {e}"), "fetch it again"))
    }

    /// A JSON file as `T`.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing, no JSON, or lacks a field.
    pub fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T> {
        let text = self.text(name)?;
        serde_json::from_str(&text)
            .map_err(|e| Error::file(self.path(name), format!("bad JSON: {e}"), "fetch it again"))
    }

    /// Open the first of `names` that is there as weights.
    ///
    /// # Errors
    /// [`Error::File`] if none is there, or the file is damaged.
    pub fn weights(&self, names: &[&str]) -> Result<Weights> {
        let name = names.iter().find(|name| self.has(name)).unwrap_or(&names[0]);
        Weights::new(self.path(name), self.read(name)?)
    }
}

/// What an I/O error means to a user.
pub(crate) fn io_problem(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::NotFound => "no such file".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => e.to_string(),
    }
}

#[allow(unsafe_code)]
fn map(path: &Path) -> std::io::Result<Bytes> {
    let file = std::fs::File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::Static(&[]));
    }
    // SAFETY: the map is read-only and private to us. If another program truncates the file meanwhile, reads fault; every
    // runtime that maps weights accepts that, since a copy of a checkpoint would double its memory.
    Ok(Bytes::Mapped(unsafe { memmap2::Mmap::map(&file)? }))
}

/// A safetensors file, its header checked.
pub struct Weights {
    path: PathBuf,
    bytes: Bytes,
    tensors: HashMap<String, Entry>,
}

struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Weights {
    /// Parse and check the header of a safetensors file.
    ///
    /// # Errors
    /// [`Error::File`] if it is no safetensors file, is truncated, or its offsets do not fit its size.
    pub fn new(path: PathBuf, bytes: Bytes) -> Result<Weights> {
        let parsed = SafeTensors::deserialize(&bytes).map_err(|e| Self::damaged(&path, &bytes, &e))?;
        let start = bytes.as_ptr() as usize;
        let entry = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let at = view.data().as_ptr() as usize - start;
            let range = at..at + view.data().len();
            (name, Entry { dtype: view.dtype(), shape: view.shape().to_vec(), range })
        };
        let tensors = parsed.tensors().into_iter().map(entry).collect();
        Ok(Weights { path, bytes, tensors })
    }

    fn damaged(path: &Path, bytes: &[u8], e: &safetensors::SafeTensorError) -> Error {
        use safetensors::SafeTensorError as E;
        let size = bytes.len();
        let problem = match e {
            _ if size < 8 => format!("not a safetensors file: expected at least 8 bytes, found {size}"),
            E::InvalidHeaderLength | E::MetadataIncompleteBuffer => {
                format!("truncated or damaged: its header and its size of {size} bytes do not agree")
            }
            E::InvalidOffset(name) => format!("damaged: the header lies about the offsets of tensor {name}"),
            E::TensorInvalidInfo | E::ValidationOverflow => {
                "damaged: the header lies about a tensor's offsets (shape, type and length do not agree)".into()
            }
            _ => format!("not a safetensors file: {e}"),
        };
        Error::file(path, problem, "fetch the file again; only .safetensors is read, not .ckpt or .bin")
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Is there such a tensor?
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// All values of a tensor of the expected shape as f32.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::MisshapenTensor`], [`Error::File`] for a type that is no float.
    pub fn f32(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        let entry = self.entry(name, expected)?;
        self.decode(name, entry, entry.range.clone())
    }

    /// Row `row` of a matrix [rows, width] as f32, without touching the others.
    ///
    /// # Errors
    /// As [`Weights::f32`]; a row out of range is ours.
    pub fn row(&self, name: &str, expected: &[usize], row: usize) -> Result<Vec<f32>> {
        let entry = self.entry(name, expected)?;
        assert!(row < expected[0], "{name}: row {row} of {expected:?}");
        let width = entry.range.len() / expected[0];
        let start = entry.range.start + row * width;
        self.decode(name, entry, start..start + width)
    }

    fn entry(&self, name: &str, expected: &[usize]) -> Result<&Entry> {
        let missing =
            || Error::MissingTensor { path: self.path.clone(), name: name.into(), expected: expected.to_vec() };
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        if entry.shape == expected {
            return Ok(entry);
        }
        let (expected, found) = (expected.to_vec(), entry.shape.clone());
        Err(Error::MisshapenTensor { path: self.path.clone(), name: name.into(), expected, found })
    }

    fn decode(&self, name: &str, entry: &Entry, range: Range<usize>) -> Result<Vec<f32>> {
        let bytes = &self.bytes[range];
        Ok(match entry.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            // Timesteps that a script wrote as integers.
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect(),
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f32).collect(),
            other => {
                let problem = format!("tensor {name} has type {other:?}, expected F16, BF16, F32 or F64");
                return Err(Error::file(&self.path, problem, "convert the model to one of these"));
            }
        })
    }
}

/// Packs tensors for the kernels and uploads them, one at a time: the host never holds a second copy of the model.
pub struct Loader<'a> {
    gpu: &'a Gpu,
    weights: &'a Weights,
    /// Element type of activations beside these weights.
    act: DType,
    staged: u64,
}

/// Bytes staged for upload before the loader waits for the device to take them.
const STAGING: u64 = 64 << 20;

impl<'a> Loader<'a> {
    /// A loader of `weights` for a network with activations of `act`.
    pub fn new(gpu: &'a Gpu, weights: &'a Weights, act: DType) -> Self {
        Loader { gpu, weights, act, staged: 0 }
    }

    /// The file.
    pub fn weights(&self) -> &'a Weights {
        self.weights
    }

    /// The device.
    pub fn gpu(&self) -> &'a Gpu {
        self.gpu
    }

    /// How a weight of this name is stored: f16 where the network computes in f16 or the file is f16; on software
    /// devices f32, which they read fastest.
    fn storage(&self, name: &str) -> DType {
        let half = self.weights.tensors.get(name).is_some_and(|entry| entry.dtype == Dtype::F16);
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

    async fn upload(&mut self, label: &str, values: &[f32], dims: [u32; 4], dtype: DType) -> Result<Param> {
        assert_eq!(
            values.len() as u64,
            dims.iter().map(|&d| u64::from(d)).product::<u64>(),
            "{label}: values for {dims:?}"
        );
        let buffer = self.gpu.storage(label, values.len() as u64 * dtype.bytes()).await?;
        match dtype {
            DType::F32 => buffer.write(values),
            DType::F16 | DType::Packed => {
                let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                buffer.write(&halves);
            }
        }
        self.staged += buffer.bytes();
        if self.staged >= STAGING {
            self.gpu.flush().await?;
            self.staged = 0;
        }
        Ok(Param { buffer, dims, dtype })
    }

    /// A vector in f32, padded with zeros to a multiple of four.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn vector(&mut self, name: &str, len: usize) -> Result<Param> {
        let values = self.weights.f32(name, &[len])?;
        self.values(name, values).await
    }

    /// Values of our own as a vector in f32, padded with zeros to a multiple of four.
    ///
    /// # Errors
    /// Of the device.
    pub async fn values(&mut self, label: &str, mut values: Vec<f32>) -> Result<Param> {
        values.resize(values.len().next_multiple_of(4), 0.0);
        let n = values.len() as u32;
        self.upload(label, &values, [1, 1, 1, n], DType::F32).await
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

    /// `[n, k]` of a linear layer, or `[n, k, 1, 1]` of a 1x1 convolution in its place.
    fn matrix(&self, name: &str, k: usize, n: usize) -> Result<Vec<f32>> {
        match self.weights.shape(name) {
            Some([_, _, 1, 1]) => self.weights.f32(name, &[n, k, 1, 1]),
            _ => self.weights.f32(name, &[n, k]),
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
        let total: usize = widths.iter().sum();
        let mut packed = vec![0f32; k * total];
        let mut biases = Vec::new();
        let mut first = 0;
        for (prefix, &n) in prefixes.iter().zip(widths) {
            let rows = self.matrix(&format!("{prefix}.weight"), k, n)?;
            transpose_into(&mut packed, total, first, &rows, k, |column| column);
            if bias {
                biases.extend(self.weights.f32(&format!("{prefix}.bias"), &[n])?);
            }
            first += n;
        }
        let dtype = self.storage(&format!("{}.weight", prefixes[0]));
        let weight = self.upload(&prefixes[0], &packed, [1, 1, k as u32, total as u32], dtype).await?;
        let bias = if bias { Some(self.values(&prefixes[0], biases).await?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// The up-projection of a GEGLU, k → 2·n (values, then gates): columns packed as four values, their four gates, in turn.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn geglu(&mut self, prefix: &str, k: usize, n: usize) -> Result<Linear> {
        let interleave = |column: usize| {
            let (gate, c) = (column / n, column % n);
            c / 4 * 8 + gate * 4 + c % 4
        };
        let rows = self.matrix(&format!("{prefix}.weight"), k, 2 * n)?;
        let mut packed = vec![0f32; k * 2 * n];
        transpose_into(&mut packed, 2 * n, 0, &rows, k, interleave);
        let plain = self.weights.f32(&format!("{prefix}.bias"), &[2 * n])?;
        let mut bias = vec![0f32; 2 * n];
        for (column, value) in plain.into_iter().enumerate() {
            bias[interleave(column)] = value;
        }
        let dtype = self.storage(&format!("{prefix}.weight"));
        let weight = self.upload(prefix, &packed, [1, 1, k as u32, 2 * n as u32], dtype).await?;
        let bias = self.values(prefix, bias).await?;
        Ok(Linear { weight, bias: Some(bias) })
    }

    /// A convolution c_in → c_out of `kernel` taps a side; channels are padded with zeros to multiples of four.
    ///
    /// # Errors
    /// Of the file, or of the device.
    pub async fn conv(&mut self, prefix: &str, c_in: usize, c_out: usize, kernel: usize) -> Result<Conv> {
        let name = format!("{prefix}.weight");
        let source = self.weights.f32(&name, &[c_out, c_in, kernel, kernel])?;
        let (k_in, n) = (c_in.next_multiple_of(4), c_out.next_multiple_of(4));
        let taps = kernel * kernel;
        let mut packed = vec![0f32; taps * k_in * n];
        for (o, filters) in source.chunks_exact(c_in * taps).enumerate() {
            for (c, filter) in filters.chunks_exact(taps).enumerate() {
                for (tap, &value) in filter.iter().enumerate() {
                    packed[(tap * k_in + c) * n + o] = value;
                }
            }
        }
        let dims = [1, 1, (taps * k_in) as u32, n as u32];
        let dtype = self.storage(&name);
        let weight = self.upload(prefix, &packed, dims, dtype).await?;
        let bias = Some(self.vector(&format!("{prefix}.bias"), c_out).await?);
        Ok(Conv { weight, bias, kernel: kernel as u32 })
    }
}

/// rows [n, k] into columns `place(first + i)` of packed [k, total].
fn transpose_into(
    packed: &mut [f32],
    total: usize,
    first: usize,
    rows: &[f32],
    k: usize,
    place: impl Fn(usize) -> usize,
) {
    for (i, row) in rows.chunks_exact(k).enumerate() {
        let column = place(first + i);
        for (depth, &value) in row.iter().enumerate() {
            packed[depth * total + column] = value;
        }
    }
}
