//! The one error type: what went wrong, what was expected, what was found, and what to do about it, in one line.

use std::path::PathBuf;

/// Anything that a file, a prompt, a number, or a device can do wrong. `Display` gives one clear line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that the user gave is out of its range or not in its list.
    #[error("{what}: expected {expected}, found {found}")]
    Invalid {
        /// The name of the option or field.
        what: String,
        /// What is accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A file is missing, unreadable, damaged, or not of the kind it should be.
    #[error("{}: {problem}; {hint}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A tensor that the network needs is not in the file.
    #[error("{}: tensor {name} is missing, expected shape {expected:?}; is this the right kind of model?", path.display())]
    MissingTensor {
        /// The file that was searched.
        path: PathBuf,
        /// The tensor's canonical (diffusers) name.
        name: String,
        /// The shape that the config asks for.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the config asks for.
    #[error("{}: tensor {name} has the wrong shape: expected {expected:?}, found {found:?}; the weights and config.json do not belong together", path.display())]
    MisshapenTensor {
        /// The file that holds it.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// The shape that the config asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A config asks for something that scumble does not run.
    #[error("{}: {what} is not supported: expected {expected}, found {found}", path.display())]
    Unsupported {
        /// The config file.
        path: PathBuf,
        /// The config key.
        what: String,
        /// What is supported.
        expected: String,
        /// What the config says.
        found: String,
    },
    /// No GPU, and no software device either.
    #[error("{0}")]
    NoAdapter(String),
    /// The work does not fit the device; known before anything is allocated.
    #[error("{what} does not fit {device}: needs {needed} bytes, available {available}; {hint}")]
    DoesNotFit {
        /// The picture or tensor.
        what: String,
        /// The device's name.
        device: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes that the device offers.
        available: u64,
        /// What to do.
        hint: String,
    },
    /// The device ran out of memory although the plan said that it would fit.
    #[error(
        "{device} ran out of memory allocating {needed} bytes for {what}; close other programs that use it, or ask for a smaller picture or batch"
    )]
    OutOfMemory {
        /// What was being created.
        what: String,
        /// The device's name.
        device: String,
        /// Bytes asked for.
        needed: u64,
    },
    /// The device went away (driver reset, unplugged, out of memory).
    #[error(
        "the device {device} was lost: {reason}; nothing was written: run again, with a smaller picture if it happens again"
    )]
    DeviceLost {
        /// The device's name.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// The device refused a kernel or a dispatch; this is a bug in scumble or in the driver.
    #[error("{device} refused {what}: {reason}; please report this, and try `--variant OP=portable`")]
    Device {
        /// The device's name.
        device: String,
        /// The kernel (with file and line) or dispatch.
        what: String,
        /// What wgpu said.
        reason: String,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// `Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A value out of range: `what` should be `expected` but is `found`.
    pub fn invalid(what: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        Error::Invalid { what: what.into(), expected: expected.into(), found: found.to_string() }
    }

    /// A file with a problem, and what to do about it.
    pub fn file(path: impl Into<PathBuf>, problem: impl ToString, hint: impl Into<String>) -> Self {
        Error::File { path: path.into(), problem: problem.to_string(), hint: hint.into() }
    }
}
