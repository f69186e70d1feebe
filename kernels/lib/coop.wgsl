// The main loop of the coop variants: C tile = sum over K of A tile times B tile on matrix units, through workgroup memory.
// The kernel gives prepare(row0, n4_0, local, step), load_a(i), load_b(i), advance(), steps(), row_of_c(row), dims.m and dims.n4;
// what stores says whether two groups of four make one of the output (PAIRED) and how many rows of a bias there are (BIAS, as lib/epilogue.wgsl has it), and gives
// load_bias(row, n4), load_residual(row, n4), and store_four(row, n4, sum, residual) or store_pair(row, n4, value, gate).
// A step is BK deep. Its tiles are fetched into registers while the step before is multiplied: between fetch and use stands
// a barrier, over which the drivers do not move them back to their use.
const EDGE: u32 = 16u;          // of a matrix
const LANES: u32 = 32u;         // of a subgroup
const BM: u32 = 128u;           // a workgroup's tile ..
const BN: u32 = 128u;
const BK: u32 = 32u;
const WM: u32 = 64u;            // .. and a subgroup's part of it
const WN: u32 = 64u;
const B_RUN: u32 = 32u;         // neighbouring groups of four of B that neighbouring threads load
const A_FOURS: u32 = 1u;         // groups of four that a load has: two where the buffer is of halves, read as numbers of 16 bytes
const B_FOURS: u32 = 1u;
const B_COLUMNS: u32 = 0u;       // 1: load_b gives four of a column, and its tile holds columns
const SPLITS: u32 = 1u;         // workgroups that share a tile's steps
const SLICES: u32 = 1u;         // products of one kind side by side
const WIDE: bool = false;       // A is f32 and may exceed f16: it is scaled down, and the sums up again
const NARROWED: bool = false;   // .. and was, before (kernels/narrow)
const SOFTMAX: u32 = 0u;         // 1: each subgroup's columns of a row are scores, of which only their softmax in powers of two is stored
const KEYS: u32 = 0u;            // .. the first so many of them
const NORMED: u32 = 0u;          // parts of the sums that A's rows came with (kernels/lib/row_sums.wgsl): the sums are of A's rows by centred weights, and row_scale(row) makes them the norm's
const SUMMED: u32 = 0u;          // 1: leave such sums of the rows that are stored, a part for each subgroup's columns
const RAGGED: bool = false;     // are there rows or columns beyond the matrix in a tile?
const C_PAD: u32 = 0u;           // 2: rows of the epilogue's matrices lie in different banks, where there is memory for it (src/ops/tiles.rs)
const GROUP: u32 = 8u;          // tiles down before the next column of tiles, so that neighbours share what is cached
const FM: u32 = WM / EDGE;
const FN: u32 = WN / EDGE;
const SUBGROUPS: u32 = (BM / WM) * (BN / WN);
const THREADS: u32 = SUBGROUPS * LANES;
const BK4: u32 = BK / 4u;
const BN4: u32 = BN / 4u;
const A_ROW: u32 = BK4 + 2u;    // padded, so that the rows of a matrix lie in different banks
const B_LINES: u32 = BK * (1u - B_COLUMNS) + BN * B_COLUMNS;
const B_WIDTH: u32 = BN4 * (1u - B_COLUMNS) + BK4 * B_COLUMNS;
const B_ROW: u32 = B_WIDTH + 2u;
const A_RUN: u32 = BK4 / A_FOURS;                   // neighbouring threads that load a row of A
const B_THREADS: u32 = B_RUN / B_FOURS;             // .. and a run of B
const A_LOADS: u32 = BM * A_RUN / THREADS;
const B_LOADS: u32 = BK * BN4 / B_FOURS / THREADS;
const MATES: u32 = EDGE / 4u;                       // groups of four in a row of a matrix, and lanes that have them
const FOURS: u32 = EDGE * MATES;                    // .. and in a matrix
const C_ROW: u32 = MATES + C_PAD;
const A_ROWS: u32 = THREADS / A_RUN;                // rows from one load of a thread to its next
const B_ROWS: u32 = THREADS / B_THREADS;
const B_RUNS: u32 = B_WIDTH / B_RUN;
alias MatA = coop_mat16x16<f16, A>;
alias MatB = coop_mat16x16<f16, B>;
alias MatC = coop_mat16x16<f32, C>;

// Which share of the steps this workgroup has.
var<private> share: u32;
// Which of the products side by side it is of.
var<private> slice: u32;

// Each a multiple of 16 bytes long: matrices are loaded from such addresses.
var<workgroup> a_tile: array<vec4<f16>, BM * A_ROW>;
var<workgroup> b_tile: array<vec4<f16>, B_LINES * B_ROW>;
var<workgroup> c_tile: array<vec4<f32>, SUBGROUPS * EDGE * C_ROW>;

const SCALE: f32 = 64.0;

alias part4 = vec4<f16>;


fn operand(value: vec4<f32>) -> part4 {
    // What even so is too large is cut off: a bright spot, not an infinity that spreads.
    if (WIDE && !NARROWED) { return vec4<f16>(clamp(value / SCALE, vec4<f32>(-65504.0), vec4<f32>(65504.0))); }
    return vec4<f16>(value);
}

//: if A_FOURS < 2
alias loaded_a = vec4<f16>;
fn taken_a(value: elem4) -> loaded_a { return operand(vec4<f32>(value)); }
fn store_a(at: u32, value: loaded_a) { a_tile[at] = value; }
//: end
//: if 1 < A_FOURS
alias loaded_a = vec4<u32>;
fn taken_a(value: elem4) -> loaded_a { return value; }
fn store_a(at: u32, value: loaded_a) {
    a_tile[at] = halves(value.xy);
    a_tile[at + 1u] = halves(value.zw);
}
//: end
//: if B_FOURS < 2
alias loaded_b = vec4<f16>;
fn store_b(at: u32, value: loaded_b) { b_tile[at] = value; }
//: end
//: if 1 < B_FOURS
alias loaded_b = vec4<u32>;
fn store_b(at: u32, value: loaded_b) {
    b_tile[at] = halves(value.xy);
    b_tile[at + 1u] = halves(value.zw);
}
//: end

// The row of a tile that a thread's first load is of, where `run` neighbouring threads load a row's groups of four and each loads every
// `stride`-th row. A half of a subgroup that has two rows gets them four apart, one that has four two apart: neighbours would meet in
// the same banks.
fn spread(row: u32, run: u32, stride: u32) -> u32 {
    if (stride % 8u != 0u) { return row; }
    if (run == 8u) { return (row & ~7u) | ((row & 7u) >> 1u) | ((row & 1u) << 2u); }
    if (run == 4u) { return (row & ~7u) | ((row & 3u) << 1u) | ((row & 4u) >> 2u); }
    return row;
}

fn own_row(local: u32) -> u32 { return spread(local / A_RUN, BK4, A_ROWS); }

fn own_line(local: u32) -> u32 { return spread(local / B_THREADS, B_RUN, B_ROWS); }

// The row of a matrix that a lane's first group of four of the result is of: neighbours two apart, as rows are padded.
fn own_row_of_c(four: u32) -> u32 {
    let row = four / MATES;
    if (C_PAD > 0u) { return (row & ~3u) | ((row & 1u) << 1u) | ((row & 2u) >> 1u); }
    return row;
}

fn within_c(row: u32, n4: u32) -> bool { return !RAGGED || (row < dims.m && n4 < dims.n4); }

// What is added to four columns of the tile, where it is the same for all rows.
fn bias_of_tile(row0: u32, n4: u32) -> vec4<f32> {
    if (BIAS == 3u || !within_c(row0, n4)) { return vec4<f32>(0.0); }
    return load_bias(row_of_c(row0), n4);
}

// What is added to four columns of a row.
fn residual_of(row: u32, n4: u32) -> residual4 {
    if (!within_c(row, n4)) { return residual4(); }
    return load_residual(row_of_c(row), n4);
}

//: if 0 < SOFTMAX
// Four scores of the columns from `column` on; those that do not count are below every other.
fn scores(value: vec4<f32>, column: u32) -> vec4<f32> {
    return select(vec4<f32>(-1.0e30), value, vec4<u32>(column) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(KEYS));
}

//: end
@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    share = wid.y;
    slice = wid.z;
    let tiles_m = (dims.m + BM - 1u) / BM;
    let tiles_n = (dims.n4 + BN4 - 1u) / BN4;
    let band = wid.x / (GROUP * tiles_n);
    let within = wid.x % (GROUP * tiles_n);
    let band_rows = min(GROUP, tiles_m - band * GROUP);
    let row0 = (band * GROUP + within % band_rows) * BM;
    let n4_0 = within / band_rows * BN4;
    let first = steps() * share / SPLITS;
    let last = steps() * (share + 1u) / SPLITS;
    let subgroup = local / LANES;
    let lane = local % LANES;
    let wm = subgroup / (BN / WN) * WM;
    let wn = subgroup % (BN / WN) * WN;
    let a_to = own_row(local) * A_ROW + local % A_RUN * A_FOURS;
    let b_to = own_line(local) * B_ROW + local % B_THREADS * B_FOURS;
    prepare(row0, n4_0, local, first);
    //: if 0 < NORMED
    //: for r in 0..(BM - 1) / THREADS + 1
    let scale_$r = row_scale(row_of_c(min(row0 + local + $ru * THREADS, dims.m - 1u)));
    //: end
    //: end
    //: for i in 0..FM
    //: for j in 0..FN
    var acc_$i_$j = MatC();
    //: end
    //: end
    //: for i in 0..A_LOADS
    store_a(a_to + $iu * (A_ROWS * A_ROW), load_a($iu));
    //: end
    //: for i in 0..B_LOADS
    store_b(b_to + $iu / B_RUNS * (B_ROWS * B_ROW) + $iu % B_RUNS * B_RUN, load_b($iu));
    //: end
    //: if 0 < NORMED
    // Nothing else is there before the end.
    //: for r in 0..(BM - 1) / THREADS + 1
    if (local + $ru * THREADS < BM) { c_tile[(local + $ru * THREADS) / 4u][(local + $ru * THREADS) % 4u] = scale_$r; }
    //: end
    //: end
    workgroupBarrier();
    // The end of a tile is within the loop, and the loop's own end where no compiler can tell that it comes: NVIDIA's writes out eight
    // turns of a plain one, 80 kB for which every multiprocessor waits (benches/NOTES.md).
    var step = first;
    if (step + 1u < last) { advance(); }
    loop {
        step++;
        //: for i in 0..A_LOADS
        let a_$i = load_a($iu);
        //: end
        //: for i in 0..B_LOADS
        let b_$i = load_b($iu);
        //: end
        //: for k in 0..BK / EDGE
        //: for i in 0..FM
        let fa_$k_$i = coopLoadT<MatA>(&a_tile[(wm + $iu * EDGE) * A_ROW + $ku * EDGE / 4u], A_ROW);
        //: end
        //: for j in 0..FN
        //: if B_COLUMNS < 1
        let fb_$k_$j = coopLoadT<MatB>(&b_tile[$ku * EDGE * B_ROW + (wn + $ju * EDGE) / 4u], B_ROW);
        //: end
        //: if 0 < B_COLUMNS
        let fb_$k_$j = coopLoad<MatB>(&b_tile[(wn + $ju * EDGE) * B_ROW + $ku * EDGE / 4u], B_ROW);
        //: end
        //: end
        //: for i in 0..FM
        //: for j in 0..FN
        acc_$i_$j = coopMultiplyAdd(fa_$k_$i, fb_$k_$j, acc_$i_$j);
        //: end
        //: end
        //: end
        // Beside the products: the next step's loads, and the matrices behind them, need not wait for it.
        if (step + 1u < last) { advance(); }
        workgroupBarrier();
        //: for i in 0..A_LOADS
        store_a(a_to + $iu * (A_ROWS * A_ROW), a_$i);
        //: end
        //: for i in 0..B_LOADS
        store_b(b_to + $iu / B_RUNS * (B_ROWS * B_ROW) + $iu % B_RUNS * B_RUN, b_$i);
        //: end
        workgroupBarrier();
        if (step < last) { continue; }
        // Matrices give up their elements through workgroup memory only, each subgroup its own. What is added to them is fetched a line of
        // matrices ahead: where each fetched its own, each would wait for it.
        const EACH = LANES * (1u + PAIRED);     // groups of four that a subgroup stores at once
        let c_to = subgroup * EDGE * C_ROW;
        let four = lane * (1u + PAIRED);
        let c_from = c_to + own_row_of_c(four) * C_ROW + four % MATES;
        let row_to = row0 + wm + own_row_of_c(four);
        //: if 0 < PAIRED
        // Every other row's lanes take the second of their two groups first: the even ones alone lie in half of the banks.
        let turned = (own_row_of_c(four) >> select(1u, 0u, C_PAD > 0u)) & 1u;
        //: end
        //: if 0 < NORMED
        //: for i in 0..FM
        //: for t in 0..(FOURS - 1) / (LANES * (1 + PAIRED)) + 1
        let own_$i_$t = min(wm + $iu * EDGE + own_row_of_c(four) + $tu * EACH / MATES, BM - 1u);
        let norm_$i_$t = c_tile[own_$i_$t / 4u][own_$i_$t % 4u];
        //: end
        //: end
        workgroupBarrier();
        //: end
        //: for j in 0..FN
        let to4_$j = n4_0 + (wn + $ju * EDGE) / 4u + four % MATES;
        let bias_$j = bias_of_tile(row0, to4_$j);
        //: if 0 < PAIRED
        let gate_$j = bias_of_tile(row0, to4_$j + 1u);
        //: end
        //: end
        //: for i in 0..FM + 1
        //: if $i < FM
        //: for j in 0..FN
        //: for t in 0..(FOURS - 1) / (LANES * (1 + PAIRED)) + 1
        let rest_$i_$j_$t = residual_of(row_to + $iu * EDGE + $tu * EACH / MATES, to4_$j);
        //: end
        //: end
        //: end
        //: if 0 < $i * SOFTMAX
        //: for t in 0..(FOURS - 1) / LANES + 1
        var top_$i_$t = -1.0e30;
        var sum_$i_$t = 0.0;
        //: end
        //: for j in 0..FN
        coopStoreT(acc_${$i - 1}_$j, &c_tile[c_to], C_ROW);
        subgroupBarrier();
        //: for t in 0..(FOURS - 1) / LANES + 1
        //: if NORMED < 1
        let raw_$i_$j_$t = c_tile[c_from + $tu * LANES / MATES * C_ROW];
        //: end
        //: if 0 < NORMED
        let raw_$i_$j_$t = c_tile[c_from + $tu * LANES / MATES * C_ROW] * norm_${$i - 1}_$t + bias_$j;
        //: end
        let score_$i_$j_$t = scores(raw_$i_$j_$t, $ju * EDGE + four % MATES * 4u);
        top_$i_$t = max(top_$i_$t, highest(score_$i_$j_$t));
        //: end
        subgroupBarrier();
        //: end
        //: for t in 0..(FOURS - 1) / LANES + 1
        top_$i_$t = of_row_max(top_$i_$t);
        //: for j in 0..FN
        let weight_$i_$j_$t = exp2(score_$i_$j_$t - top_$i_$t);
        sum_$i_$t += dot(weight_$i_$j_$t, vec4<f32>(1.0));
        //: end
        sum_$i_$t = of_row_sum(sum_$i_$t);
        {
            let row = row_to + ($iu - 1u) * EDGE + $tu * LANES / MATES;
            //: for j in 0..FN
            if (within_c(row, to4_$j)) { store_four(row_of_c(row), to4_$j, weight_$i_$j_$t / sum_$i_$t, residual4()); }
            //: end
        }
        //: end
        //: end
        //: if 0 < $i * (1 - SOFTMAX)
        //: if 0 < SUMMED
        //: for t in 0..(FOURS - 1) / LANES + 1
        var sums_$i_$t = vec2<f32>(0.0);
        //: end
        //: end
        //: for j in 0..FN
        coopStoreT(acc_${$i - 1}_$j, &c_tile[c_to], C_ROW);
        subgroupBarrier();
        //: for t in 0..(FOURS - 1) / (LANES * (1 + PAIRED)) + 1
        {
            // Neighbouring threads store neighbours; where two groups make one of the output, each takes both.
            let taken = c_from + $tu * EACH / MATES * C_ROW;
            let row = row_to + ($iu - 1u) * EDGE + $tu * EACH / MATES;
            if ((FOURS % EACH == 0u || four + $tu * EACH < FOURS) && within_c(row, to4_$j)) {
                //: if NORMED < 1
                let scale = select(1.0, SCALE, WIDE);
                //: end
                //: if 0 < NORMED
                let scale = norm_${$i - 1}_$t;
                //: end
                let to = row_of_c(row);
                //: if PAIRED < 1
                var first = c_tile[taken] * scale + bias_$j;
                if (BIAS == 3u) { first += load_bias(to, to4_$j); }
                //: if SUMMED < 1
                store_four(to, to4_$j, first, rest_${$i - 1}_$j_$t);
                //: end
                //: if 0 < SUMMED
                let kept = store_four(to, to4_$j, first, rest_${$i - 1}_$j_$t);
                sums_$i_$t += vec2<f32>(dot(kept, vec4<f32>(1.0)), dot(kept, kept));
                //: end
                //: end
                //: if 0 < PAIRED
                let one = c_tile[taken + turned];
                let other = c_tile[taken + 1u - turned];
                var first = select(one, other, turned == 1u) * scale + bias_$j;
                var second = select(other, one, turned == 1u) * scale + gate_$j;
                if (BIAS == 3u) {
                    first += load_bias(to, to4_$j);
                    second += load_bias(to, to4_$j + 1u);
                }
                store_pair(to, to4_$j, first, second);
                //: end
            }
        }
        //: end
        subgroupBarrier();
        //: end
        //: if 0 < SUMMED
        //: for t in 0..(FOURS - 1) / LANES + 1
        {
            let sums = vec2<f32>(of_row_sum(sums_$i_$t.x), of_row_sum(sums_$i_$t.y));
            let row = row_to + ($iu - 1u) * EDGE + $tu * LANES / MATES;
            let strip = (n4_0 * 4u + wn) / WN;
            // The lane of a row's first columns in the matrix.
            if (lane % MATES == 0u && lane + $tu * LANES < FOURS && within_c(row, strip * (WN / 4u))) { keep_sums(row_of_c(row), strip, sums); }
        }
        //: end
        //: end
        //: end
        //: end
        if (dims.m > 0u) { break; }
    }
}
