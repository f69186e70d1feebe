// The sums of several workgroups' shares of a product, in order, and the epilogue: the second half of the coop variants of
// matmul and conv2d where a product has too few tiles to fill a GPU. One thread for one row and eight columns.
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
    let pairs = (dims.n4 + 1u) / 2u;
    let row = index / pairs;
    let n4 = index % pairs * 2u;
    if (row >= dims.m) { return; }
    let last = min(n4 + 1u, dims.n4 - 1u);
    // Ahead of the sums, so that nothing waits for it.
    let rest_first = load_residual(row, n4);
    let rest_second = load_residual(row, last);
    var first = load_bias(row, n4);
    var second = load_bias(row, last);
    for (var share = 0u; share < SPLITS; share++) {
        let at = (share * dims.m + row) * dims.n4;
        first += shares[at + n4];
        second += shares[at + last];
    }
    if (PAIRED == 1u) {
        store_pair(row, n4, first, second);
        return;
    }
    store_four(row, n4, first, rest_first);
    if (n4 + 1u < dims.n4) { store_four(row, n4 + 1u, second, rest_second); }
}
