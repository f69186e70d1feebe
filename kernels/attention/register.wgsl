// softmax(Q K^T scale) V, streaming over the keys eight at a time, without workgroup memory or barriers, for software devices:
// one thread for one query and 32 channels of one head's output (wider heads compute their scores once for each 32).
// The 8 threads of a workgroup read the same keys (kernels/lib/keys_each.wgsl or keys_shared.wgsl).
// Grid (queries/8, heads ceil(D4/8), B).
alias elem4 = vec4<f32>;
const D4: u32 = 8u;                 // head dim / 4
const CAUSAL: bool = false;         // a query sees keys up to its own position (CLIP)
const WITH_LSE: bool = false;       // also write log(sum(exp(scores))) per row, for attention/mass

struct Dims {
    batch: u32, heads: u32, queries: u32, keys: u32,
    q_stride4: u32, q_offset4: u32,                     // a row of q in groups of four; the first head's offset
    kv_stride4: u32, k_offset4: u32, v_offset4: u32,    // k and v lie in one buffer
    kv_repeat: u32,                                     // images that share one row of kv
    scale: f32,
}

@group(0) @binding(0) var<storage, read> q: array<elem4>;           // [B, queries, q_stride4]
@group(0) @binding(1) var<storage, read> kv: array<elem4>;          // [B / kv_repeat, keys, kv_stride4]
@group(0) @binding(2) var<storage, read_write> out: array<elem4>;   // [B, queries, heads D4]
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;     // [B, heads, queries]
@group(0) @binding(4) var<uniform> dims: Dims;

// Below every score, and far enough from f32's end that exp of a difference meets no infinity (fast math forbids them).
const LOWEST: f32 = -1.0e30;


@compute @workgroup_size(8)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let parts = (D4 + 7u) / 8u;
    let mine = wid.x * 8u + lane;
    let query = min(mine, dims.queries - 1u);
    let head = wid.y / parts;
    let first = wid.y % parts * 8u;                     // of the output's channel groups
    let batch = wid.z;
    let q_at = (batch * dims.queries + query) * dims.q_stride4 + dims.q_offset4 + head * D4;
    let kv_at = batch / dims.kv_repeat * dims.keys * dims.kv_stride4 + head * D4;
    var acc: array<vec4<f32>, 8>;
    var p: array<f32, 8>;
    for (var i = 0u; i < 8u; i++) { acc[i] = vec4<f32>(0.0); }
    var highest = LOWEST;
    var sum = 0.0;
    let end = select(dims.keys, query + 1u, CAUSAL);
    for (var key = 0u; key < dims.keys; key += 8u) {
        for (var j = 0u; j < 8u; j++) { p[j] = 0.0; }
        for (var d = 0u; d < D4; d++) {
            let part = vec4<f32>(q[q_at + d]) * dims.scale;
            load_eight(kv_at + dims.k_offset4 + d, key, lane);
            for (var j = 0u; j < 8u; j++) { p[j] += dot(part, eight[j]); }
        }
        var next = highest;
        for (var j = 0u; j < 8u; j++) {
            // Beyond the last key the last is read again, and its score thrown away.
            p[j] = select(LOWEST, p[j], key + j < end);
            next = max(next, p[j]);
        }
        let keep = exp(highest - next);
        sum *= keep;
        for (var j = 0u; j < 8u; j++) {
            p[j] = select(0.0, exp(p[j] - next), key + j < end);
            sum += p[j];
        }
        for (var i = 0u; i < 8u; i++) {
            load_eight(kv_at + dims.v_offset4 + min(first + i, D4 - 1u), key, lane);
            acc[i] *= keep;
            for (var j = 0u; j < 8u; j++) { acc[i] += p[j] * eight[j]; }
        }
        highest = next;
    }
    if (mine >= dims.queries) { return; }
    let at = (batch * dims.queries + query) * dims.heads * D4 + head * D4;
    for (var i = 0u; i < 8u; i++) {
        if (first + i < D4) { out[at + first + i] = elem4(acc[i] / sum); }
    }
    if (WITH_LSE && first == 0u) { lse[(batch * dims.heads + head) * dims.queries + query] = highest + log(sum); }
}
