//! The embeddings that prompts may name: given, or in a folder of safetensors files.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Embedding, shown};
use crate::error::{Error, Result};
use crate::files::Bytes;
use crate::weights::Weights;

/// Files larger than this are models, not embeddings: SDXL's of 75 vectors takes 600 KB.
const MAX_BYTES: u64 = 64 << 20;

/// Files that Python's pickle wrote, which may hold any program.
const PICKLES: [&str; 4] = ["pt", "bin", "ckpt", "pth"];

/// Names that a message lists.
const LISTED: usize = 20;

/// The embeddings that prompts may name.
#[derive(Debug, Default)]
pub struct Embeddings {
    folder: Option<PathBuf>,
    /// Those given, and those read so far.
    known: Mutex<BTreeMap<String, Arc<Embedding>>>,
}

impl Embeddings {
    /// No embeddings.
    pub fn none() -> Embeddings {
        Embeddings::default()
    }

    /// The `.safetensors` files in a folder and its subfolders, each read when a prompt first names it, and kept.
    pub fn folder(path: impl Into<PathBuf>) -> Embeddings {
        Embeddings { folder: Some(path.into()), known: Mutex::default() }
    }

    /// One more, before any of the same name in the folder.
    pub fn insert(&mut self, name: impl Into<String>, embedding: Embedding) {
        let known = self.known.get_mut().unwrap_or_else(PoisonError::into_inner);
        known.insert(name.into(), Arc::new(embedding));
    }

    /// The embedding of a name: the file `name`, or `name.safetensors`; `sub/name` is in a subfolder.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none, with those that are there, or if the name leads out of the folder;
    /// [`Error::File`] if its file is no embedding, or a pickle.
    pub fn get(&self, name: &str) -> Result<Arc<Embedding>> {
        let stem = name.strip_suffix(".safetensors").unwrap_or(name);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedding) = known.get(name).or_else(|| known.get(stem)) {
            return Ok(Arc::clone(embedding));
        }
        // Files are read without the lock: others need not wait for a slow disk.
        drop(known);
        let Some(path) = self.find(name)? else {
            return Err(self.unknown(name));
        };
        let embedding = Arc::new(Embedding::new(name, &open(&path)?)?);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(known.entry(name.to_owned()).or_insert(embedding)))
    }

    /// The names that a prompt may use, as far as they can be read: those given and the folder's.
    pub fn names(&self) -> Vec<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<String> = known.keys().cloned().collect();
        drop(known);
        if let Some(folder) = &self.folder {
            let files = walk(folder).into_iter().filter(|file| has_extension(file, &["safetensors"]));
            let within = files.filter_map(|file| Some(file.with_extension("").strip_prefix(folder).ok()?.to_owned()));
            // As in a prompt, on every system.
            names.extend(within.filter_map(|file| {
                let parts: Option<Vec<&str>> = file.iter().map(|part| part.to_str()).collect();
                Some(parts?.join("/"))
            }));
        }
        // A name ends at a space or comma.
        names.retain(|name| !name.contains(|c: char| c.is_whitespace() || c == ','));
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The file of a name.
    fn find(&self, name: &str) -> Result<Option<PathBuf>> {
        let Some(folder) = &self.folder else { return Ok(None) };
        // A link out of the folder is its owner's wish; `..` and `/` are a stranger's.
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            let expected = format!("a name within {}", folder.display());
            return Err(Error::invalid(format!("embedding {}", shown(name)), expected, "a path that leads out of it"));
        }
        let file = |ending: &str| Some(folder.join(format!("{name}{ending}"))).filter(|path| path.is_file());
        if let Some(path) = file("").or_else(|| file(".safetensors")) {
            return if has_extension(&path, &PICKLES) { Err(pickle(&path)) } else { Ok(Some(path)) };
        }
        match PICKLES.iter().find_map(|ending| file(&format!(".{ending}"))) {
            Some(path) => Err(pickle(&path)),
            None => Ok(None),
        }
    }

    fn unknown(&self, name: &str) -> Error {
        let names = self.names();
        let mut listed = names.iter().take(LISTED).map(|name| shown(name)).collect::<Vec<_>>().join(", ");
        if names.len() > LISTED {
            listed += &format!(" or {} others", names.len() - LISTED);
        }
        let expected = match (&self.folder, names.is_empty()) {
            (Some(folder), true) => format!("a .safetensors file in {}, which has none", folder.display()),
            (Some(folder), false) => format!("one of those in {}: {listed}", folder.display()),
            (None, true) => "a folder of embeddings to look in".to_owned(),
            (None, false) => format!("one of {listed}"),
        };
        Error::invalid(format!("embedding {}", shown(name)), expected, "none of this name")
    }
}

fn has_extension(path: &Path, endings: &[&str]) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| endings.iter().any(|ending| extension.eq_ignore_ascii_case(ending)))
}

/// Files below a folder: not all of an endless tree, and no further than links in a circle lead.
fn walk(folder: &Path) -> Vec<PathBuf> {
    let (mut files, mut folders, mut seen) = (Vec::new(), vec![(folder.to_owned(), 0)], 0);
    while let Some((folder, depth)) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            seen += 1;
            let path = entry.path();
            if seen > 10_000 {
                return files;
            } else if path.is_file() {
                files.push(path);
            } else if depth < 4 && path.is_dir() {
                folders.push((path, depth + 1));
            }
        }
    }
    files
}

fn open(path: &Path) -> Result<Weights> {
    let size = std::fs::metadata(path).map_err(|e| unreadable(path, &e))?.len();
    if size > MAX_BYTES {
        let problem = format!("no embedding: it has {size} bytes, expected at most {MAX_BYTES}");
        return Err(Error::file(path, problem, "give a textual inversion"));
    }
    let bytes = std::fs::read(path).map_err(|e| unreadable(path, &e))?;
    Weights::new(path.to_owned(), Bytes::Owned(bytes))
}

fn unreadable(path: &Path, e: &std::io::Error) -> Error {
    Error::file(path, format!("cannot be read: {e}"), "check the embedding's file")
}

fn pickle(path: &Path) -> Error {
    let hint = "if you trust it, convert it in Python: import torch, safetensors.torch as s; \
                d = torch.load(\"NAME.pt\", weights_only=True); t = next(iter(d.get(\"string_to_param\", d).values())); \
                s.save_file({\"emb_params\": t.detach().contiguous()}, \"NAME.safetensors\")";
    Error::file(path, "a pickle, which can run any program when it is read; only .safetensors is read", hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::embedding::tests::file;

    /// A file of one vector, four wide.
    fn small() -> Vec<u8> {
        file(&[("emb_params", "F32", &[4], vec![0; 16])])
    }

    #[test]
    fn a_folders_files_are_found_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, bytes).expect(name);
        };
        write("fox.safetensors", &small());
        write("sub/pine v1.5.safetensors", &small());
        write("sub/pine-v1.5.safetensors", &small());
        write("bare", &small());
        write("old.pt", b"PK");
        write("torn.safetensors", &small()[..20]);
        write("text.safetensors", b"<!DOCTYPE html>");
        let mut all = Embeddings::folder(folder.path());
        all.insert("mine", Embedding::of("mine", 3, &[4]));
        assert_eq!(all.names(), ["fox", "mine", "sub/pine-v1.5", "text", "torn"]);
        for (name, rows) in [
            ("fox", 1),
            ("fox.safetensors", 1),
            ("sub/pine-v1.5", 1),
            ("bare", 1),
            ("mine", 3),
            ("mine.safetensors", 3),
        ] {
            assert_eq!(all.get(name).expect(name).rows(), rows, "{name}");
        }
        // Read once.
        assert!(Arc::ptr_eq(&all.get("fox").expect("fox"), &all.get("fox").expect("fox")));
        let no = |name: &str, expected: &str| {
            let error = all.get(name).expect_err(name).to_string();
            assert!(error.contains(expected), "{name}: {error}");
        };
        let there = format!("expected one of those in {}: bare, fox, mine, ", folder.path().display());
        no("foxes", &there);
        no("foxes", "found none of this name");
        no("sub", &there);
        no("a\0b", &there);
        no(&"x".repeat(1_000_000), &there);
        assert!(all.get(&"x".repeat(1_000_000)).expect_err("long").to_string().len() < 400);
        for name in ["../fox", "sub/../../fox", "/etc/passwd", "..", "./fox", "/"] {
            no(name, "found a path that leads out of it");
        }
        for name in ["old", "old.pt"] {
            no(name, "old.pt: a pickle, which can run any program");
        }
        no("torn", "torn.safetensors: ");
        no("text", "text.safetensors: ");
    }

    #[test]
    fn a_message_lists_twenty_names() {
        let mut all = Embeddings::none();
        let error = all.get("fox").expect_err("none").to_string();
        assert_eq!(error, "embedding fox: expected a folder of embeddings to look in, found none of this name");
        for i in 10..35 {
            all.insert(format!("e{i}"), Embedding::of("e", 1, &[4]));
        }
        let error = all.get("fox\n").expect_err("none").to_string();
        assert!(
            error.starts_with("embedding fox\\n: expected one of e10, e11, ") && error.contains("e29 or 5 others"),
            "{error}"
        );
        let none = Embeddings::folder("no/such/folder").get("fox").expect_err("none").to_string();
        assert!(none.contains("expected a .safetensors file in no/such/folder, which has none"), "{none}");
    }
}
