// C = epilogue(A B) without workgroup memory or barriers, for software devices: one thread for 8 rows and 32 columns, in
// registers as far as they go (kernels/lib/rows_each.wgsl or rows_shared.wgsl). A [M, K], B [K, N], C [M, N];
// workgroups of 8, grid (M/64, N/32).
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

@compute @workgroup_size(8)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let row0 = wid.x * 64u + lane;
    let n4 = wid.y * 8u;
    for (var k4 = 0u; k4 < dims.k4; k4++) {
        for (var r = 0u; r < 8u; r++) { rows_x[r] = vec4<f32>(a[min(row0 + r * 8u, dims.m - 1u) * dims.k4 + k4]); }
        multiply_add(k4 * 4u, n4, lane);
    }
    for (var r = 0u; r < 8u; r++) {
        let row = row0 + r * 8u;
        if (row >= dims.m) { continue; }
        for (var c = 0u; c < 8u; c += 2u) {
            if (n4 + c < dims.n4) { store_c(row, n4 + c, acc[c][r], acc[c + 1u][r]); }
        }
    }
}
