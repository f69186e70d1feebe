// SAG's map: the attention mass that each key receives, the column sums of the head-mean softmax (their mean is 1).
// One workgroup of 64 for one key; the N x N map is never stored.
alias elem4 = vec4<f32>;
const D4: u32 = 8u;                 // head dim / 4

struct Dims {
    batch: u32, heads: u32, queries: u32, keys: u32,
    q_stride4: u32, q_offset4: u32,
    kv_stride4: u32, k_offset4: u32, v_offset4: u32,
    kv_repeat: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> q: array<elem4>;           // [B, queries, q_stride4]
@group(0) @binding(1) var<storage, read> kv: array<elem4>;          // [B / kv_repeat, keys, kv_stride4]
@group(0) @binding(2) var<storage, read> lse: array<f32>;           // [B, heads, queries], of attention with WITH_LSE
@group(0) @binding(3) var<storage, read_write> mass: array<f32>;    // [batch, keys]; batch may be fewer than B: the first ones
@group(0) @binding(4) var<uniform> dims: Dims;

// The softmax weight that row `i` of [heads, queries] gives this key.
fn weight(batch: u32, i: u32, key: u32) -> f32 {
    let head = i / dims.queries;
    let query = i % dims.queries;
    let q_at = (batch * dims.queries + query) * dims.q_stride4 + dims.q_offset4 + head * D4;
    let k_at = (batch / dims.kv_repeat * dims.keys + key) * dims.kv_stride4 + dims.k_offset4 + head * D4;
    var score = 0.0;
    for (var d = 0u; d < D4; d++) { score += dot(vec4<f32>(q[q_at + d]), vec4<f32>(kv[k_at + d])); }
    return exp(score * dims.scale - lse[batch * dims.heads * dims.queries + i]);
}

var<workgroup> partial: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let key = wid.x;
    let batch = wid.y;
    var sum = 0.0;
    for (var i = local; i < dims.heads * dims.queries; i += 64u) { sum += weight(batch, i, key); }
    partial[local] = sum;
    workgroupBarrier();
    for (var half = 32u; half > 0u; half /= 2u) {
        if (local < half) { partial[local] += partial[local + half]; }
        workgroupBarrier();
    }
    if (local == 0u) { mass[batch * dims.keys + key] = partial[0] / f32(dims.heads); }
}
