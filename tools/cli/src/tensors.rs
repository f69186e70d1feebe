//! Tensors in safetensors files: what the probes and `--latents-in` read, what they write.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use scumble::disk::write_atomic;
use scumble::files::Bytes;
use scumble::probe::HostTensor;
use scumble::weights::Weights;
use scumble::{Error, Result};

/// An open file of tensors.
pub struct Tensors(Weights);

impl Tensors {
    /// Open and check.
    pub fn open(path: &Path) -> Result<Tensors> {
        let bytes = std::fs::read(path).map_err(|e| {
            let problem = if e.kind() == std::io::ErrorKind::NotFound { "no such file".into() } else { e.to_string() };
            Error::file(path, problem, "give a safetensors file")
        })?;
        Ok(Tensors(Weights::new(path.to_owned(), Bytes::Owned(bytes))?))
    }

    /// Is there such a tensor?
    pub fn has(&self, name: &str) -> bool {
        self.0.has(name)
    }

    /// A tensor as f32, whatever its shape.
    pub fn take(&self, name: &str) -> Result<HostTensor> {
        let Some(shape) = self.0.shape(name).map(<[usize]>::to_vec) else {
            let mut names: Vec<&str> = self.0.names().collect();
            names.sort_unstable();
            let problem = format!("tensor {name} is missing, found [{}]", names.join(", "));
            return Err(Error::file(self.0.path(), problem, "write it under that name"));
        };
        Ok(HostTensor { data: self.0.f32(name, &shape)?, shape })
    }
}

/// Write tensors as f32, whole or not at all.
pub fn write(path: &Path, tensors: &[(&str, &HostTensor)]) -> Result<()> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, tensor)| tensor.data.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views: std::result::Result<Vec<_>, _> = (tensors.iter().zip(&bytes))
        .map(|((name, tensor), bytes)| Ok((*name, TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?)))
        .collect();
    let bytes = views.and_then(|views| safetensors::serialize(views, None));
    let bytes = bytes.map_err(|e: safetensors::SafeTensorError| Error::file(path, e, "choose another output"))?;
    write_atomic(path, &bytes)
}
