// C = epilogue(A B) without workgroup memory or barriers, for software devices: one thread for two rows and sixteen columns.
// Neighbouring threads take neighbouring rows, so that a load of B serves all lanes of a subgroup.
// A [M, K] activations, B [K, N] weights, C [M, N]; grid (M/128, N/16).
alias elem4 = vec4<f32>;
alias weight4 = vec4<f32>;
alias out4 = vec4<f32>;

struct Dims { m: u32, n4: u32, k4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32 }

@group(0) @binding(0) var<storage, read> a: array<elem4>;           // [M, K/4]
@group(0) @binding(1) var<storage, read> b: array<weight4>;         // [K, N/4]
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;    // [.., N/4]
@group(0) @binding(3) var<storage, read> residual: array<elem4>;    // [M, N/4]
@group(0) @binding(4) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(5) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_id) lid: vec3<u32>, @builtin(workgroup_id) wid: vec3<u32>) {
    let row0 = wid.x * 128u + lid.x;
    let row1 = row0 + 64u;
    let n4 = wid.y * 4u;
    let at0 = min(row0, dims.m - 1u) * dims.k4;
    let at1 = min(row1, dims.m - 1u) * dims.k4;
    let last = dims.n4 - 1u;
    let c1 = min(n4 + 1u, last);
    let c2 = min(n4 + 2u, last);
    let c3 = min(n4 + 3u, last);
    var p0 = vec4<f32>(0.0); var p1 = vec4<f32>(0.0); var p2 = vec4<f32>(0.0); var p3 = vec4<f32>(0.0);
    var q0 = vec4<f32>(0.0); var q1 = vec4<f32>(0.0); var q2 = vec4<f32>(0.0); var q3 = vec4<f32>(0.0);
    for (var k4 = 0u; k4 < dims.k4; k4++) {
        let x = vec4<f32>(a[at0 + k4]);
        let y = vec4<f32>(a[at1 + k4]);
        var at = k4 * 4u * dims.n4;
        for (var i = 0u; i < 4u; i++) {
            let b0 = load_weight(b[at + n4]);
            let b1 = load_weight(b[at + c1]);
            let b2 = load_weight(b[at + c2]);
            let b3 = load_weight(b[at + c3]);
            let xi = x[i];
            let yi = y[i];
            p0 += xi * b0; p1 += xi * b1; p2 += xi * b2; p3 += xi * b3;
            q0 += yi * b0; q1 += yi * b1; q2 += yi * b2; q3 += yi * b3;
            at += dims.n4;
        }
    }
    if (row0 < dims.m) {
        store_c(row0, n4, p0, p1);
        if (n4 + 2u < dims.n4) { store_c(row0, n4 + 2u, p2, p3); }
    }
    if (row1 < dims.m) {
        store_c(row1, n4, q0, q1);
        if (n4 + 2u < dims.n4) { store_c(row1, n4 + 2u, q2, q3); }
    }
}
