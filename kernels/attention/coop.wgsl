// softmax(Q K^T scale) V on matrix units, streaming over the keys (Dao et al. 2022): a subgroup for WM queries of one head,
// SUBGROUPS of them for a block of K and V in workgroup memory. Grid (queries / (WM SUBGROUPS), heads, B).
//
// Matrices cannot be touched element by element, so scores and probabilities pass through workgroup memory, and rescaling the
// output when a row's maximum grows is dear. It is therefore done late: a row keeps the maximum of its first block until
// another score exceeds it 2^12 times, which f16 still holds, and then all rows of the workgroup are rescaled at once.
alias elem4 = vec4<f16>;
const EDGE: u32 = 16u;              // of a matrix
const LANES: u32 = 32u;             // of a subgroup
const D4: u32 = 10u;                // head dim / 4
const DP: u32 = 48u;                // head dim rounded up to matrices
const BKEY: u32 = 16u;              // keys of a block
const WM: u32 = 32u;                // queries of a subgroup, a multiple of LANES
const SUBGROUPS: u32 = 4u;
const WITH_LSE: bool = false;       // also write log(sum(exp(scores))) per row, for attention/mass
const FM: u32 = WM / EDGE;
const FD: u32 = DP / EDGE;
const FK: u32 = BKEY / EDGE;
const THREADS: u32 = SUBGROUPS * LANES;
const DP4: u32 = DP / 4u;
const K4: u32 = BKEY / 4u;
const KV_ROW: u32 = DP4 + 2u;       // padded, so that the rows of a matrix lie in different banks
const S_ROW: u32 = K4 + 1u;
const P_ROW: u32 = K4 + 2u;
const LOADS: u32 = (BKEY * DP4 + THREADS - 1u) / THREADS;
const ROWS: u32 = WM / LANES;       // of a thread
alias MatA = coop_mat16x16<f16, A>;
alias MatB = coop_mat16x16<f16, B>;
alias MatC = coop_mat16x16<f32, C>;

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

// Each a multiple of 16 bytes long: matrices are loaded from such addresses.
var<workgroup> k_tile: array<vec4<f16>, BKEY * KV_ROW>;
var<workgroup> v_tile: array<vec4<f16>, BKEY * KV_ROW>;
var<workgroup> s_tile: array<vec4<f32>, SUBGROUPS * WM * S_ROW>;
var<workgroup> p_tile: array<vec4<f16>, SUBGROUPS * WM * P_ROW>;
// Did some row's maximum grow too far? Whoever finds so writes the same.
var<workgroup> grown: array<u32, 4>;

const LOG2E: f32 = 1.44269504089;
const LOWEST: f32 = -1.0e30;        // below every score; fast math forbids infinities
const HEADROOM: f32 = 12.0;

// Keys beyond the last repeat it; their values are zero, and their share of the sum is taken off at the end.
fn load_k(base: u32, key: u32, d4: u32) -> vec4<f16> {
    if (d4 >= D4) { return vec4<f16>(); }
    return kv[base + min(key, dims.keys - 1u) * dims.kv_stride4 + d4];
}

fn load_v(base: u32, key: u32, d4: u32) -> vec4<f16> {
    if (d4 >= D4 || key >= dims.keys) { return vec4<f16>(); }
    return kv[base + key * dims.kv_stride4 + d4];
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let head = wid.y;
    let batch = wid.z;
    let lane = local % LANES;
    let first = (wid.x * SUBGROUPS + local / LANES) * WM;
    let rows0 = batch / dims.kv_repeat * dims.keys * dims.kv_stride4 + head * D4;
    let k_base = rows0 + dims.k_offset4;
    let v_base = rows0 + dims.v_offset4;
    let s_to = local / LANES * WM * S_ROW;
    let p_to = local / LANES * WM * P_ROW;
    let scale = dims.scale * LOG2E;

    // Q stays in matrices; it gets there through the probabilities' memory, BKEY channels at a time.
    let q_base = batch * dims.queries * dims.q_stride4 + dims.q_offset4 + head * D4;
    //: for h in 0..(FD + FK - 1) / FK
    workgroupBarrier();
    for (var e = lane; e < WM * K4; e += LANES) {
        let row = min(first + e / K4, dims.queries - 1u);
        let d4 = $hu * K4 + e % K4;
        var value = vec4<f16>();
        if (d4 < D4) { value = q[q_base + row * dims.q_stride4 + d4]; }
        p_tile[p_to + e / K4 * P_ROW + e % K4] = value;
    }
    workgroupBarrier();
    //: for c in $h * FK..$h * FK + FK
    //: if $c < FD
    //: for i in 0..FM
    let q_$i_$c = coopLoadT<MatA>(&p_tile[p_to + $iu * EDGE * P_ROW + ($cu - $hu * FK) * EDGE / 4u], P_ROW);
    //: end
    //: end
    //: end
    //: end

    //: for i in 0..FM
    //: for j in 0..FD
    var o_$i_$j = MatC();
    //: end
    //: end
    //: for r in 0..ROWS
    var top_$r = LOWEST;            // what the row's scores are taken relative to
    var sum_$r = 0.0;
    var last_$r = 0.0;              // the score of the block's last key
    //: end
    //: for i in 0..LOADS
    let key_$i = (local + $iu * THREADS) / DP4;
    let d4_$i = (local + $iu * THREADS) % DP4;
    let kv_to_$i = key_$i * KV_ROW + d4_$i;
    if (key_$i < BKEY) { k_tile[kv_to_$i] = load_k(k_base, key_$i, d4_$i); }
    var k_$i = load_k(k_base, BKEY + key_$i, d4_$i);
    var v_$i = load_v(v_base, key_$i, d4_$i);
    //: end
    grown[0] = 0u;
    workgroupBarrier();

    for (var key0 = 0u; key0 < dims.keys; key0 += BKEY) {
        // Scores of the block.
        //: for j in 0..FK
        //: for i in 0..FM
        var s_$i_$j = MatC();
        //: end
        //: for c in 0..FD
        let fk_$j_$c = coopLoad<MatB>(&k_tile[$ju * EDGE * KV_ROW + $cu * EDGE / 4u], KV_ROW);
        //: for i in 0..FM
        s_$i_$j = coopMultiplyAdd(q_$i_$c, fk_$j_$c, s_$i_$j);
        //: end
        //: end
        //: for i in 0..FM
        coopStoreT(s_$i_$j, &s_tile[s_to + $iu * EDGE * S_ROW + $ju * EDGE / 4u], S_ROW);
        //: end
        //: end
        workgroupBarrier();
        //: for r in 0..ROWS
        let s_at_$r = s_to + (lane + $ru * LANES) * S_ROW;
        //: for c in 0..K4
        let x_$r_$c = s_tile[s_at_$r + $cu];
        //: end
        var high_$r = x_$r_0;
        //: for c in 1..K4
        high_$r = max(high_$r, x_$r_$c);
        //: end
        let peak_$r = scale * max(max(high_$r.x, high_$r.y), max(high_$r.z, high_$r.w));
        let grew_$r = peak_$r > top_$r + HEADROOM;
        if (grew_$r) { grown[0] = 1u; }
        //: end
        // From here on nobody reads this block's keys or the last one's values.
        workgroupBarrier();
        let rescale = grown[0];
        //: for i in 0..LOADS
        if (key_$i < BKEY) {
            k_tile[kv_to_$i] = k_$i;
            v_tile[kv_to_$i] = v_$i;
        }
        k_$i = load_k(k_base, key0 + 2u * BKEY + key_$i, d4_$i);
        v_$i = load_v(v_base, key0 + BKEY + key_$i, d4_$i);
        //: end
        if (rescale != 0u) {
            //: for r in 0..ROWS
            let next_$r = select(top_$r, peak_$r, grew_$r);
            let keep_$r = exp2(top_$r - next_$r);
            top_$r = next_$r;
            sum_$r *= keep_$r;
            //: end
            //: for h in 0..(FD + FK - 1) / FK
            workgroupBarrier();
            //: for j in $h * FK..$h * FK + FK
            //: if $j < FD
            //: for i in 0..FM
            coopStoreT(o_$i_$j, &s_tile[s_to + $iu * EDGE * S_ROW + ($ju - $hu * FK) * EDGE / 4u], S_ROW);
            //: end
            //: end
            //: end
            workgroupBarrier();
            //: for r in 0..ROWS
            //: for c in 0..K4
            s_tile[s_at_$r + $cu] *= keep_$r;
            //: end
            //: end
            workgroupBarrier();
            //: for j in $h * FK..$h * FK + FK
            //: if $j < FD
            //: for i in 0..FM
            o_$i_$j = coopLoadT<MatC>(&s_tile[s_to + $iu * EDGE * S_ROW + ($ju - $hu * FK) * EDGE / 4u], S_ROW);
            //: end
            //: end
            //: end
            //: end
        }
        // Probabilities, and the values that they weigh.
        //: for r in 0..ROWS
        last_$r = x_$r_${K4 - 1}.w;
        //: for c in 0..K4
        let p_$r_$c = exp2(x_$r_$c * scale - top_$r);
        sum_$r += (p_$r_$c.x + p_$r_$c.y) + (p_$r_$c.z + p_$r_$c.w);
        p_tile[p_to + (lane + $ru * LANES) * P_ROW + $cu] = vec4<f16>(p_$r_$c);
        //: end
        //: end
        workgroupBarrier();
        grown[0] = 0u;
        //: for c in 0..FK
        //: for i in 0..FM
        let fp_$i_$c = coopLoadT<MatA>(&p_tile[p_to + $iu * EDGE * P_ROW + $cu * EDGE / 4u], P_ROW);
        //: end
        //: end
        //: for j in 0..FD
        //: for c in 0..FK
        let fv_$j_$c = coopLoadT<MatB>(&v_tile[$cu * EDGE * KV_ROW + $ju * EDGE / 4u], KV_ROW);
        //: for i in 0..FM
        o_$i_$j = coopMultiplyAdd(fp_$i_$c, fv_$j_$c, o_$i_$j);
        //: end
        //: end
        //: end
    }

    let surplus = f32((BKEY - dims.keys % BKEY) % BKEY);
    //: for r in 0..ROWS
    let query_$r = first + lane + $ru * LANES;
    let total_$r = sum_$r - surplus * exp2(last_$r * scale - top_$r);
    if (WITH_LSE && query_$r < dims.queries) {
        lse[(batch * dims.heads + head) * dims.queries + query_$r] = (top_$r + log2(total_$r)) / LOG2E;
    }
    //: end
    //: for h in 0..(FD + FK - 1) / FK
    workgroupBarrier();
    //: for j in $h * FK..$h * FK + FK
    //: if $j < FD
    //: for i in 0..FM
    coopStoreT(o_$i_$j, &s_tile[s_to + $iu * EDGE * S_ROW + ($ju - $hu * FK) * EDGE / 4u], S_ROW);
    //: end
    //: end
    //: end
    workgroupBarrier();
    //: for r in 0..ROWS
    if (query_$r < dims.queries) {
        let to_$h_$r = (batch * dims.queries + query_$r) * (dims.heads * D4) + head * D4;
        //: for c in 0..K4
        if ($hu * K4 + $cu < D4) {
            out[to_$h_$r + $hu * K4 + $cu] = elem4(s_tile[s_to + (lane + $ru * LANES) * S_ROW + $cu] / total_$r);
        }
        //: end
    }
    //: end
    //: end
}
