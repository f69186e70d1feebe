//! The small networks of tools/reference/networks.py: a diffusers folder with the same weights, drawn from the same generator.

#![allow(dead_code)] // Each test crate uses its part.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView};
use scumble::files::Bytes;
use scumble::noise::randn;
use scumble::probe::HostTensor;
use scumble::weights::Weights;

/// A path under tests/data.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Tensors of a golden.
pub struct Golden(Weights);

impl Golden {
    /// tests/data/NAME.safetensors.
    pub fn open(name: &str) -> Golden {
        let path = data(&format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).expect("a golden: tools/reference makes them");
        Golden(Weights::new(path, Bytes::Owned(bytes)).expect("a golden"))
    }

    /// One tensor.
    pub fn take(&self, name: &str) -> HostTensor {
        let shape = self.0.shape(name).expect(name).to_vec();
        HostTensor::new(shape.clone(), self.0.f32(name, &shape).expect(name))
    }
}

/// ‖a − b‖ / ‖b‖.
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(x, y)| f64::from(*x) - f64::from(*y)));
    difference / norm(&mut b.iter().map(|y| f64::from(*y)))
}

/// A diffusers folder with one part: `case`'s config and its random weights, as PART/weights.safetensors.
pub fn model_folder(part: &str, case: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().join(part);
    std::fs::create_dir_all(&at).expect("a folder");
    std::fs::write(folder.path().join("model_index.json"), "{}").expect("written");
    std::fs::copy(data(&format!("networks/{case}.json")), at.join("config.json")).expect("copied");
    let shapes = std::fs::read_to_string(data(&format!("networks/{case}.shapes.json"))).expect("a golden");
    write(&at.join("weights.safetensors"), &serde_json::from_str(&shapes).expect("names and shapes"));
    folder
}

/// As `random_weights` of tools/reference/common.py: the values of every tensor, in the order of their names.
pub fn draw(shapes: &BTreeMap<String, Vec<usize>>) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let one = |(i, (name, shape)): (usize, (&String, &Vec<usize>))| {
        let numel: usize = shape.iter().product();
        let scale = (1.0 / (numel as f64 / shape[0] as f64).sqrt()) as f32;
        let value = |v: f32| match name.as_str() {
            n if n.ends_with(".bias") => v * 0.1,
            n if n.contains("norm") => 1.0 + v * 0.1,
            n if n.contains("embedding.weight") => v * 0.5,
            _ => v * scale,
        };
        (name.clone(), shape.clone(), randn(1000 + i as u64, numel).into_iter().map(value).collect())
    };
    shapes.iter().enumerate().map(one).collect()
}

/// Write drawn tensors in f32.
fn write(path: &Path, shapes: &BTreeMap<String, Vec<usize>>) {
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = draw(shapes)
        .into_iter()
        .map(|(name, shape, values)| (name, shape, values.into_iter().flat_map(f32::to_le_bytes).collect()))
        .collect();
    let views =
        tensors.iter().map(|(n, s, b)| (n.as_str(), TensorView::new(Dtype::F32, s.clone(), b).expect("a view")));
    std::fs::write(path, safetensors::serialize(views, None).expect("serialised")).expect("written");
}
