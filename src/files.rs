//! A model's files: a diffusers folder, one file, or the program's own memory; mapped, never copied.

use std::path::{Path, PathBuf};

use crate::disk::io_problem;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// Where a model's files are.
#[derive(Clone, Debug)]
pub enum Files {
    /// A diffusers folder.
    Folder(PathBuf),
    /// One .safetensors file in the layout of the original checkpoints.
    Single(PathBuf),
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
    /// [`Error::File`] if it is neither a file nor a folder with a model_index.json, or a pickle.
    pub fn open(path: &Path) -> Result<Files> {
        let hint = "give a .safetensors file or a diffusers folder (with model_index.json), or leave -m out for the embedded model";
        if !path.exists() {
            return Err(Error::file(path, "no such file or folder", hint));
        }
        if !path.is_dir() {
            refuse_pickle(path)?;
            return Ok(Files::Single(path.to_owned()));
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
            Files::Single(file) => file.clone(),
            Files::Embedded(_) => Path::new("(embedded)").join(name),
        }
    }

    /// Is the file there?
    pub fn has(&self, name: &str) -> bool {
        match self {
            Files::Folder(folder) => folder.join(name).is_file(),
            Files::Single(_) => false,
            Files::Embedded(files) => files.iter().any(|(path, _)| *path == name),
        }
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing or unreadable.
    pub fn read(&self, name: &str) -> Result<Bytes> {
        let path = self.path(name);
        match self {
            Files::Folder(_) | Files::Single(_) => map(&path),
            Files::Embedded(files) => match files.iter().find(|(path, _)| *path == name) {
                Some((_, bytes)) => Ok(Bytes::Static(bytes)),
                None => Err(Error::file(path, "no such file", INCOMPLETE)),
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

    /// The weights of a part of a diffusers folder: `FOLDER/STEM.safetensors`, its fp16 variant, or shards with an index.
    ///
    /// # Errors
    /// [`Error::File`] if none is there, or a file is damaged.
    pub fn part(&self, folder: &str, stem: &str) -> Result<Weights> {
        let name = |end: &str| format!("{folder}/{stem}{end}");
        for end in [".safetensors", ".fp16.safetensors"] {
            if self.has(&name(end)) {
                return Weights::new(self.path(&name(end)), self.read(&name(end))?);
            }
        }
        for end in [".safetensors.index.json", ".safetensors.index.fp16.json", ".fp16.safetensors.index.json"] {
            if self.has(&name(end)) {
                return self.shards(folder, &name(end));
            }
        }
        for end in [".bin", ".fp16.bin"] {
            if self.has(&name(end)) {
                refuse_pickle(&self.path(&name(end)))?;
            }
        }
        let path = self.path(&name(".safetensors"));
        Err(Error::file(path, "no such file", INCOMPLETE))
    }

    /// The shards that an index names.
    fn shards(&self, folder: &str, index: &str) -> Result<Weights> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: std::collections::BTreeMap<String, String>,
        }
        let index_file: Index = self.json(index)?;
        let mut names: Vec<&String> = index_file.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        let mut shards = Vec::new();
        for shard in names {
            // An index from elsewhere must not name files outside the folder.
            if Path::new(shard).components().count() != 1 || shard.contains(['/', '\\']) || shard == ".." {
                let problem = format!("names the shard {shard:?}, expected a file of the same folder");
                return Err(Error::file(self.path(index), problem, "fetch the model again"));
            }
            let name = format!("{folder}/{shard}");
            shards.push(Weights::new(self.path(&name), self.read(&name)?)?);
        }
        Weights::joined(self.path(index), shards)
    }
}

const INCOMPLETE: &str = "is the model folder complete?";

/// Pickles (.ckpt, .pt, .bin) can run any program when they are opened: refused by name and by content.
///
/// # Errors
/// [`Error::File`] with the way to convert, if the file is a pickle.
pub fn refuse_pickle(path: &Path) -> Result<()> {
    let named =
        path.extension().is_some_and(|e| ["ckpt", "pt", "pth", "bin"].iter().any(|p| e.eq_ignore_ascii_case(p)));
    let mut start = [0u8; 2];
    let read = std::fs::File::open(path).and_then(|mut file| std::io::Read::read(&mut file, &mut start));
    // torch.save writes a zip archive; before PyTorch 1.6 a bare pickle.
    let zip = matches!(read, Ok(2)) && (start == *b"PK" || start == [0x80, 0x02]);
    if named || zip {
        return Err(Error::file(
            path,
            "this is a pickle, which can run any program when it is opened, so it is not read",
            "convert it in a sandbox: python -c \"import torch, safetensors.torch as s; m = torch.load('MODEL.ckpt', \
             weights_only=True); m = m.get('state_dict', m); s.save_file({k: v.contiguous() for k, v in m.items() if \
             hasattr(v, 'shape')}, 'MODEL.safetensors')\"",
        ));
    }
    Ok(())
}

/// Map a file for reading.
///
/// # Errors
/// [`Error::File`] if it is missing or unreadable.
#[allow(unsafe_code)]
pub fn map(path: &Path) -> Result<Bytes> {
    let problem = |e: std::io::Error| Error::file(path, io_problem(&e), "is the path right, and the model complete?");
    let file = std::fs::File::open(path).map_err(problem)?;
    let about = file.metadata().map_err(problem)?;
    if about.is_dir() {
        return Err(Error::file(path, "this is a folder, expected a file", "give the .safetensors file itself"));
    }
    if about.len() == 0 {
        return Ok(Bytes::Static(&[]));
    }
    // SAFETY: the map is read-only and private to us. If another program truncates the file meanwhile, reads fault; every
    // runtime that maps weights accepts that, since a copy of a checkpoint would double its memory.
    Ok(Bytes::Mapped(unsafe { memmap2::Mmap::map(&file) }.map_err(problem)?))
}
