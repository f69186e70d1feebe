//! What is kept on disk between runs for one adapter and driver: compiled pipelines, and the ways that tuning chose. Both are
//! bounded and safe to delete; what cannot be read is ignored and made anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::caps::Caps;
use super::wait::lock;
use crate::disk::{io_problem, replace};
use crate::error::{Error, Result};

/// Bytes of compiled pipelines above which the file is not written; 50 kernels take some 5 MB.
const MOST_BYTES: usize = 256 << 20;
/// Tuned choices above which all of them are forgotten: one model at one size has some hundred.
const MOST_CHOICES: usize = 8192;

/// The folder of one adapter and driver, and what was found in it.
pub(super) struct Cache {
    folder: PathBuf,
    pub pipelines: Option<wgpu::PipelineCache>,
    /// The pipelines' bytes as they are on disk.
    stored: Mutex<Vec<u8>>,
    /// How many were compiled when that was last looked at: asking the driver for all of them takes milliseconds.
    compiled: Mutex<usize>,
}

/// The file of the tuned choices.
#[derive(serde::Serialize, serde::Deserialize)]
struct Choices {
    /// Whose kernels were measured: another version's are others.
    scumble: String,
    choices: BTreeMap<String, String>,
}

impl Cache {
    /// The cache in `dir` of a device; nothing is created before there is something to keep.
    #[allow(unsafe_code)]
    pub fn open(dir: &Path, caps: &Caps, device: &wgpu::Device) -> Cache {
        let folder = dir.join(folder_name(caps));
        let stored = std::fs::read(folder.join("pipelines.bin")).unwrap_or_default();
        let pipelines = device.features().contains(wgpu::Features::PIPELINE_CACHE).then(|| {
            let data = (!stored.is_empty()).then_some(&stored[..]);
            let descriptor = wgpu::PipelineCacheDescriptor { label: Some("scumble"), data, fallback: true };
            // SAFETY: the bytes must come from `get_data` of the same adapter and driver. The folder is named after both, the
            // file is written whole or not at all, and wgpu and the driver check the header and begin anew if it is another's.
            unsafe { device.create_pipeline_cache(&descriptor) }
        });
        Cache { folder, pipelines, stored: Mutex::new(stored), compiled: Mutex::default() }
    }

    /// Keep the pipelines compiled so far, `compiled` of them.
    ///
    /// # Errors
    /// [`Error::File`] if the folder cannot be written.
    pub fn save_pipelines(&self, compiled: usize) -> Result<()> {
        if std::mem::replace(&mut *lock(&self.compiled), compiled) == compiled {
            return Ok(());
        }
        let Some(data) = self.pipelines.as_ref().and_then(wgpu::PipelineCache::get_data) else { return Ok(()) };
        let mut stored = lock(&self.stored);
        if data == *stored || data.len() > MOST_BYTES {
            return Ok(());
        }
        self.write("pipelines.bin", &data)?;
        *stored = data;
        Ok(())
    }

    /// What tuning chose before, by what was asked; nothing if there is no readable file of this version.
    pub fn choices(&self) -> BTreeMap<String, String> {
        let text = std::fs::read(self.folder.join("tuning.json")).unwrap_or_default();
        match serde_json::from_slice::<Choices>(&text) {
            Ok(found) if found.scumble == env!("CARGO_PKG_VERSION") && found.choices.len() <= MOST_CHOICES => {
                found.choices
            }
            _ => BTreeMap::new(),
        }
    }

    /// Keep what tuning chose.
    ///
    /// # Errors
    /// [`Error::File`] if the folder cannot be written.
    pub fn save_choices(&self, choices: &mut BTreeMap<String, String>) -> Result<()> {
        if choices.len() > MOST_CHOICES {
            choices.clear();
        }
        let file = Choices { scumble: env!("CARGO_PKG_VERSION").into(), choices: choices.clone() };
        let text = match serde_json::to_vec_pretty(&file) {
            Ok(text) => text,
            Err(e) => unreachable!("strings are JSON: {e}"),
        };
        self.write("tuning.json", &text)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        std::fs::create_dir_all(&self.folder).and_then(|()| replace(&path, bytes)).map_err(|e| {
            let hint = "choose another --cache-dir, or keep nothing with --no-cache";
            Error::file(&path, format!("cannot be written: {}", io_problem(&e)), hint)
        })
    }
}

/// Adapter, backend and driver as a file name.
fn folder_name(caps: &Caps) -> String {
    let words = format!("{} {} {}", caps.name, caps.backend, caps.driver).to_lowercase();
    let plain = words.split(|c: char| !c.is_ascii_alphanumeric() && c != '.').filter(|word| !word.is_empty());
    plain.collect::<Vec<_>>().join("-").chars().take(160).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::gpu::noop::NoopProfile;

    fn cache(dir: &Path) -> Cache {
        let gpu = pollster::block_on(Gpu::noop(&NoopProfile::H200)).expect("noop");
        Cache::open(dir, gpu.caps(), &gpu.inner.device)
    }

    #[test]
    fn choices_are_kept_and_what_is_damaged_is_ignored() {
        let dir = tempfile::tempdir().expect("a folder");
        let of = |dir: &Path| cache(dir).choices();
        assert!(of(dir.path()).is_empty());
        let mut choices = BTreeMap::from([("matmul f16 8x8x8".to_owned(), "tile".to_owned())]);
        cache(dir.path()).save_choices(&mut choices).expect("written");
        assert_eq!(of(dir.path()), choices);
        let file = cache(dir.path()).folder.join("tuning.json");
        let text = std::fs::read_to_string(&file).expect("there");
        for damaged in ["", "{", "[]", &text[..text.len() / 2], &text.replace(env!("CARGO_PKG_VERSION"), "0.0.0")] {
            std::fs::write(&file, damaged).expect("written");
            assert!(of(dir.path()).is_empty(), "{damaged:?}");
        }
        let mut many = (0..=MOST_CHOICES).map(|i| (i.to_string(), "tile".to_owned())).collect();
        cache(dir.path()).save_choices(&mut many).expect("written");
        assert!(of(dir.path()).is_empty());
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("a file");
        std::fs::write(&file, b"").expect("written");
        let error = cache(&file).save_choices(&mut BTreeMap::new()).expect_err("a file is no folder").to_string();
        assert!(error.contains("cannot be written") && error.contains("--cache-dir"), "{error}");
    }

    #[test]
    fn folders_are_plain_names() {
        let gpu = pollster::block_on(Gpu::noop(&NoopProfile::H200)).expect("noop");
        let caps =
            Caps { name: "NVIDIA H200/..\\ (TM)".into(), driver: "NVIDIA 580.159.03".into(), ..gpu.caps().clone() };
        assert_eq!(folder_name(&caps), "nvidia-h200-..-tm-noop-nvidia-580.159.03");
    }
}
