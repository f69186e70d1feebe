//! Runs a recording on this machine's device, with a variant forced, into poisoned buffers.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;

use half::f16;
use pollster::block_on;
use scumble::gpu::{Buffer, Caps, DType, DeviceKind, Gpu, GpuOptions, Graph, Program, Tensor};
use scumble::ops::{Row, tables};

use crate::values::{GUARD, Host};

/// A device with one variant of an op forced.
pub struct Place {
    pub op: &'static str,
    pub variant: &'static str,
    pub gpu: Gpu,
}

/// Tests that a driver is known to fail: (part of the adapter's name, test, variant, why). One that passes fails the run.
const EXPECTED_FAILURES: &[(&str, &str, &str, &str)] = &[];

/// Run `test` for every variant of `op` that the device can run, or once if the op has no table.
pub fn everywhere(op: &'static str, test: impl Fn(&Place)) {
    for variant in variants(op) {
        let place = Place { op, variant, gpu: gpu(variant).clone() };
        let adapter = place.gpu.caps().name.clone();
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        if !can_run(op, variant, place.gpu.caps()) {
            println!("{name}: {adapter} cannot run {op}/{variant}");
            continue;
        }
        let expected = EXPECTED_FAILURES
            .iter()
            .find(|(part, test, v, _)| adapter.contains(part) && name == *test && *v == variant);
        match (catch_unwind(AssertUnwindSafe(|| test(&place))), expected) {
            (Ok(()), None) => {}
            (Err(_), Some((.., why))) => println!("{name} on {adapter}, {variant}: failed as expected: {why}"),
            (Ok(()), Some((.., why))) => panic!("{name} on {adapter}, {variant}: passed, but should fail: {why}"),
            (Err(panic), None) => resume_unwind(panic),
        }
    }
}

/// The rows of `op`'s table; none if it has one kernel.
fn rows(op: &str) -> Vec<Row> {
    tables().into_iter().find(|(name, _)| *name == op).map_or(Vec::new(), |(_, rows)| rows)
}

fn variants(op: &str) -> Vec<&'static str> {
    match rows(op) {
        rows if rows.is_empty() => vec!["portable"],
        rows => rows.into_iter().map(|(variant, _)| variant).collect(),
    }
}

/// Which kind of device it is decides what is fast there; everything else that a row needs, it cannot do without.
fn can_run(op: &str, variant: &str, caps: &Caps) -> bool {
    let kinds = [DeviceKind::Cpu, DeviceKind::Discrete].map(|kind| Caps { kind, ..caps.clone() });
    let needs = rows(op).into_iter().find(|(name, _)| *name == variant).map(|(_, needs)| needs);
    needs.is_none_or(|needs| kinds.iter().any(needs))
}

/// The device with `variant` forced for every op that has one of this name. Opened once, with its compiled kernels.
fn gpu(variant: &str) -> &'static Gpu {
    static GPUS: OnceLock<BTreeMap<&'static str, Gpu>> = OnceLock::new();
    let gpus = GPUS.get_or_init(|| {
        let names: BTreeSet<&'static str> = tables().iter().flat_map(|(op, _)| variants(op)).collect();
        names.into_iter().map(|name| (name, open(name))).collect()
    });
    &gpus[variant]
}

fn open(variant: &'static str) -> Gpu {
    let with = tables().into_iter().map(|(op, _)| op).filter(|op| variants(op).contains(&variant));
    forcing(with.map(|op| (op.to_owned(), variant.to_owned())).collect())
}

/// The device with several ops forced, for `test` of the first; none if it cannot run one of them.
pub fn together(forced: &[(&'static str, &'static str)], test: impl Fn(&Place)) {
    let (op, variant) = forced[0];
    let gpu = forcing(forced.iter().map(|&(op, variant)| (op.to_owned(), variant.to_owned())).collect());
    if forced.iter().all(|(op, variant)| can_run(op, variant, gpu.caps())) {
        test(&Place { op, variant, gpu });
    } else {
        println!("{} cannot run {forced:?}", gpu.caps().name);
    }
}

fn forcing(variants: Vec<(String, String)>) -> Gpu {
    let options = GpuOptions { device: std::env::var("SCUMBLE_DEVICE").ok(), variants, ..Default::default() };
    block_on(Gpu::open(&options)).expect("a GPU or a software device (lavapipe) to run the kernels on")
}

/// A recording with the buffers of its results.
pub struct Run {
    pub gpu: Gpu,
    pub g: Graph,
    outputs: Vec<(Tensor, Buffer)>,
}

impl Place {
    /// A case that matrix units must take: it `ran` there.
    pub fn must_run(&self, ran: bool) {
        assert!(ran || self.variant != "coop", "{}: a case for matrix units did not run on them", self.op);
    }

    /// Does the device have these types in kernels?
    pub fn takes(&self, types: &[DType]) -> bool {
        self.gpu.caps().f16 || !types.contains(&DType::F16)
    }

    /// The element types of activations here.
    pub fn activations(&self) -> impl Iterator<Item = DType> {
        [DType::F32, DType::F16].into_iter().filter(|&dtype| self.takes(&[dtype]))
    }

    /// Begin a recording whose activations are of `dtype`.
    pub fn start(&self, dtype: DType) -> Run {
        Run { gpu: self.gpu.clone(), g: Graph::new(&self.gpu, dtype), outputs: Vec::new() }
    }
}

impl Run {
    /// An input.
    pub fn bind(&mut self, host: &Host) -> Tensor {
        self.g.bind("test input", &host.upload(&self.gpu), host.dims, host.dtype)
    }

    /// A poisoned f32 buffer for an op that is told where to write.
    pub fn output(&mut self, dims: [u32; 4]) -> Tensor {
        let count = dims.iter().product::<u32>() as usize;
        let buffer = poisoned(&self.gpu, count * 4, DType::F32);
        let tensor = self.g.bind("test output", &buffer, dims, DType::F32);
        self.outputs.push((tensor, buffer));
        tensor
    }

    /// Did the last dispatch of the place's op take the forced variant? It does not where the shape does not fit it.
    pub fn forced(&self, place: &Place) -> bool {
        self.g
            .nodes()
            .iter()
            .filter(|node| node.op == place.op)
            .all(|node| [place.variant, "reduce", "merge"].contains(&node.variant))
    }

    /// As [`Run::forced`], for an op of which all variants but those on matrix units and in tiles take every shape and type.
    pub fn suits(&self, place: &Place) -> bool {
        let forced = self.forced(place);
        let choosy = ["coop", "products", "tile", "half"].contains(&place.variant);
        assert!(forced || choosy, "{}/{} was not taken", place.op, place.variant);
        forced
    }

    /// Run once without step scalars, and read `tensors`.
    pub fn finish(self, tensors: &[Tensor]) -> Vec<Vec<f64>> {
        self.finish_steps(&[0u32], tensors)
    }

    /// Run once for each of the steps' scalars, in order, and read `tensors` afterwards.
    pub fn finish_steps<T: bytemuck::NoUninit>(mut self, steps: &[T], tensors: &[Tensor]) -> Vec<Vec<f64>> {
        for &tensor in tensors {
            if !self.outputs.iter().any(|(known, _)| *known == tensor) {
                let buffer = poisoned(&self.gpu, tensor.bytes() as usize, tensor.dtype);
                self.g.keep(tensor, &buffer);
                self.outputs.push((tensor, buffer));
            }
        }
        let gpu = self.gpu.clone();
        let program = block_on(Program::new(&gpu, self.g)).unwrap_or_else(|e| panic!("{e}"));
        let count = steps.len();
        let steps = block_on(gpu.steps(steps)).unwrap_or_else(|e| panic!("{e}"));
        let run = |program: &Program| -> Vec<Vec<f64>> {
            for step in 0..count {
                let mut recording = gpu.record(false);
                recording.run(program, &[], &steps, step);
                block_on(recording.submit(None)).unwrap_or_else(|e| panic!("{e}"));
            }
            let buffer = |tensor: &Tensor| self.outputs.iter().find(|(known, _)| known == tensor).expect("kept above");
            tensors.iter().map(|tensor| read(&buffer(tensor).1, tensor)).collect()
        };
        let found = run(&program);
        // The same with all of wgpu's checks, over fresh poison: what an unchecked kernel reads or writes out of range would differ.
        for (_, buffer) in &self.outputs {
            buffer.write(&vec![u8::MAX; buffer.bytes() as usize]);
        }
        let checked = run(&block_on(program.with_checks()).unwrap_or_else(|e| panic!("{e}")));
        for (tensor, (found, checked)) in tensors.iter().zip(found.iter().zip(&checked)) {
            // A GPU's compiler contracts multiply-adds as the code around them lies: there, rounding may differ.
            let room = match (gpu.caps().is_cpu(), tensor.dtype) {
                (true, _) => 0.0,
                (false, DType::F32) => 2e-6,
                (false, _) => 1e-3,
            } * found.iter().filter(|v| v.is_finite()).fold(0.0, |most: f64, v| most.max(v.abs()));
            let same = found.iter().zip(checked).all(|(a, b)| a.to_bits() == b.to_bits() || (a - b).abs() <= room);
            let off = found.iter().zip(checked).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(same, "{:?}: with runtime checks the result is another, by up to {off:.1e}", tensor.dims);
        }
        found
    }
}

/// A buffer of `bytes` and a guard, all ones: NaN in every type.
fn poisoned(gpu: &Gpu, bytes: usize, dtype: DType) -> Buffer {
    let guard = GUARD * dtype.bytes() as usize;
    block_on(gpu.upload("test output", &vec![u8::MAX; (bytes + guard).next_multiple_of(16)]))
        .expect("a small buffer fits")
}

/// A result's elements; what lies after them must be untouched.
fn read(buffer: &Buffer, tensor: &Tensor) -> Vec<f64> {
    let count = tensor.len() as usize;
    let (mut values, untouched): (Vec<f64>, bool) = match tensor.dtype {
        DType::F16 => {
            let all: Vec<f16> = block_on(buffer.read(count + GUARD)).unwrap_or_else(|e| panic!("{e}"));
            (all.iter().map(|v| v.to_f64()).collect(), all[count..].iter().all(|v| v.to_bits() == u16::MAX))
        }
        _ => {
            let all: Vec<f32> = block_on(buffer.read(count + GUARD)).unwrap_or_else(|e| panic!("{e}"));
            (all.iter().map(|&v| f64::from(v)).collect(), all[count..].iter().all(|v| v.to_bits() == u32::MAX))
        }
    };
    assert!(untouched, "something was written after the end of {:?}", tensor.dims);
    values.truncate(count);
    values
}
