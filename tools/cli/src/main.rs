//! The scumble command: a face over the library's public API. It blocks, prints, and turns errors into one line.

mod args;
mod bench;
mod compare;
mod generate;
mod info;
mod options;
mod pictures;
mod probe;
mod progress;
mod tensors;

use std::process::ExitCode;

use clap::Parser;
use scumble::Error;

use args::{Args, Command};

/// A line on stdout. A reader that has gone away (`| head`) is no fault of ours.
pub fn print(line: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Mesa calls it an error on stderr where no desktop has set this variable, although scumble opens no window.
#[allow(unsafe_code)]
fn quiet_mesa() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: first thing in main, no other thread is there to read the environment meanwhile.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
}

fn main() -> ExitCode {
    quiet_mesa();
    let args = match Args::try_parse_from(args::with_default_command(std::env::args_os())) {
        Ok(args) => args,
        Err(error) => return args::report(&error),
    };
    let result = match args.command {
        Command::Generate(args) => generate::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Probe(args) => probe::run(&args.part),
        Command::Bench(args) => bench::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Cancelled) => {
            eprintln!("cancelled: nothing was written");
            // As a shell reports a program that SIGINT ended.
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {}", error.to_string().replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}
