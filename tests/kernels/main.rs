//! Rung 3: every op, in every variant and element type that this device runs, against a plain f64 reference.
//!
//! The device is the best one of this machine, or the one that SCUMBLE_DEVICE names. SCUMBLE_MEASURE=1 prints what every
//! comparison measured. See tests/README.md.

mod compare;
mod harness;
mod values;

mod attention;
mod blend;
mod chain;
mod conv2d;
mod cross;
mod degrade;
mod epilogue;
mod fma;
mod group_norm;
mod guidance;
mod layer_norm;
mod levels;
mod lincomb;
mod mass;
mod matmul;
mod narrow;
mod pack;
mod repack;
mod repeat;
mod row_sums;
mod take;
mod time_embedding;
mod touch;
mod tune;
mod winograd;
