//! `cargo bench --bench ops [FILTER]`: the ops of the models that cost most, by device time. Each is checked before it is timed;
//! `scumble bench --kernels` has all of them, and the device's limits.

use std::cell::OnceCell;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pollster::block_on;
use scumble::bench::op::{Op, Types};
use scumble::bench::shapes::{Case, networks};
use scumble::gpu::{Gpu, GpuOptions};

/// Ops of a network.
const HEAVIEST: usize = 10;
/// Floating-point operations of an op above which a software device is not asked.
const SMALL: u64 = 1 << 30;

fn ops(c: &mut Criterion) {
    let options = GpuOptions { device: std::env::var("SCUMBLE_DEVICE").ok(), ..Default::default() };
    let gpu = block_on(Gpu::open(&options)).expect("a GPU or a software device (lavapipe)");
    for network in networks() {
        let mut group = c.benchmark_group(network.name);
        group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
        let most = if gpu.caps().is_cpu() { SMALL } else { u64::MAX };
        let fits = |case: &Case| case.elements(network.batch)[0] * 4 <= gpu.caps().max_binding;
        let mut cases: Vec<_> =
            network.cases.into_iter().filter(|(case, _)| case.flops() <= most && fits(case)).collect();
        cases.sort_by_key(|(case, count)| std::cmp::Reverse(case.flops() * u64::from(*count)));
        for (case, _) in cases.into_iter().take(HEAVIEST) {
            let types = Types::of(&gpu, network.name == "vae");
            group.throughput(Throughput::Elements(case.flops() * u64::from(network.batch)));
            // Made when criterion's filter lets it run.
            let checked = OnceCell::new();
            let make = || {
                let op = block_on(Op::new(&gpu, case, network.batch, types)).expect("an op that fits the device");
                let [error, limit] = block_on(op.error(48)).expect("a result");
                assert!(error <= limit, "{}: relative error {error:.1e}", case.name());
                op
            };
            group.bench_function(case.name(), |b| {
                let op = checked.get_or_init(make);
                b.iter_custom(|times| {
                    Duration::from_secs_f64(block_on(op.time(times as usize)).expect("a time") / 1e3)
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, ops);
criterion_main!(benches);
