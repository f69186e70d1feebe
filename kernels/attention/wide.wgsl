// softmax(Q K^T scale) V, streaming over the keys in blocks of 32 through workgroup memory (Dao et al. 2022): one workgroup
// of 128 for 32 queries of one head. A thread keeps one query's every fourth group of the output in registers.
// Grid (queries/32, heads, B).
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

const MINE: u32 = (D4 + 3u) / 4u;   // output groups of a thread

var<workgroup> q_part: array<vec4<f32>, 132>;       // 4 groups of 32 queries: index d * 33 + query
var<workgroup> k_part: array<vec4<f32>, 132>;       // 4 groups of 32 keys: index d * 33 + key
var<workgroup> scores: array<f32, 1056>;            // 32 queries of 32 keys: index query * 33 + key
var<workgroup> keeps: array<f32, 32>;               // what each query's former sums are multiplied by
var<workgroup> v_part: array<vec4<f32>, 512>;       // 32 keys of 16 groups

fn load_q(batch: u32, head: u32, query: u32, d: u32) -> vec4<f32> {
    if (query >= dims.queries || d >= D4) { return vec4<f32>(0.0); }
    return vec4<f32>(q[(batch * dims.queries + query) * dims.q_stride4 + dims.q_offset4 + head * D4 + d]);
}

fn load_kv(batch: u32, head: u32, key: u32, offset: u32, d: u32) -> vec4<f32> {
    if (key >= dims.keys || d >= D4) { return vec4<f32>(0.0); }
    return vec4<f32>(kv[(batch / dims.kv_repeat * dims.keys + key) * dims.kv_stride4 + offset + head * D4 + d]);
}

@compute @workgroup_size(128)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let first = wid.x * 32u;
    let head = wid.y;
    let batch = wid.z;
    let lane = local % 32u;                 // loads: this query or key of the block
    let band = local / 32u;                 // loads: this group of four
    let sq = local / 8u * 2u;               // scores: two queries ..
    let sk = local % 8u * 4u;               // .. of four keys
    let mine = local / 4u;                  // output: this query of the block
    let part = local % 4u;                  // output: every fourth group from here
    var acc: array<vec4<f32>, MINE>;
    for (var i = 0u; i < MINE; i++) { acc[i] = vec4<f32>(0.0); }
    var highest = LOWEST;                   // of query `local`, in the first 32 threads
    var sum = 0.0;
    for (var block = 0u; block < dims.keys; block += 32u) {
        var s0 = vec4<f32>(0.0);
        var s1 = vec4<f32>(0.0);
        for (var d = 0u; d < D4; d += 4u) {
            q_part[band * 33u + lane] = load_q(batch, head, first + lane, d + band);
            k_part[band * 33u + lane] = load_kv(batch, head, block + lane, dims.k_offset4, d + band);
            workgroupBarrier();
            for (var i = 0u; i < 4u; i++) {
                let a = q_part[i * 33u + sq];
                let b = q_part[i * 33u + sq + 1u];
                let k0 = k_part[i * 33u + sk];
                let k1 = k_part[i * 33u + sk + 1u];
                let k2 = k_part[i * 33u + sk + 2u];
                let k3 = k_part[i * 33u + sk + 3u];
                s0 += vec4<f32>(dot(a, k0), dot(a, k1), dot(a, k2), dot(a, k3));
                s1 += vec4<f32>(dot(b, k0), dot(b, k1), dot(b, k2), dot(b, k3));
            }
            workgroupBarrier();
        }
        for (var i = 0u; i < 4u; i++) {
            scores[sq * 33u + sk + i] = s0[i] * dims.scale;
            scores[sq * 33u + 33u + sk + i] = s1[i] * dims.scale;
        }
        workgroupBarrier();
        if (local < 32u) {
            let query = first + local;
            let end = select(dims.keys, min(dims.keys, query + 1u), CAUSAL);
            let count = min(32u, max(end, block) - block);
            var next = highest;
            for (var i = 0u; i < count; i++) { next = max(next, scores[local * 33u + i]); }
            let keep = exp(highest - next);
            sum *= keep;
            for (var i = 0u; i < 32u; i++) {
                let p = select(0.0, exp(scores[local * 33u + i] - next), i < count);
                scores[local * 33u + i] = p;
                sum += p;
            }
            keeps[local] = keep;
            highest = next;
        }
        workgroupBarrier();
        let keep = keeps[mine];
        for (var chunk = 0u; chunk < MINE; chunk += 4u) {
            for (var i = local; i < 512u; i += 128u) {
                v_part[i] = load_kv(batch, head, block + i / 16u, dims.v_offset4, chunk * 4u + i % 16u);
            }
            workgroupBarrier();
            for (var i = 0u; i < 4u; i++) {
                if (chunk + i < MINE) {
                    var value = acc[chunk + i] * keep;
                    for (var key = 0u; key < 32u; key++) { value += scores[mine * 33u + key] * v_part[key * 16u + i * 4u + part]; }
                    acc[chunk + i] = value;
                }
            }
            workgroupBarrier();
        }
    }
    if (local < 32u) {
        keeps[local] = sum;
        if (WITH_LSE && first + local < dims.queries) {
            lse[(batch * dims.heads + head) * dims.queries + first + local] = highest + log(sum);
        }
    }
    workgroupBarrier();
    let query = first + mine;
    if (query >= dims.queries) { return; }
    let total = keeps[mine];
    let at = (batch * dims.queries + query) * dims.heads * D4 + head * D4;
    for (var i = 0u; i < MINE; i++) {
        let d = i * 4u + part;
        if (d < D4) { out[at + d] = elem4(acc[i] / total); }
    }
}
