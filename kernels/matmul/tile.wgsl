// C = epilogue(A B) in tiles of 64 rows and 64 columns through workgroup memory: each of 128 threads keeps 4 rows of
// 8 columns in registers (two groups of four, neighbours). A [M, K], B [K, N], C [M, N]; grid (N/64, M/64).
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

fn load_a(row: u32, k4: u32) -> vec4<f32> {
    if (row >= dims.m || k4 >= dims.k4) { return vec4<f32>(0.0); }
    return vec4<f32>(a[row * dims.k4 + k4]);
}

fn load_b(k: u32, n4: u32) -> vec4<f32> {
    if (k >= dims.k4 * 4u || n4 >= dims.n4) { return vec4<f32>(0.0); }
    return load_weight(b[k * dims.n4 + n4]);
}

fn k4_steps() -> u32 { return dims.k4; }

// Nothing of a row is worth keeping between loads; conv2d's tile keeps its pixel here.
fn prepare(row: u32) {}
