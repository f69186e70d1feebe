// Attention whose keys several workgroups shared (kernels/attention/coop.wgsl), put together: the mean of the parts, each weighted by the sum of
// its keys' exponentials (Dao et al. 2023, flash-decoding). One thread for four channels of a query.
alias elem4 = vec4<f16>;
const SHARES: u32 = 2u;

struct Dims { rows: u32, queries: u32, heads: u32, d4: u32 }    // rows: B queries

@group(0) @binding(0) var<storage, read> parts: array<vec4<f32>>;   // [SHARES, B, queries, heads d4]
@group(0) @binding(1) var<storage, read> lse: array<f32>;           // [SHARES, B, heads, queries]
@group(0) @binding(2) var<storage, read_write> out: array<elem4>;   // [B, queries, heads d4]
@group(0) @binding(3) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let width = dims.heads * dims.d4;
    let row = index / width;
    if (row >= dims.rows) { return; }
    let head = index % width / dims.d4;
    let sums = (row / dims.queries * dims.heads + head) * dims.queries + row % dims.queries;
    var highest = lse[sums];
    for (var share = 1u; share < SHARES; share++) { highest = max(highest, lse[share * dims.rows * dims.heads + sums]); }
    var total = 0.0;
    var mean = vec4<f32>(0.0);
    for (var share = 0u; share < SHARES; share++) {
        let weight = exp(lse[share * dims.rows * dims.heads + sums] - highest);
        total += weight;
        mean += weight * parts[share * dims.rows * width + index];
    }
    out[index] = elem4(mean / total);
}
