// Layer norm over the channels of each row: one workgroup of 64 for one row, sums through workgroup memory.
alias elem4 = vec4<f32>;

struct Dims { rows: u32, c4: u32, eps: f32 }

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [rows, c4]
@group(0) @binding(1) var<storage, read> gamma: array<vec4<f32>>;   // [c4]
@group(0) @binding(2) var<storage, read> beta: array<vec4<f32>>;    // [c4]
@group(0) @binding(3) var<storage, read_write> out: array<elem4>;   // [rows, c4]
@group(0) @binding(4) var<uniform> dims: Dims;

var<workgroup> partial: array<f32, 64>;

fn total(local: u32, value: f32) -> f32 {
    partial[local] = value;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half /= 2u) {
        if (local < half) { partial[local] += partial[local + half]; }
        workgroupBarrier();
    }
    let sum = partial[0];
    workgroupBarrier();
    return sum;
}

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let row = wid.x + wid.y * 65535u;
    let base = min(row, dims.rows - 1u) * dims.c4;
    let channels = f32(dims.c4 * 4u);
    var sum = vec4<f32>(0.0);
    for (var i = local; i < dims.c4; i += 64u) { sum += vec4<f32>(x[base + i]); }
    let mean = total(local, dot(sum, vec4<f32>(1.0))) / channels;
    var squares = vec4<f32>(0.0);
    for (var i = local; i < dims.c4; i += 64u) {
        let d = vec4<f32>(x[base + i]) - mean;
        squares += d * d;
    }
    let scale = 1.0 / sqrt(total(local, dot(squares, vec4<f32>(1.0))) / channels + dims.eps);
    if (row >= dims.rows) { return; }
    for (var i = local; i < dims.c4; i += 64u) {
        out[base + i] = elem4((vec4<f32>(x[base + i]) - mean) * scale * gamma[i] + beta[i]);
    }
}
