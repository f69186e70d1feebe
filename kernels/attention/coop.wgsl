// softmax(Q K^T scale) V on matrix units, streaming over the keys (Dao et al. 2022): a subgroup for WM queries of one head,
// SUBGROUPS of them for the same keys and values in workgroup memory. Grid (queries / (WM SUBGROUPS), heads, B SHARES): where queries and
// heads are too few to fill a GPU, workgroups have a SHARE of the keys each, and kernels/attention/merge.wgsl puts the parts together.
//
// Matrices cannot be touched element by element, so scores and probabilities pass through workgroup memory, ROWS rows at a time,
// each subgroup by itself. That memory is what the kernel waits for: its rows are padded, and the lanes of a row take their groups
// of four in different order, so that none meet in a bank (benches/NOTES.md).
// Rescaling the output when a row's maximum grows is dear, and done late: a row keeps the maximum of its first block until
// another score exceeds it 2^12 times, which f16 still holds, and then all rows of the subgroup are rescaled at once.
alias elem4 = vec4<f16>;
alias kv4 = vec4<f16>;
alias out4 = vec4<f16>;             // f32 for a part of the keys
const EDGE: u32 = 16u;              // of a matrix
const LANES: u32 = 32u;             // of a subgroup
const D4: u32 = 10u;                // head dim / 4
const DP: u32 = 48u;                // head dim rounded up to matrices
const WM: u32 = 32u;                // queries of a subgroup, a multiple of ROWS
const ROWS: u32 = 16u;              // of a pass: so many matrices that every lane has a group of four
const SUBGROUPS: u32 = 16u;
const SHARES: u32 = 1u;             // workgroups that share the keys
const STAGE: u32 = 1u;              // blocks of EDGE keys from one barrier of the workgroup to the next
const KV_FOURS: u32 = 1u;           // groups of four that a load of keys and values has: two where they are read as numbers of 16 bytes
const RAGGED: bool = false;         // are there keys beside whole stages?
const STAYS: u32 = 0u;              // 1: the end is within the loop, or NVIDIA's compiler writes out eight turns of it: of wide heads, 100 kB (lib/coop.wgsl)
const WITH_LSE: bool = false;       // also write log(sum(exp(scores))) per row, for attention/mass
const PASSES: u32 = WM / ROWS;
const FR: u32 = ROWS / EDGE;        // matrices of a pass
const FM: u32 = WM / EDGE;
const FD: u32 = DP / EDGE;
const THREADS: u32 = SUBGROUPS * LANES;
const DP4: u32 = DP / 4u;
const E4: u32 = EDGE / 4u;
const EACH: u32 = ROWS * E4 / LANES;    // groups of four that a lane has
const MATES: u32 = E4 / EACH;           // lanes of a row
// A key and its value lie side by side. What a matrix has of either beyond the head is the value's or nobody's: queries are zero there, and
// no output is stored. A row is an odd number of 16 bytes, so that the rows of a matrix lie in different banks.
const KV_WIDE: u32 = (D4 + 1u) / 2u * 2u;
const KV_ROW: u32 = (KV_WIDE + DP4) / 4u * 4u + 2u;
const KV_LOADS: u32 = KV_WIDE / KV_FOURS;   // of a key, and of a value
const OWN_ROW: u32 = E4 + 2u;           // of a subgroup's scores, and of its probabilities
const KEYS: u32 = STAGE * EDGE;         // of a stage
const TILE: u32 = KEYS * KV_ROW;
const K_LOADS: u32 = KEYS * KV_LOADS;   // of a stage's keys, and of its values
const ALL_LOADS: u32 = 2u * K_LOADS;
const LOADS: u32 = (ALL_LOADS + THREADS - 1u) / THREADS;
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
@group(0) @binding(1) var<storage, read> kv: array<kv4>;            // [B / kv_repeat, keys, kv_stride4], KV_FOURS in one
@group(0) @binding(2) var<storage, read_write> out: array<out4>;    // [SHARES, B, queries, heads D4]
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;     // [SHARES, B, heads, queries]
@group(0) @binding(4) var<uniform> dims: Dims;

// Keys and values of this stage and of the next. Each array is a multiple of 16 bytes long: matrices are loaded from such addresses.
var<workgroup> kv_tile: array<vec4<f16>, 2u * TILE>;
var<workgroup> s_tile: array<vec4<f32>, SUBGROUPS * ROWS * OWN_ROW>;
var<workgroup> p_tile: array<vec4<f16>, SUBGROUPS * ROWS * OWN_ROW>;

const LOG2E: f32 = 1.44269504089;
const LOWEST: f32 = -1.0e30;        // below every score; fast math forbids infinities
const HEADROOM: f32 = 12.0;

// The stage's load i: first of its keys, then of its values, so that most loads of a thread are known to be of the one or the other.
fn load_kv(base: u32, key0: u32, i: u32) -> kv4 {
    let value = i >= K_LOADS;
    let at = select(i, i - K_LOADS, value);
    let key = key0 + at / KV_LOADS;
    let d4 = at % KV_LOADS * KV_FOURS;
    // Values beyond the last are zero: 0 times what lies there might be no number.
    if (d4 >= D4 || i >= ALL_LOADS || (value && key >= dims.keys)) { return kv4(); }
    let offset = select(dims.k_offset4, dims.v_offset4, value);
    return kv[(base + offset + min(key, dims.keys - 1u) * dims.kv_stride4 + d4) / KV_FOURS];
}

// A group of four of a query; zeros beyond the head.
fn load_q(base: u32, query: u32, d4: u32) -> vec4<f16> {
    if (d4 >= D4) { return vec4<f16>(); }
    return q[base + min(query, dims.queries - 1u) * dims.q_stride4 + d4];
}

fn place_kv(i: u32) -> u32 {
    let value = i >= K_LOADS;
    let at = select(i, i - K_LOADS, value);
    return select(0u, KV_WIDE, value) + at / KV_LOADS * KV_ROW + at % KV_LOADS * KV_FOURS;
}

//: if KV_FOURS < 2
fn store_kv(at: u32, value: kv4) { kv_tile[at] = value; }
//: end
//: if 1 < KV_FOURS
fn store_kv(at: u32, value: kv4) {
    kv_tile[at] = halves(value.xy);
    kv_tile[at + 1u] = halves(value.zw);
}
//: end

// Four scores of the keys from `key` on; those that are not there are below every other.
fn scores(value: vec4<f32>, key: u32) -> vec4<f32> {
    if (!RAGGED) { return value; }
    return select(vec4<f32>(LOWEST), value, vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(dims.keys));
}

// 2^(x scale - top), each by itself: as a vector, compilers hold top four times.
fn weights(x: vec4<f32>, scale: f32, top: f32) -> vec4<f32> {
    return vec4<f32>(exp2(x.x * scale - top), exp2(x.y * scale - top), exp2(x.z * scale - top), exp2(x.w * scale - top));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let head = wid.y;
    //: if SHARES < 2
    let batch = wid.z;
    let from_key = 0u;
    let to_key = dims.keys;
    //: end
    //: if 1 < SHARES
    let batch = wid.z % dims.batch;
    let share = wid.z / dims.batch;
    let stages = (dims.keys + KEYS - 1u) / KEYS;
    let from_key = stages * share / SHARES * KEYS;
    let to_key = min(stages * (share + 1u) / SHARES * KEYS, dims.keys);
    //: end
    let subgroup = local / LANES;
    let lane = local % LANES;
    let first = (wid.x * SUBGROUPS + subgroup) * WM;
    let kv_base = batch / dims.kv_repeat * dims.keys * dims.kv_stride4 + head * D4;
    let own = subgroup * ROWS * OWN_ROW;
    let scale = dims.scale * LOG2E;
    let row = lane / MATES;
    let four = lane % MATES * EACH;
    // A lane's groups of four, in the order in which it takes them.
    //: for c in 0..EACH
    let four_$c = four + ($cu ^ (lane % MATES % EACH));
    //: end

    // All that comes before the first product is fetched at once, ahead of a barrier over which compilers do not move it to its use; many
    // subgroups have no registers left for that, and hide the wait.
    //: if SUBGROUPS < 9
    //: for i in 0..LOADS
    let kv_to_$i = place_kv(local + $iu * THREADS);
    let kv_first_$i = load_kv(kv_base, from_key, local + $iu * THREADS);
    var kv_$i = load_kv(kv_base, from_key + KEYS, local + $iu * THREADS);
    //: end
    //: end
    let q_base = batch * dims.queries * dims.q_stride4 + dims.q_offset4 + head * D4;
    //: if SUBGROUPS < 9
    //: for c in 0..FD
    //: for p in 0..PASSES
    //: for e in 0..EACH
    let q_$c_$p_$e = load_q(q_base, first + $pu * ROWS + (lane + $eu * LANES) / E4, $cu * E4 + (lane + $eu * LANES) % E4);
    //: end
    //: end
    //: end
    //: end
    // Q stays in matrices; it gets there through the probabilities' memory.
    //: for c in 0..FD
    //: for p in 0..PASSES
    subgroupBarrier();
    //: for e in 0..EACH
    //: if 8 < SUBGROUPS
    let q_$c_$p_$e = load_q(q_base, first + $pu * ROWS + (lane + $eu * LANES) / E4, $cu * E4 + (lane + $eu * LANES) % E4);
    //: end
    p_tile[own + (lane + $eu * LANES) / E4 * OWN_ROW + (lane + $eu * LANES) % E4] = q_$c_$p_$e;
    //: end
    subgroupBarrier();
    //: for f in 0..FR
    let fq_${$p * FR + $f}_$c = coopLoadT<MatA>(&p_tile[own + $fu * EDGE * OWN_ROW], OWN_ROW);
    //: end
    //: end
    //: end

    //: for i in 0..FM
    //: for j in 0..FD
    var o_$i_$j = MatC();
    //: end
    //: end
    //: for p in 0..PASSES
    var top_$p = LOWEST;            // what the row's scores are taken relative to
    var sum_$p = 0.0;               // of this lane's part of the row
    //: end
    //: if SUBGROUPS < 9
    //: for i in 0..LOADS
    if (local + $iu * THREADS < ALL_LOADS) { store_kv(kv_to_$i, kv_first_$i); }
    //: end
    //: end
    //: if 8 < SUBGROUPS
    //: for i in 0..LOADS
    let kv_to_$i = place_kv(local + $iu * THREADS);
    var kv_$i = load_kv(kv_base, from_key, local + $iu * THREADS);
    if (local + $iu * THREADS < ALL_LOADS) { store_kv(kv_to_$i, kv_$i); }
    kv_$i = load_kv(kv_base, from_key + KEYS, local + $iu * THREADS);
    //: end
    //: end
    workgroupBarrier();

    var here = 0u;
    //: if STAYS < 1
    for (var stage0 = from_key; stage0 < to_key; stage0 += KEYS) {
    //: end
    //: if 0 < STAYS
    var stage0 = from_key;
    loop {
    //: end
        // The next stage; the one after it is fetched while this one is multiplied.
        let there = TILE - here;
        //: for i in 0..LOADS
        if (local + $iu * THREADS < ALL_LOADS) { store_kv(there + kv_to_$i, kv_$i); }
        kv_$i = load_kv(kv_base, stage0 + 2u * KEYS, local + $iu * THREADS);
        //: end
        //: for b in 0..STAGE
        {
        let key0 = stage0 + $bu * EDGE;
        let block = here + $bu * EDGE * KV_ROW;
        // Scores of the block.
        //: for i in 0..FM
        var s_$i = MatC();
        //: end
        //: for c in 0..FD
        let fk_$c = coopLoad<MatB>(&kv_tile[block + $cu * E4], KV_ROW);
        //: for i in 0..FM
        s_$i = coopMultiplyAdd(fq_$i_$c, fk_$c, s_$i);
        //: end
        //: end
        //: for p in 0..PASSES
        //: for f in 0..FR
        coopStoreT(s_${$p * FR + $f}, &s_tile[own + $fu * EDGE * OWN_ROW], OWN_ROW);
        //: end
        subgroupBarrier();
        //: for c in 0..EACH
        let x_$p_$c = scores(s_tile[own + row * OWN_ROW + four_$c], key0 + four_$c * 4u);
        //: end
        var high_$p = highest(x_$p_0);
        //: for c in 1..EACH
        high_$p = max(high_$p, highest(x_$p_$c));
        //: end
        let peak_$p = scale * of_row_max(high_$p);
        let grew_$p = peak_$p > top_$p + HEADROOM;
        subgroupBarrier();
        //: end
        // A loop that runs once if at all: naga takes matrices where subgroups part ways in loops, not in branches.
        var grew = false;
        //: for p in 0..PASSES
        grew = grew || grew_$p;
        //: end
        for (grew = subgroupAny(grew); grew; grew = false) {
            //: for p in 0..PASSES
            let next_$p = select(top_$p, peak_$p, grew_$p);
            let keep_$p = exp2(top_$p - next_$p);
            top_$p = next_$p;
            sum_$p *= keep_$p;
            //: for j in 0..FD
            //: for f in 0..FR
            coopStoreT(o_${$p * FR + $f}_$j, &s_tile[own + $fu * EDGE * OWN_ROW], OWN_ROW);
            //: end
            subgroupBarrier();
            //: for c in 0..EACH
            s_tile[own + row * OWN_ROW + four_$c] *= keep_$p;
            //: end
            subgroupBarrier();
            //: for f in 0..FR
            o_${$p * FR + $f}_$j = coopLoadT<MatC>(&s_tile[own + $fu * EDGE * OWN_ROW], OWN_ROW);
            //: end
            subgroupBarrier();
            //: end
            //: end
        }
        // Probabilities, and the values that they weigh.
        //: for p in 0..PASSES
        //: for c in 0..EACH
        let p_$p_$c = weights(x_$p_$c, scale, top_$p);
        sum_$p += (p_$p_$c.x + p_$p_$c.y) + (p_$p_$c.z + p_$p_$c.w);
        p_tile[own + row * OWN_ROW + four_$c] = vec4<f16>(p_$p_$c);
        //: end
        subgroupBarrier();
        //: for f in 0..FR
        let fp_${$p * FR + $f} = coopLoadT<MatA>(&p_tile[own + $fu * EDGE * OWN_ROW], OWN_ROW);
        //: end
        //: if $p + 1 < PASSES
        subgroupBarrier();
        //: end
        //: end
        //: for j in 0..FD
        let fv_$j = coopLoadT<MatB>(&kv_tile[block + KV_WIDE + $ju * E4], KV_ROW);
        //: for i in 0..FM
        o_$i_$j = coopMultiplyAdd(fp_$i, fv_$j, o_$i_$j);
        //: end
        //: end
        }
        //: end
        workgroupBarrier();
        here = there;
    //: if STAYS < 1
    }
    //: end
    //: if 0 < STAYS
        stage0 += KEYS;
        if (stage0 < to_key) { continue; }
    //: end

    //: for p in 0..PASSES
    let query_$p = first + $pu * ROWS + row;
    let total_$p = of_row_sum(sum_$p);
    if (WITH_LSE && four == 0u && query_$p < dims.queries) {
        lse[(wid.z * dims.heads + head) * dims.queries + query_$p] = (top_$p + log2(total_$p)) / LOG2E;
    }
    //: for j in 0..FD
    //: for f in 0..FR
    coopStoreT(o_${$p * FR + $f}_$j, &s_tile[own + $fu * EDGE * OWN_ROW], OWN_ROW);
    //: end
    subgroupBarrier();
    if (query_$p < dims.queries) {
        let to = (wid.z * dims.queries + query_$p) * (dims.heads * D4) + head * D4;
        //: for c in 0..EACH
        if ($ju * E4 + four_$c < D4) { out[to + $ju * E4 + four_$c] = out4(s_tile[own + row * OWN_ROW + four_$c] / total_$p); }
        //: end
    }
    subgroupBarrier();
    //: end
    //: end
    //: if 0 < STAYS
        if (dims.batch > 0u) { break; }
    }
    //: end
}
