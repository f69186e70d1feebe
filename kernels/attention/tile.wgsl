// softmax(Q K^T scale) V by multiply-adds, streaming over the keys in blocks of 32 through workgroup memory (Dao et al. 2022): one
// workgroup of 128 for 64 queries of one head. A thread has four queries and four keys of a block's scores, and of the output the same
// queries' every eighth group of four channels, all in registers. 16 KiB of workgroup memory. Grid (queries/64, heads, B).
alias elem4 = vec4<f32>;
const D4: u32 = 10u;                // head dim / 4
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

const MINE: u32 = (D4 + 7u) / 8u;   // output groups of a thread
const PAIRS: u32 = (MINE + 1u) / 2u;
const Q_ROW: u32 = 65u;
const K_ROW: u32 = 33u;
const K_AT: u32 = 4u * Q_ROW;

// In turn: four groups of channels of 64 queries, then of 32 keys; the highest scores of each thread; 16 groups of 32 values.
var<workgroup> staged: array<vec4<f32>, 512>;
// exp(score - highest): [key, thread's queries], a vec4 for a thread's four queries, which lie 16 apart.
var<workgroup> weights: array<vec4<f32>, 512>;

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
    let first = wid.x * 64u;
    let head = wid.y;
    let batch = wid.z;
    let mine = local / 8u;                  // queries mine, mine + 16, mine + 32, mine + 48 ..
    let part = local % 8u;                  // .. and keys part, part + 8, .. of a block, groups part, part + 8, .. of the output
    let queries = vec4<u32>(first + mine) + vec4<u32>(0u, 16u, 32u, 48u);
    //: for i in 0..MINE
    //: for r in 0..4
    var acc_$i_$r = vec4<f32>(0.0);
    //: end
    //: end
    var highest = vec4<f32>(LOWEST);        // of this thread's queries
    var sum = vec4<f32>(0.0);               // over this thread's keys
    for (var block = 0u; block < dims.keys; block += 32u) {
        // Scores of four queries and one key each.
        //: for k in 0..4
        var s_$k = vec4<f32>(0.0);
        //: end
        for (var d = 0u; d < D4; d += 4u) {
            //: for i in 0..2
            staged[(local / 64u + 2u * $iu) * Q_ROW + local % 64u] =
                load_q(batch, head, first + local % 64u, d + local / 64u + 2u * $iu);
            //: end
            staged[K_AT + local / 32u * K_ROW + local % 32u] =
                load_kv(batch, head, block + local % 32u, dims.k_offset4, d + local / 32u);
            workgroupBarrier();
            //: for j in 0..4
            {
                //: for r in 0..4
                let q_$r = staged[$ju * Q_ROW + mine + 16u * $ru];
                //: end
                //: for k in 0..4
                let k_$k = staged[K_AT + $ju * K_ROW + part + 8u * $ku];
                s_$k += vec4<f32>(dot(q_0, k_$k), dot(q_1, k_$k), dot(q_2, k_$k), dot(q_3, k_$k));
                //: end
            }
            //: end
            workgroupBarrier();
        }
        var next = highest;
        //: for k in 0..4
        let key_$k = block + part + 8u * $ku;
        var seen_$k = vec4<bool>(key_$k < dims.keys);
        if (CAUSAL) { seen_$k = seen_$k & (vec4<u32>(key_$k) <= queries); }
        s_$k = select(vec4<f32>(LOWEST), s_$k * dims.scale, seen_$k);
        next = max(next, s_$k);
        //: end
        staged[part * 16u + mine] = next;
        workgroupBarrier();
        for (var i = 0u; i < 8u; i++) { next = max(next, staged[i * 16u + mine]); }
        let keep = exp(highest - next);
        highest = next;
        sum *= keep;
        //: for k in 0..4
        let p_$k = select(vec4<f32>(0.0), exp(s_$k - next), seen_$k);
        sum += p_$k;
        weights[(part + 8u * $ku) * 16u + mine] = p_$k;
        //: end
        //: for i in 0..MINE
        //: for r in 0..4
        acc_$i_$r *= keep[$r];
        //: end
        //: end
        workgroupBarrier();
        // The values, 16 groups of four channels at a time: a thread has two of them.
        //: for c in 0..PAIRS
        //: for i in 0..4
        staged[local + 128u * $iu] =
            load_kv(batch, head, block + local / 16u + 8u * $iu, dims.v_offset4, 16u * $cu + local % 16u);
        //: end
        workgroupBarrier();
        for (var key = 0u; key < 32u; key++) {
            let p = weights[key * 16u + mine];
            let v_0 = staged[key * 16u + part];
            //: for r in 0..4
            acc_${2 * $c}_$r = fma(vec4<f32>(p[$r]), v_0, acc_${2 * $c}_$r);
            //: end
            //: if 2 * $c + 1 < MINE
            let v_1 = staged[key * 16u + part + 8u];
            //: for r in 0..4
            acc_${2 * $c + 1}_$r = fma(vec4<f32>(p[$r]), v_1, acc_${2 * $c + 1}_$r);
            //: end
            //: end
        }
        workgroupBarrier();
        //: end
    }
    staged[part * 16u + mine] = sum;
    workgroupBarrier();
    var total = vec4<f32>(0.0);
    for (var i = 0u; i < 8u; i++) { total += staged[i * 16u + mine]; }
    //: for r in 0..4
    if (queries[$r] < dims.queries) {
        if (WITH_LSE && part == 0u) {
            lse[(batch * dims.heads + head) * dims.queries + queries[$r]] = highest[$r] + log(total[$r]);
        }
        let at = (batch * dims.queries + queries[$r]) * dims.heads * D4 + head * D4;
        //: for i in 0..MINE
        if (part + 8u * $iu < D4) { out[at + part + 8u * $iu] = elem4(acc_$i_$r / total[$r]); }
        //: end
    }
    //: end
}
