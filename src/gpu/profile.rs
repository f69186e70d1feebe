//! What a timed recording found: device time by op, variant and shape.

use std::collections::HashMap;

/// Device time by op, variant and shape.
#[derive(Default)]
pub struct Profile {
    rows: HashMap<(&'static str, &'static str, String), ProfileRow>,
}

/// One row of the per-op table.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ProfileRow {
    /// The operation.
    pub op: &'static str,
    /// The variant that ran.
    pub variant: &'static str,
    /// Shapes read and written.
    pub shapes: String,
    /// Dispatches.
    pub count: u64,
    /// Milliseconds on the device, together.
    pub ms: f64,
    /// Floating-point operations, together.
    pub flops: u64,
}

impl Profile {
    pub(super) fn add(&mut self, op: &'static str, variant: &'static str, shapes: String, ms: f64, flops: u64) {
        let row = self.rows.entry((op, variant, shapes.clone()));
        let row = row.or_insert(ProfileRow { op, variant, shapes, count: 0, ms: 0.0, flops: 0 });
        row.count += 1;
        row.ms += ms;
        row.flops += flops;
    }

    /// The rows, the slowest first.
    pub fn rows(&self) -> Vec<ProfileRow> {
        let mut rows: Vec<ProfileRow> = self.rows.values().cloned().collect();
        rows.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        rows
    }
}
