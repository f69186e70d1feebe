// softmax(Q K^T scale) V, streaming over the keys, without workgroup memory or barriers, for software devices: one thread
// for one query of one head, four keys at a time. The workgroups of a head are its own, so that neighbouring threads read the
// same keys and a load serves all lanes of a subgroup. Grid (queries/64, heads, B).
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

const LOWEST: f32 = -3.0e38;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(workgroup_id) wid: vec3<u32>) {
    let query = min(id.x, dims.queries - 1u);
    let head = wid.y;
    let batch = wid.z;
    let q_at = (batch * dims.queries + query) * dims.q_stride4 + dims.q_offset4 + head * D4;
    let kv_at = batch / dims.kv_repeat * dims.keys * dims.kv_stride4 + head * D4;
    var acc: array<vec4<f32>, D4>;
    var mine: array<vec4<f32>, D4>;
    for (var d = 0u; d < D4; d++) {
        acc[d] = vec4<f32>(0.0);
        mine[d] = vec4<f32>(q[q_at + d]) * dims.scale;
    }
    var highest = LOWEST;
    var sum = 0.0;
    let end = select(dims.keys, query + 1u, CAUSAL);
    for (var key = 0u; key < dims.keys; key += 4u) {
        // Beyond the last key the last is read again, and its score thrown away.
        let row0 = kv_at + key * dims.kv_stride4;
        let row1 = kv_at + min(key + 1u, dims.keys - 1u) * dims.kv_stride4;
        let row2 = kv_at + min(key + 2u, dims.keys - 1u) * dims.kv_stride4;
        let row3 = kv_at + min(key + 3u, dims.keys - 1u) * dims.kv_stride4;
        var score = vec4<f32>(0.0);
        for (var d = 0u; d < D4; d++) {
            let at = dims.k_offset4 + d;
            let m = mine[d];
            score += vec4<f32>(dot(m, vec4<f32>(kv[row0 + at])), dot(m, vec4<f32>(kv[row1 + at])),
                               dot(m, vec4<f32>(kv[row2 + at])), dot(m, vec4<f32>(kv[row3 + at])));
        }
        score = select(vec4<f32>(LOWEST), score, vec4<u32>(key, key + 1u, key + 2u, key + 3u) < vec4<u32>(end));
        let next = max(highest, max(max(score.x, score.y), max(score.z, score.w)));
        let keep = exp(highest - next);
        let p = exp(score - next);
        sum = sum * keep + dot(p, vec4<f32>(1.0));
        for (var d = 0u; d < D4; d++) {
            let at = dims.v_offset4 + d;
            acc[d] = acc[d] * keep + p.x * vec4<f32>(kv[row0 + at]) + p.y * vec4<f32>(kv[row1 + at])
                   + p.z * vec4<f32>(kv[row2 + at]) + p.w * vec4<f32>(kv[row3 + at]);
        }
        highest = next;
    }
    if (id.x >= dims.queries) { return; }
    let at = (batch * dims.queries + query) * dims.heads * D4 + head * D4;
    for (var d = 0u; d < D4; d++) { out[at + d] = elem4(acc[d] / sum); }
    if (WITH_LSE) { lse[(batch * dims.heads + head) * dims.queries + query] = highest + log(sum); }
}
