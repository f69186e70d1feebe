//! repack against the same in loops: layouts to the bit, f16 as the half crate converts it, LoRA to f32's rounding.

use half::{bf16, f16};
use pollster::block_on;
use scumble::gpu::{Buffer, DType, Gpu, Graph, Program};
use scumble::ops::repack::{FileType, LowRank, Repack, repack};

use crate::compare::{F16, F32, check};
use crate::harness::{Place, everywhere};
use crate::values::normal;

/// Values as a file holds them, and as numbers.
fn stored(file: FileType, values: &[f64]) -> (Vec<u8>, Vec<f32>) {
    let as_f32 = |v: &f64| match file {
        FileType::F32 => *v as f32,
        FileType::F16 => f16::from_f64(*v).to_f32(),
        FileType::Bf16 => bf16::from_f64(*v).to_f32(),
    };
    let bytes = |v: &f64| match file {
        FileType::F32 => (*v as f32).to_le_bytes().to_vec(),
        FileType::F16 => f16::from_f64(*v).to_le_bytes().to_vec(),
        FileType::Bf16 => bf16::from_f64(*v).to_le_bytes().to_vec(),
    };
    (values.iter().flat_map(bytes).collect(), values.iter().map(as_f32).collect())
}

/// The target's elements as numbers.
fn read(buffer: &Buffer, dtype: DType, count: usize) -> Vec<f64> {
    let halves = |buffer: &Buffer| block_on(buffer.read::<f16>(count)).expect("read");
    match dtype {
        DType::F32 => block_on(buffer.read::<f32>(count)).expect("read").into_iter().map(f64::from).collect(),
        _ => halves(buffer).into_iter().map(f64::from).collect(),
    }
}

fn target(gpu: &Gpu, elements: usize, dtype: DType) -> Buffer {
    block_on(gpu.upload("target", &vec![u8::MAX; elements * dtype.bytes() as usize])).expect("small")
}

struct Case {
    file: FileType,
    target: DType,
    /// n, c, taps
    shape: [usize; 3],
    columns: usize,
    first: usize,
    geglu: bool,
    rank: usize,
}

/// Row (tap, c), column n of the target.
fn place_of(case: &Case, n: usize, c: usize, tap: usize) -> usize {
    let half = case.shape[0] / 2;
    let column = if case.geglu { n % half / 4 * 8 + n / half * 4 + n % 4 } else { n };
    (tap * case.shape[1].next_multiple_of(4) + c) * case.columns + case.first + column
}

fn check_case(place: &Place, case: &Case) {
    let [n, c, taps] = case.shape;
    let gpu = &place.gpu;
    let values = normal(81, [1, 1, 1, (n * c * taps) as u32], DType::F32).values;
    let (bytes, numbers) = stored(case.file, &values);
    // The tensor begins behind another one.
    let mut raw = vec![0xffu8; 48];
    raw.extend(&bytes);
    raw.resize(raw.len().next_multiple_of(16), 0xff);
    let raw = block_on(gpu.upload("raw", &raw)).expect("small");
    let elements = taps * c.next_multiple_of(4) * case.columns;
    let buffer = target(gpu, elements, case.target);
    let found = block_on(gpu.upload("found", &[0u32; 8])).expect("small");
    let (up, down) =
        (normal(82, [1, 1, n as u32, 4], DType::F32), normal(83, [1, 1, 4, (c * taps) as u32], DType::F32));
    let cut = |values: &[f64], count: usize| values[..count].iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let (up, down) = (cut(&up.values, n * case.rank), cut(&down.values, case.rank * c * taps));

    let mut g = Graph::new(gpu, DType::F32);
    let bind = |g: &mut Graph, b: &Buffer| g.bind("words", b, [1, 1, 1, (b.bytes() / 4) as u32], DType::F32);
    let (raw, words) = (bind(&mut g, &raw), bind(&mut g, &found));
    let dims = [1, 1, (taps * c.next_multiple_of(4)) as u32, case.columns as u32];
    let out = g.bind("target", &buffer, dims, case.target);
    let lora = (case.rank > 0).then(|| {
        let (up, down) = (gpu.upload("up", &up), gpu.upload("down", &down));
        let (up, down) = (block_on(up).expect("small"), block_on(down).expect("small"));
        LowRank { up: bind(&mut g, &up), down: bind(&mut g, &down), rank: case.rank as u32 }
    });
    let r = Repack {
        file: case.file,
        base: 12,
        n: n as u32,
        c: c as u32,
        taps: taps as u32,
        first: case.first as u32,
        geglu: case.geglu,
        slot: 2,
    };
    repack(&mut g, raw, out, words, &r, lora);
    run(gpu, g);
    let got = read(&buffer, case.target, elements);
    assert_eq!(block_on(found.read::<u32>(8)).expect("read"), [0; 8], "all values are fine");
    let limit = if case.target == DType::F32 { F32 } else { F16 };
    let (mut found, mut expected) = (Vec::new(), Vec::new());
    for i in 0..n * c * taps {
        let (o, ci, tap) = (i / (c * taps), i / taps % c, i % taps);
        let product: f64 = (0..case.rank)
            .map(|k| f64::from(up[o * case.rank + k]) * f64::from(down[k * c * taps + i % (c * taps)]))
            .sum();
        found.push(got[place_of(case, o, ci, tap)]);
        expected.push(f64::from(numbers[i]) + product);
    }
    let name = format!("{:?} to {:?}, {:?}, rank {}", case.file, case.target, case.shape, case.rank);
    check(place, limit, &name, &found, &expected);
    if case.rank == 0 {
        let exact = |v: &f64| if case.target == DType::F32 { *v } else { f16::from_f64(*v).to_f64() };
        assert_eq!(found, expected.iter().map(exact).collect::<Vec<f64>>(), "{name}: to the bit");
    }
    padding_is_zero(case, &got);
}

/// Channels and columns that the file lacks are zero; what belongs to other columns is not touched.
fn padding_is_zero(case: &Case, got: &[f64]) {
    let [n, c, taps] = case.shape;
    for tap in 0..taps {
        for ci in 0..c.next_multiple_of(4) {
            let row = &got[(tap * c.next_multiple_of(4) + ci) * case.columns..][..case.columns];
            let own = case.first..case.first + n.next_multiple_of(4);
            assert!(row.iter().enumerate().all(|(at, v)| own.contains(&at) || v.is_nan()), "columns of others");
            if ci >= c {
                assert!(row[own].iter().all(|&v| v == 0.0), "channels beyond {c}");
            }
        }
    }
}

fn run(gpu: &Gpu, g: Graph) {
    let program = block_on(Program::new(gpu, g)).expect("a program");
    let steps = block_on(gpu.steps(&[0u32])).expect("steps");
    let mut recording = gpu.record(false);
    recording.run(&program, &[], &steps, 0);
    block_on(recording.submit(None)).expect("submitted");
}

#[test]
fn every_layout_and_type() {
    everywhere("repack", |place| {
        let shapes =
            [([8, 4, 1], 8, 0), ([12, 20, 1], 24, 8), ([3, 9, 9], 4, 0), ([5, 6, 9], 16, 4), ([4, 8, 1], 8, 4)];
        for file in [FileType::F32, FileType::F16, FileType::Bf16] {
            for target in [DType::F32, DType::F16, DType::Packed] {
                for (shape, columns, first) in shapes {
                    for rank in [0, 3] {
                        check_case(place, &Case { file, target, shape, columns, first, geglu: false, rank });
                    }
                }
                check_case(
                    place,
                    &Case { file, target, shape: [16, 5, 1], columns: 16, first: 0, geglu: true, rank: 0 },
                );
            }
        }
    });
}

/// Every f16 to f32, and f32 around every place where f16's rounding changes, to the bit.
#[test]
fn conversions_are_exact() {
    everywhere("repack", |place| {
        let gpu = &place.gpu;
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let finite = |bits: &u16| f16::from_bits(*bits).is_finite();
        let halves: Vec<u16> = all.iter().copied().filter(finite).collect();
        let wide: Vec<f32> = halves
            .iter()
            .flat_map(|&bits| {
                let value = f16::from_bits(bits).to_f32();
                let half_up = (f64::from(value) + f64::from(f16::from_bits(bits ^ 1).to_f32())) / 2.0;
                let middle = half_up as f32;
                [value, middle, f32::from_bits(middle.to_bits() + 1), f32::from_bits(middle.to_bits().wrapping_sub(1))]
            })
            .filter(|v| v.abs() < 65_520.0)
            .collect();
        let wide = &wide[..wide.len() / 4 * 4];
        let convert = |bytes: &[u8], file: FileType, target_type: DType, count: usize| {
            let mut padded = bytes.to_vec();
            padded.resize(bytes.len().next_multiple_of(16), 0);
            let raw = block_on(gpu.upload("raw", &padded)).expect("small");
            let buffer = target(gpu, count, target_type);
            let found = block_on(gpu.upload("found", &[0u32; 4])).expect("small");
            let mut g = Graph::new(gpu, DType::F32);
            let bind = |g: &mut Graph, b: &Buffer| g.bind("words", b, [1, 1, 1, (b.bytes() / 4) as u32], DType::F32);
            let (raw, words) = (bind(&mut g, &raw), bind(&mut g, &found));
            // [n, c] with n = 4: the target is its transpose.
            let out = g.bind("target", &buffer, [1, 1, (count / 4) as u32, 4], target_type);
            let c = (count / 4) as u32;
            let r = Repack { file, base: 0, n: 4, c, taps: 1, first: 0, geglu: false, slot: 0 };
            repack(&mut g, raw, out, words, &r, None);
            run(gpu, g);
            buffer
        };
        let transposed = |i: usize, count: usize| i % 4 * (count / 4) + i / 4;
        let bytes: Vec<u8> = halves.iter().flat_map(|b| b.to_le_bytes()).collect();
        let count = halves.len();
        let got: Vec<f32> = block_on(convert(&bytes, FileType::F16, DType::F32, count).read(count)).expect("read");
        for (i, value) in got.iter().enumerate() {
            let expected = f16::from_bits(halves[transposed(i, count)]).to_f32();
            assert_eq!(value.to_bits(), expected.to_bits(), "{expected}");
        }
        let bytes: Vec<u8> = wide.iter().flat_map(|v| v.to_le_bytes()).collect();
        let count = wide.len();
        let got: Vec<u16> = block_on(convert(&bytes, FileType::F32, DType::Packed, count).read(count)).expect("read");
        for (i, bits) in got.iter().enumerate() {
            let value = wide[transposed(i, count)];
            assert_eq!(*bits, f16::from_f32(value).to_bits(), "{value:e}");
        }
    });
}

/// NaN and infinity are told, and so is what f16 cannot hold.
#[test]
fn bad_values_are_found() {
    everywhere("repack", |place| {
        let gpu = &place.gpu;
        let cases: [(FileType, DType, [f64; 4], [u32; 2]); 6] = [
            (FileType::F32, DType::F32, [1.0, f64::NAN, 2.0, 3.0], [1, 0]),
            (FileType::F16, DType::Packed, [1.0, f64::INFINITY, 2.0, 3.0], [1, 1]),
            (FileType::Bf16, DType::F32, [1.0, f64::NEG_INFINITY, 2.0, 3.0], [1, 0]),
            (FileType::F32, DType::Packed, [1.0, 65_519.0, 2.0, 3.0], [0, 0]),
            (FileType::F32, DType::Packed, [1.0, -65_520.0, 2.0, 3.0], [0, 1]),
            (FileType::F32, DType::F32, [1.0, 1e30, 2.0, 3.0], [0, 0]),
        ];
        for (file, dtype, values, expected) in cases {
            let (mut bytes, _) = stored(file, &values);
            bytes.resize(16, 0);
            let raw = block_on(gpu.upload("raw", &bytes)).expect("small");
            let buffer = target(gpu, 16, dtype);
            let found = block_on(gpu.upload("found", &[0u32; 4])).expect("small");
            let mut g = Graph::new(gpu, DType::F32);
            let bind = |g: &mut Graph, b: &Buffer| g.bind("words", b, [1, 1, 1, (b.bytes() / 4) as u32], DType::F32);
            let (raw, words) = (bind(&mut g, &raw), bind(&mut g, &found));
            let out = g.bind("target", &buffer, [1, 1, 4, 4], dtype);
            let r = Repack { file, base: 0, n: 4, c: 1, taps: 1, first: 0, geglu: false, slot: 0 };
            repack(&mut g, raw, out, words, &r, None);
            run(gpu, g);
            let found: Vec<u32> = block_on(found.read(2)).expect("read");
            assert_eq!(found, expected, "{file:?} to {dtype:?}: {values:?}");
        }
    });
}
