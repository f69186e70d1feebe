// Layer norm over the channels of each row: one thread for one row. For software devices, and everywhere as the truth.
alias elem4 = vec4<f32>;

struct Dims { rows: u32, c4: u32, eps: f32 }

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [rows, c4]
@group(0) @binding(1) var<storage, read> gamma: array<vec4<f32>>;   // [c4]
@group(0) @binding(2) var<storage, read> beta: array<vec4<f32>>;    // [c4]
@group(0) @binding(3) var<storage, read_write> out: array<elem4>;   // [rows, c4]
@group(0) @binding(4) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = linear_index(id);
    if (row >= dims.rows) { return; }
    let base = row * dims.c4;
    let channels = f32(dims.c4 * 4u);
    var sum = vec4<f32>(0.0);
    for (var i = 0u; i < dims.c4; i++) { sum += vec4<f32>(x[base + i]); }
    let mean = dot(sum, vec4<f32>(1.0)) / channels;
    var squares = vec4<f32>(0.0);
    for (var i = 0u; i < dims.c4; i++) {
        let d = vec4<f32>(x[base + i]) - mean;
        squares += d * d;
    }
    let scale = 1.0 / sqrt(dot(squares, vec4<f32>(1.0)) / channels + dims.eps);
    for (var i = 0u; i < dims.c4; i++) {
        out[base + i] = elem4((vec4<f32>(x[base + i]) - mean) * scale * gamma[i] + beta[i]);
    }
}
