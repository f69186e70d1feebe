// SAG's map: the attention mass that each key receives, the column sums of the head-mean softmax (their mean is 1).
// One workgroup for four keys, so that a query that was loaded serves all of them; the N x N map is never stored.
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

const THREADS: u32 = 256u;
const KEYS: u32 = 4u;

var<workgroup> partial: array<vec4<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let key0 = wid.x * KEYS;
    let batch = wid.y;
    //: for k in 0..KEYS
    let k_at_$k = (batch / dims.kv_repeat * dims.keys + min(key0 + $ku, dims.keys - 1u)) * dims.kv_stride4 + dims.k_offset4;
    //: end
    var sum = vec4<f32>(0.0);
    // Rows of [heads, queries].
    for (var i = local; i < dims.heads * dims.queries; i += THREADS) {
        let head = i / dims.queries;
        let q_at = (batch * dims.queries + i % dims.queries) * dims.q_stride4 + dims.q_offset4 + head * D4;
        var score = vec4<f32>(0.0);
        for (var d = 0u; d < D4; d++) {
            let x = vec4<f32>(q[q_at + d]);
            //: for k in 0..KEYS
            score[$k] += dot(x, vec4<f32>(kv[k_at_$k + head * D4 + d]));
            //: end
        }
        sum += exp(score * dims.scale - lse[batch * dims.heads * dims.queries + i]);
    }
    partial[local] = sum;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if (local < half) { partial[local] += partial[local + half]; }
        workgroupBarrier();
    }
    if (local < KEYS && key0 + local < dims.keys) {
        mass[batch * dims.keys + key0 + local] = partial[0][local] / f32(dims.heads);
    }
}
