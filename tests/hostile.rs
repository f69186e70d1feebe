//! Rung 4: headers made to break a reader, and everything that fuzzing found, are errors in no time.

#[allow(dead_code)] // Fuzzing also takes the second table of an input.
#[path = "../fuzz/fuzz_targets/table.rs"]
mod table;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use scumble::Checkpoint;
use scumble::files::{Bytes, Files};
use scumble::weights::Weights;

fn message<T>(result: scumble::Result<T>) -> String {
    match result {
        Ok(_) => "no error".into(),
        Err(error) => error.to_string(),
    }
}

/// A header and data, by hand.
fn raw(at: &Path, header: &[u8], length: u64, data: usize) -> PathBuf {
    let path = at.join("hostile.safetensors");
    std::fs::write(&path, [&length.to_le_bytes()[..], header, &vec![0; data]].concat()).expect("written");
    path
}

#[test]
fn hostile_headers_are_errors_in_no_time() {
    let at = tempfile::tempdir().expect("a folder");
    let header = |text: &str, data: usize| raw(at.path(), text.as_bytes(), text.len() as u64, data);
    let check = |path: PathBuf, words: &str| {
        let since = Instant::now();
        let error = message(Files::open(&path).and_then(|files| Checkpoint::open(&files.into())));
        assert!(error.contains(words) && error.contains("hostile.safetensors"), "{words}: {error}");
        assert!(error.lines().count() == 1 && error.len() < 600, "{error}");
        assert!(since.elapsed() < Duration::from_secs(1), "{words}: {:?}", since.elapsed());
    };
    let empty = at.path().join("hostile.safetensors");
    std::fs::write(&empty, b"").expect("written");
    check(empty.clone(), "at least 8 bytes");
    std::fs::write(&empty, [1, 2, 3, 4, 5, 6, 7]).expect("written");
    check(empty, "at least 8 bytes");
    check(raw(at.path(), b"{}", 1000, 0), "truncated or damaged");
    check(raw(at.path(), b"{}", u64::MAX, 0), "its header would have");
    check(raw(at.path(), b"{}", 2u64.swap_bytes(), 0), "wrong byte order");
    check(raw(at.path(), &vec![b' '; 40 << 20], 40 << 20, 0), "its header would have");
    check(header("[1, 2]", 0), "not a safetensors file");
    check(header("{\"a\"", 0), "not a safetensors file");
    let one =
        |shape: &str, offsets: &str| format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":{offsets}}}");
    let two = |a: String, b: String| format!("{{\"a\":{a},\"b\":{b}}}");
    check(header(&two(one("[2]", "[0,8]"), one("[2]", "[4,12]")), 12), "offsets of tensor");
    check(header(&two(one("[2]", "[0,8]"), one("[2]", "[8,9999]")), 16), "damaged");
    check(header(&format!("{{\"a\":{}}}", one("[2]", "[8,0]")), 8), "damaged");
    check(header(&format!("{{\"a\":{}}}", one("[1099511627776,1099511627776]", "[0,8]")), 8), "damaged");
    check(header(&format!("{{\"a\":{}}}", one("[4294967296,4294967296,0]", "[0,0]")), 0), "");
    check(header(&format!("{{\"a\":{0},\"a\":{0}}}", one("[2]", "[0,8]")), 8), "two tensors named a");
    check(header(&format!("{{\"a\":{}}}", one("[-1]", "[0,8]")), 8), "not a safetensors file");
}

/// The seeds and finds of `fuzz/`, among them what once panicked, overflowed or took seconds.
#[test]
fn the_fuzzing_corpus_is_read_or_refused() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/checkpoint");
    let mut opened = 0;
    for entry in std::fs::read_dir(corpus).expect("a folder") {
        let path = entry.expect("an entry").path();
        let since = Instant::now();
        let (file, _) = table::files(&std::fs::read(&path).expect("a file"));
        let model = Weights::new(path.clone(), Bytes::Owned(file)).and_then(Checkpoint::of_weights);
        opened += usize::from(model.is_ok_and(|model| model.texts().is_ok() && model.vae().is_ok()));
        assert!(since.elapsed() < Duration::from_secs(2), "{}: {:?}", path.display(), since.elapsed());
    }
    assert!(opened > 0, "the corpus holds whole models too");
}
