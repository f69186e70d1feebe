// C = epilogue(A B): the plain form, one thread for one row and eight columns.
// A [M, K] activations, B [K, N] weights, C [M, N]; N counted in groups of four, K in groups of four.
alias elem4 = vec4<f32>;
alias weight4 = vec4<f32>;
alias out4 = vec4<f32>;
alias residual4 = vec4<f32>;

struct Dims { m: u32, n4: u32, k4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32 }

@group(0) @binding(0) var<storage, read> a: array<elem4>;           // [M, K/4]
@group(0) @binding(1) var<storage, read> b: array<weight4>;         // [K, N/4]
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;    // [.., N/4]
@group(0) @binding(3) var<storage, read> residual: array<residual4>; // [M, N/4]
@group(0) @binding(4) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(5) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let pairs = (dims.n4 + 1u) / 2u;
    let row = index / pairs;
    let n4 = index % pairs * 2u;
    if (row >= dims.m) { return; }
    let last = min(n4 + 1u, dims.n4 - 1u);
    var acc0 = vec4<f32>(0.0);
    var acc1 = vec4<f32>(0.0);
    for (var k4 = 0u; k4 < dims.k4; k4++) {
        let x = vec4<f32>(a[row * dims.k4 + k4]);
        for (var i = 0u; i < 4u; i++) {
            let at = (k4 * 4u + i) * dims.n4;
            acc0 += x[i] * load_weight(b[at + n4]);
            acc1 += x[i] * load_weight(b[at + last]);
        }
    }
    store_c(row, n4, acc0, acc1);
}
