//! The progress bar, and Ctrl-C.

use std::ops::ControlFlow;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use scumble::Progress;

static STOP: AtomicBool = AtomicBool::new(false);

/// From now on the first Ctrl-C cancels between two steps, and the second ends the program at once.
fn catch_interrupt() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        // Without a handler Ctrl-C ends the program as ever: no file is half-written in either case.
        let _ = ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        });
    });
}

/// A bar on stderr: steps, steps a second, time left.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar with a label in front.
    pub fn new(label: &str) -> Bar {
        catch_interrupt();
        let style =
            ProgressStyle::with_template("{prefix:>12} {bar:30} {pos}/{len} steps  {per_sec}  ETA {eta}  {msg}");
        let bar = ProgressBar::new(0).with_prefix(label.to_owned()).with_message("loading");
        if let Ok(style) = style {
            let rate = |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = write!(out, "{:.2} it/s", state.per_sec());
            };
            bar.set_style(style.with_key("per_sec", rate).progress_chars("=> "));
        }
        Bar(bar)
    }

    /// What the pipeline reports to.
    pub fn observe(&self) -> impl FnMut(Progress) -> ControlFlow<()> {
        let bar = self.0.clone();
        move |progress| {
            match progress {
                Progress::Tuned { done, trials } => {
                    bar.set_length(trials as u64);
                    bar.set_position(done as u64);
                    bar.set_message("measuring kernels");
                }
                Progress::Start { steps } => {
                    bar.set_position(0);
                    bar.set_length(steps as u64);
                    bar.reset_elapsed();
                    bar.reset_eta();
                    bar.set_message("sampling");
                }
                Progress::Step { done, steps } => {
                    bar.set_position(done as u64);
                    if done == steps {
                        bar.set_message("decoding");
                    }
                }
                Progress::Decoded { .. } => bar.set_message("done"),
            }
            if STOP.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.abandon();
    }
}
