//! Every heavy op at every shape of the models: checked against the definition, timed, and held against the device's limits.

use std::ops::ControlFlow;

use web_time::Duration;

use super::Samples;
use super::limits::{Limits, measure, samples, warm_up};
use super::op::{Op, Types};
use super::shapes::{Case, networks};
use crate::error::{Error, Result};
use crate::gpu::Gpu;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Names of [`networks`]; empty: all.
    pub shapes: Vec<String>,
    /// Only cases whose name holds this.
    pub filter: String,
    /// Images; the network's own if `None`.
    pub batch: Option<u32>,
    /// For the samples of one op.
    pub budget: Duration,
}

/// Which limit is nearer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The best product's rate.
    Product,
    /// The copy's.
    Copy,
}

/// One op at one shape.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    /// The network.
    pub network: &'static str,
    /// The op and its size.
    pub name: String,
    /// The same in numbers.
    pub case: Case,
    /// Images.
    pub batch: u32,
    /// How often a forward runs it.
    pub count: u32,
    /// The kernels that ran.
    pub variants: Vec<&'static str>,
    /// Launches.
    pub dispatches: usize,
    /// Relative error of results drawn by chance, against f64.
    pub error: f64,
    /// Times; none where the results were wrong.
    pub times: Option<Samples>,
    /// TFLOP/s by the median, as the definition counts.
    pub tflops: f64,
    /// GB/s by the median, inputs and outputs once.
    pub gb_s: f64,
    /// The nearer limit ..
    pub bound: Bound,
    /// .. and the share of it that is reached: 1 is all.
    pub share: f64,
}

/// All rows, and the limits that they are held against.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Kernels {
    /// Measured in the same run.
    pub limits: Limits,
    /// By network, in the order of [`networks`].
    pub rows: Vec<Row>,
    /// What did not fit the device, and why.
    pub skipped: Vec<String>,
}

/// Results that are held against the definition.
const CHECKED: usize = 48;

/// Measure. `observe` hears of each row, and may break to cancel.
///
/// # Errors
/// [`Error::Invalid`] if the filter leaves nothing; [`Error::Cancelled`]; of the device. A wrong result is a row without times.
pub async fn run(gpu: &Gpu, options: &Options, observe: &mut dyn FnMut(&Row) -> ControlFlow<()>) -> Result<Kernels> {
    let all = networks();
    let known: Vec<&str> = all.iter().map(|network| network.name).collect();
    if let Some(unknown) = options.shapes.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(Error::invalid("--shapes", format!("one of [{}]", known.join(", ")), unknown));
    }
    let wanted = all
        .iter()
        .filter(|network| options.shapes.is_empty() || options.shapes.iter().any(|name| name.as_str() == network.name));
    let cases: Vec<_> = wanted
        .flat_map(|network| network.cases.iter().map(move |(case, count)| (network, *case, *count)))
        .filter(|(_, case, _)| case.name().contains(&options.filter))
        .collect();
    if cases.is_empty() {
        return Err(Error::invalid(
            "--filter",
            "a part of an op's name, like `conv 3x3` or `attention`",
            &options.filter,
        ));
    }
    let limits = measure(gpu, options.budget).await?;
    let (mut rows, mut skipped) = (Vec::new(), Vec::new());
    for (network, case, count) in cases {
        let batch = options.batch.unwrap_or(network.batch);
        let vae = network.name == "vae";
        let op = match Op::new(gpu, case, batch, Types::of(gpu, vae)).await {
            Ok(op) => op,
            Err(e @ (Error::DoesNotFit { .. } | Error::OutOfMemory { .. })) => {
                skipped.push(format!("{}: {e}", case.name()));
                continue;
            }
            Err(e) => return Err(e),
        };
        let row = one(&op, &limits, (network.name, case, count), (options.budget, warm_up(gpu))).await?;
        if observe(&row).is_break() {
            return Err(Error::Cancelled);
        }
        rows.push(row);
    }
    Ok(Kernels { limits, rows, skipped })
}

async fn one(
    op: &Op,
    limits: &Limits,
    (network, case, count): (&'static str, Case, u32),
    (budget, warm): (Duration, Duration),
) -> Result<Row> {
    let [error, most] = op.error(CHECKED).await?;
    let right = error.is_finite() && error <= most;
    let times = match right {
        true => Some(Samples::of(samples(budget, warm, &mut async |times| op.time(times).await).await?)),
        false => None,
    };
    let flops = case.flops() as f64 * f64::from(op.batch());
    let bytes = op.bytes();
    let rates = |s: &Samples| (flops / s.median_ms / 1e9, bytes / s.median_ms / 1e6);
    let (tflops, gb_s) = times.as_ref().map_or((0.0, 0.0), rates);
    let (product, copy) = (tflops / limits.product_tflops, gb_s / limits.copy_gb_s);
    let (bound, share) = if product > copy { (Bound::Product, product) } else { (Bound::Copy, copy) };
    let (variants, dispatches, batch) = (op.variants.clone(), op.dispatches, op.batch());
    let name = case.name();
    Ok(Row { network, name, case, batch, count, variants, dispatches, error, times, tflops, gb_s, bound, share })
}
