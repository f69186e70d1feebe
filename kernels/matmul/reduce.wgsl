// The sums of several workgroups' shares of a product, in order, and the epilogue: the second half of the coop variants of
// matmul and conv2d where a product has too few tiles to fill a GPU. One thread for one row and four columns, or the eight
// that make four.
alias residual4 = vec4<f16>;
alias out4 = vec4<f16>;
const SPLITS: u32 = 2u;

struct Dims { m: u32, n4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32 }

@group(0) @binding(0) var<storage, read> shares: array<vec4<f32>>;  // [SPLITS, M, N/4]
@group(0) @binding(1) var<storage, read> bias: array<vec4<f32>>;    // [.., N/4]
@group(0) @binding(2) var<storage, read> residual: array<residual4>; // [M, N/4]
@group(0) @binding(3) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(4) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    const EACH = 1u + PAIRED;       // groups of four of a thread
    let width = dims.n4 / EACH;
    let row = index / width;
    let n4 = index % width * EACH;
    if (row >= dims.m) { return; }
    // Ahead of the sums, so that nothing waits for it.
    let rest = load_residual(row, n4);
    var first = load_bias(row, n4);
    var second = load_bias(row, n4 + PAIRED);
    for (var share = 0u; share < SPLITS; share++) {
        let at = (share * dims.m + row) * dims.n4 + n4;
        first += shares[at];
        if (PAIRED == 1u) { second += shares[at + PAIRED]; }
    }
    if (PAIRED == 1u) {
        store_pair(row, n4, first, second);
        return;
    }
    store_four(row, n4, first, rest);
}
