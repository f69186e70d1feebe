// The sums of several workgroups' shares of a product, in order, and the epilogue: the second half of the coop variants of
// matmul and conv2d where a product has too few tiles to fill a GPU. One thread for one row and four columns, or the eight
// that make four. Where sums of the rows are kept for a norm (lib/row_sums.wgsl), a workgroup's threads are of one row.
alias residual4 = vec4<f16>;
alias out4 = vec4<f16>;
const SPLITS: u32 = 2u;
const NORMED: u32 = 0u;
const SUMMED: u32 = 0u;
const THREADS: u32 = 64u;

struct Dims {
    m: u32, n4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32,
    //: if 0 < NORMED
    per_channel: f32, eps: f32,     // 1 / A's channels; the norm's
    //: end
}

@group(0) @binding(0) var<storage, read> shares: array<vec4<f32>>;  // [SPLITS, M, N/4]
@group(0) @binding(1) var<storage, read> bias: array<vec4<f32>>;    // [.., N/4]
@group(0) @binding(2) var<storage, read> residual: array<residual4>; // [M, N/4]
//: if NORMED + SUMMED < 1
@group(0) @binding(3) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(4) var<uniform> dims: Dims;
//: end
//: if 0 < NORMED
@group(0) @binding(3) var<storage, read> row_sums: array<vec2<f32>>; // [M, NORMED] of A
@group(0) @binding(4) var<storage, read_write> out: array<out4>;
@group(0) @binding(5) var<uniform> dims: Dims;
//: end
//: if 0 < SUMMED
@group(0) @binding(3) var<storage, read_write> out: array<out4>;
@group(0) @binding(4) var<storage, read_write> kept_sums: array<vec2<f32>>;  // [M, N / 4 / THREADS] of C
@group(0) @binding(5) var<uniform> dims: Dims;

var<workgroup> parts: array<vec2<f32>, THREADS>;
//: end

@compute @workgroup_size(THREADS)
//: if SUMMED < 1
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    const EACH = 1u + PAIRED;       // groups of four of a thread
    let width = dims.n4 / EACH;
    let row = index / width;
    let n4 = index % width * EACH;
    if (row >= dims.m) { return; }
//: end
//: if 0 < SUMMED
fn main(
    @builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32, @builtin(num_subgroups) subgroups: u32,
) {
    let index = (wid.x + wid.y * 65535u) * THREADS + local;
    let row = min(index / dims.n4, dims.m - 1u);
    let n4 = index % dims.n4;
//: end
    // Ahead of the sums, so that nothing waits for it.
    let rest = load_residual(row, n4);
    let added = load_bias(row, n4);
    let gate = load_bias(row, n4 + PAIRED);
    //: if 0 < NORMED
    let scale = row_scale(row);
    //: end
    //: if NORMED < 1
    let scale = 1.0;
    //: end
    var first = vec4<f32>(0.0);
    var second = vec4<f32>(0.0);
    for (var share = 0u; share < SPLITS; share++) {
        let at = (share * dims.m + row) * dims.n4 + n4;
        first += shares[at];
        if (PAIRED == 1u) { second += shares[at + PAIRED]; }
    }
    //: if SUMMED < 1
    if (PAIRED == 1u) {
        store_pair(row, n4, first * scale + added, second * scale + gate);
        return;
    }
    store_four(row, n4, first * scale + added, rest);
    //: end
    //: if 0 < SUMMED
    let kept = store_four(row, n4, first * scale + added, rest);
    let sums = subgroupAdd(vec2<f32>(dot(kept, vec4<f32>(1.0)), dot(kept, kept)));
    if (lane == 0u) { parts[subgroup] = sums; }
    workgroupBarrier();
    if (local == 0u) {
        var all = parts[0];
        for (var i = 1u; i < subgroups; i++) { all += parts[i]; }
        kept_sums[index / THREADS] = all;
    }
    //: end
}
