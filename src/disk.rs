//! Files that are written whole or not at all, and what the system says of a file in words.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Write a file whole or not at all: under another name beside it, then renamed. An older file of that name is as it was until
/// then. A link stays a link, and what is no file (`/dev/stdout`, a named pipe) is written to as it is.
///
/// # Errors
/// [`Error::File`] if `path` is a folder or has no name, if its folder is missing or closed to us, or the disk is full. Nothing is
/// left behind.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let fail = |problem: String| Error::file(path, problem, "choose another output with -o");
    if path.is_dir() {
        return Err(fail("this is a folder, expected a file name".into()));
    }
    if path.file_name().is_none() {
        return Err(fail("expected a file name, found none".into()));
    }
    let written = match std::fs::metadata(path) {
        // Renaming over a device would replace it by a file, for everyone.
        Ok(found) if !found.is_file() => File::options().write(true).open(path).and_then(|mut f| f.write_all(bytes)),
        Ok(_) => path.canonicalize().and_then(|target| replace(&target, bytes)),
        Err(_) => replace(path, bytes),
    };
    written.map_err(|e| match e.kind() {
        ErrorKind::NotFound => fail("cannot be written: its folder does not exist".into()),
        ErrorKind::NotADirectory => fail("cannot be written: what should be its folder is a file".into()),
        _ => fail(format!("cannot be written: {}", io_problem(&e))),
    })
}

/// Write a new file beside `path`, then give it that name.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let (mut file, beside) = create_beside(path)?;
    let written = file.write_all(bytes);
    // Windows renames no open file.
    drop(file);
    written.and_then(|()| std::fs::rename(&beside, path)).inspect_err(|_| {
        let _ = std::fs::remove_file(&beside);
    })
}

/// A file in the same folder that was not there: other threads and processes, and what a killed one left, keep theirs.
fn create_beside(path: &Path) -> std::io::Result<(File, PathBuf)> {
    let mut number = 0;
    loop {
        // Not with the file's own name in it, which may be as long as a name can be.
        let beside = path.with_file_name(format!(".scumble-{number}.part"));
        match File::create_new(&beside) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
            file => return Ok((file?, beside)),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_or_not_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(format!("{}.png", "a".repeat(251)));
        // What a killed run left is neither used nor removed.
        std::fs::write(folder.path().join(".scumble-0.part"), b"left").expect("written");
        write_atomic(&path, b"one").expect("written");
        write_atomic(&path, b"two").expect("written again");
        assert_eq!(std::fs::read(&path).expect("there"), b"two");
        for (bad, expected) in [
            (folder.path().join("no/such/a.png"), "its folder does not exist"),
            (path.join("a.png"), "cannot be written"),
            (folder.path().to_owned(), "this is a folder"),
            (PathBuf::new(), "expected a file name"),
            (folder.path().join("b".repeat(300)), "cannot be written"),
        ] {
            let error = write_atomic(&bad, b"x").expect_err(expected).to_string();
            assert!(error.contains(expected) && error.contains("choose another output"), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 2, "no partial file is left");
    }

    #[test]
    #[cfg(unix)]
    fn a_link_stays_a_link_and_what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let [path, link, socket] = ["a.png", "link.png", "socket"].map(|name| folder.path().join(name));
        std::fs::write(&path, b"old").expect("written");
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        write_atomic(&link, b"new").expect("written");
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&path).expect("there"), b"new");
        // A socket stands for every device: it cannot be written, and must still be there.
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
        assert!(write_atomic(&socket, b"new").is_err() && !socket.is_file());
    }

    #[test]
    fn threads_that_write_one_file_leave_one_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.png");
        std::thread::scope(|scope| {
            for n in 0..8u8 {
                let path = &path;
                scope.spawn(move || write_atomic(path, &vec![n; 100_000]).expect("written"));
            }
        });
        let bytes = std::fs::read(&path).expect("there");
        assert!(bytes.len() == 100_000 && bytes.iter().all(|&b| b == bytes[0]));
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1);
    }
}
