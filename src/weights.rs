//! Named tensors of safetensors files: headers checked, data left where it is until it is asked for.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::files::Bytes;

/// Tensors by name, of one safetensors file or several.
pub struct Weights {
    path: PathBuf,
    tensors: HashMap<String, Entry>,
}

/// A tensor, or a part of one, in a file.
#[derive(Clone)]
pub(crate) struct Entry {
    file: Arc<Bytes>,
    /// Element type in the file.
    pub dtype: Dtype,
    /// As PyTorch prints it.
    pub shape: Vec<usize>,
    range: Range<usize>,
    /// The file holds the transpose, [shape[1], shape[0]].
    transposed: bool,
}

impl Entry {
    /// The bytes as they lie in the file.
    pub fn bytes(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }
}

/// Which part of a tensor goes by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slice {
    /// All of it.
    Whole,
    /// The i-th of n equal blocks of rows, as OpenCLIP's in_proj holds q, k and v.
    Block(usize, usize),
    /// A matrix, transposed.
    Transposed,
}

/// Bytes of a header that is still read: the largest real ones (SDXL with its training's metadata) have some hundred kilobytes.
const MAX_HEADER: usize = 32 << 20;

impl Weights {
    /// Parse and check the header of a safetensors file.
    ///
    /// # Errors
    /// [`Error::File`] if it is no safetensors file, is truncated, names a tensor twice, or its offsets do not fit its size.
    pub fn new(path: PathBuf, bytes: Bytes) -> Result<Weights> {
        check_header(&path, &bytes)?;
        let file = Arc::new(bytes);
        let bytes: &[u8] = &file;
        let parsed = SafeTensors::deserialize(bytes).map_err(|e| damaged(&path, bytes, &e))?;
        let start = bytes.as_ptr() as usize;
        let entry = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let at = view.data().as_ptr() as usize - start;
            let range = at..at + view.data().len();
            let shape = view.shape().to_vec();
            (name, Entry { file: file.clone(), dtype: view.dtype(), shape, range, transposed: false })
        };
        let tensors = parsed.tensors().into_iter().map(entry).collect();
        Ok(Weights { path, tensors })
    }

    /// The tensors of several files under one roof.
    ///
    /// # Errors
    /// [`Error::File`] if two files hold tensors of one name.
    pub fn joined(path: PathBuf, parts: Vec<Weights>) -> Result<Weights> {
        let mut tensors = HashMap::new();
        for part in parts {
            for (name, entry) in part.tensors {
                if let Some((name, _)) = tensors.contains_key(&name).then_some((&name, ())) {
                    let problem = format!("tensor {name} is in two of its files, also in {}", part.path.display());
                    return Err(Error::file(path, problem, "fetch the model again"));
                }
                tensors.insert(name, entry);
            }
        }
        Ok(Weights { path, tensors })
    }

    /// The same data under other names: `rename` tells for each tensor what goes by which name (nothing: it is left out).
    pub(crate) fn renamed(&self, mut rename: impl FnMut(&str) -> Vec<(String, Slice)>) -> Weights {
        let mut tensors = HashMap::new();
        for (name, entry) in &self.tensors {
            for (new, slice) in rename(name) {
                if let Some(entry) = entry.slice(slice) {
                    tensors.insert(new, entry);
                }
            }
        }
        Weights { path: self.path.clone(), tensors }
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

    /// Bytes of all tensors, and of each element type by its safetensors name, the largest first.
    pub fn sizes(&self) -> (u64, Vec<(String, u64)>) {
        let mut by_type: HashMap<String, u64> = HashMap::new();
        for entry in self.tensors.values() {
            *by_type.entry(format!("{:?}", entry.dtype)).or_default() += entry.range.len() as u64;
        }
        let mut sizes: Vec<(String, u64)> = by_type.into_iter().filter(|(_, bytes)| *bytes > 0).collect();
        sizes.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        (sizes.iter().map(|(_, bytes)| bytes).sum(), sizes)
    }

    /// All values of a tensor of the expected shape as f32.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::MisshapenTensor`], [`Error::File`] for a type that is no float.
    pub fn f32(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        let entry = self.entry(name, expected)?;
        let values = self.decode(name, entry, entry.range.clone())?;
        if !entry.transposed {
            return Ok(values);
        }
        let (rows, columns) = (expected[0], expected[1]);
        Ok((0..rows * columns).map(|i| values[i % columns * rows + i / columns]).collect())
    }

    /// [`Weights::f32`] of a float tensor, none of them infinite or NaN: parameters.
    ///
    /// # Errors
    /// As [`Weights::f32`]; [`Error::File`] for integers, and for a value that is not finite.
    pub fn finite(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        self.check_float(name)?;
        let values = self.f32(name, expected)?;
        self.check_finite(name, &values)?;
        Ok(values)
    }

    /// Row `row` of a matrix [rows, width] as finite f32, without touching the others.
    ///
    /// # Errors
    /// As [`Weights::finite`]; a row out of range is ours.
    pub fn row(&self, name: &str, expected: &[usize], row: usize) -> Result<Vec<f32>> {
        self.check_float(name)?;
        let entry = self.entry(name, expected)?;
        assert!(row < expected[0] && !entry.transposed, "{name}: row {row} of {expected:?}");
        let width = entry.range.len() / expected[0];
        let start = entry.range.start + row * width;
        let values = self.decode(name, entry, start..start + width)?;
        self.check_finite(name, &values)?;
        Ok(values)
    }

    fn check_float(&self, name: &str) -> Result<()> {
        match self.dtype(name) {
            Some(integer @ (Dtype::I64 | Dtype::I32)) => Err(self.not_float(name, integer)),
            _ => Ok(()),
        }
    }

    fn check_finite(&self, name: &str, values: &[f32]) -> Result<()> {
        match values.iter().find(|value| !value.is_finite()) {
            None => Ok(()),
            Some(bad) => Err(self.not_finite(name, bad)),
        }
    }

    /// The error for a tensor that holds NaN or infinity.
    pub(crate) fn not_finite(&self, name: &str, found: impl std::fmt::Display) -> Error {
        let problem = format!("tensor {name} holds {found}, expected finite numbers");
        Error::file(&self.path, problem, "the file is damaged or its training failed: fetch it again or use another")
    }

    /// A tensor of the expected shape, where it lies.
    pub(crate) fn entry(&self, name: &str, expected: &[usize]) -> Result<&Entry> {
        let missing =
            || Error::MissingTensor { path: self.path.clone(), name: name.into(), expected: expected.to_vec() };
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        if entry.shape == expected {
            return Ok(entry);
        }
        let (expected, found) = (expected.to_vec(), entry.shape.clone());
        Err(Error::MisshapenTensor { path: self.path.clone(), name: name.into(), expected, found })
    }

    /// The element type of a tensor, if it is there.
    pub(crate) fn dtype(&self, name: &str) -> Option<Dtype> {
        self.tensors.get(name).map(|entry| entry.dtype)
    }

    /// The error for an element type that no kernel reads.
    pub(crate) fn not_float(&self, name: &str, dtype: Dtype) -> Error {
        let problem = format!("tensor {name} has type {dtype:?}, expected F16, BF16, F32 or F64");
        Error::file(&self.path, problem, "convert the model to one of these")
    }

    fn decode(&self, name: &str, entry: &Entry, range: Range<usize>) -> Result<Vec<f32>> {
        let bytes = &entry.file[range];
        Ok(match entry.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F64 => bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            // Timesteps that a script wrote as integers.
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect(),
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b) as f32).collect(),
            other => return Err(self.not_float(name, other)),
        })
    }
}

impl Entry {
    /// A part of this tensor; none if it has no such part.
    fn slice(&self, slice: Slice) -> Option<Entry> {
        let mut part = self.clone();
        match slice {
            Slice::Whole => {}
            Slice::Block(at, of) => {
                let rows = *self.shape.first()?;
                if !rows.is_multiple_of(of) {
                    return None;
                }
                part.shape[0] = rows / of;
                let bytes = self.range.len() / of;
                part.range = self.range.start + at * bytes..self.range.start + (at + 1) * bytes;
            }
            Slice::Transposed => {
                let [rows, columns] = self.shape[..] else { return None };
                part.shape = vec![columns, rows];
                part.transposed = true;
            }
        }
        Some(part)
    }
}

/// What the safetensors crate does not look at: the header's size against ours, and tensors named twice.
fn check_header(path: &Path, bytes: &[u8]) -> Result<()> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else { return Ok(()) };
    let length = u64::from_le_bytes(*length);
    let hint = "fetch the file again; only .safetensors is read, not .ckpt or .bin";
    if length > MAX_HEADER as u64 {
        let swapped = length.swap_bytes();
        let problem = match swapped < MAX_HEADER as u64 {
            true => {
                format!("written in the wrong byte order: its header would have {length} bytes, reversed {swapped}")
            }
            false => {
                format!("not a safetensors file: its header would have {length} bytes, expected at most {MAX_HEADER}")
            }
        };
        return Err(Error::file(path, problem, hint));
    }
    let Some(header) = rest.get(..length as usize) else { return Ok(()) };
    match serde_json::from_slice::<Keys>(header) {
        Ok(Keys(Some(problem))) => Err(Error::file(path, format!("damaged: {problem}"), hint)),
        // What is no JSON object is told by the parser that follows.
        Ok(Keys(None)) | Err(_) => Ok(()),
    }
}

/// What is wrong with a header's first bad tensor: named twice (maps keep the last in silence), or further off than sums can count.
struct Keys(Option<String>);

/// Offsets beyond this are of no file; the parser's sums would overflow.
const MAX_END: u64 = 1 << 60;

impl<'de> serde::Deserialize<'de> for Keys {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Keys, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Keys;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> std::result::Result<Keys, A::Error> {
                let mut seen = HashSet::new();
                let mut problem = None;
                while let Some(key) = map.next_key::<String>()? {
                    let tensor = map.next_value::<serde_json::Value>()?;
                    // The parser reads objects and, by their order, lists.
                    let offsets = tensor.get("data_offsets").or_else(|| tensor.get(2));
                    if offsets.and_then(|offsets| offsets.get(1)?.as_u64()).is_some_and(|end| end > MAX_END) {
                        problem.get_or_insert_with(|| format!("the header lies about the offsets of tensor {key}"));
                    }
                    if !seen.insert(key.clone()) {
                        problem.get_or_insert_with(|| format!("it holds two tensors named {key}"));
                    }
                }
                Ok(Keys(problem))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
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
