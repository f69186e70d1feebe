// softmax(Q K^T scale) V, streaming over the keys (Rabe & Staats 2021; Milakov & Gimelshein 2018): the plain form, one
// thread for one query of one head, one key at a time.
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

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);                       // [B, heads, queries]
    if (index >= dims.batch * dims.heads * dims.queries) { return; }
    let query = index % dims.queries;
    let head = index / dims.queries % dims.heads;
    let batch = index / dims.queries / dims.heads;
    let q_at = (batch * dims.queries + query) * dims.q_stride4 + dims.q_offset4 + head * D4;
    let kv_at = batch / dims.kv_repeat * dims.keys * dims.kv_stride4 + head * D4;
    var acc: array<vec4<f32>, D4>;
    for (var d = 0u; d < D4; d++) { acc[d] = vec4<f32>(0.0); }
    var highest = LOWEST;
    var sum = 0.0;
    let keys = select(dims.keys, query + 1u, CAUSAL);
    for (var key = 0u; key < keys; key++) {
        let row = kv_at + key * dims.kv_stride4;
        var score = 0.0;
        for (var d = 0u; d < D4; d++) { score += dot(vec4<f32>(q[q_at + d]), vec4<f32>(kv[row + dims.k_offset4 + d])); }
        score *= dims.scale;
        let next = max(highest, score);
        let keep = exp(highest - next);
        let p = exp(score - next);
        sum = sum * keep + p;
        for (var d = 0u; d < D4; d++) { acc[d] = acc[d] * keep + p * vec4<f32>(kv[row + dims.v_offset4 + d]); }
        highest = next;
    }
    let at = (batch * dims.queries + query) * dims.heads * D4 + head * D4;
    for (var d = 0u; d < D4; d++) { out[at + d] = elem4(acc[d] / sum); }
    if (WITH_LSE) { lse[index] = highest + log(sum); }
}
