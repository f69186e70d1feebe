// The main loop of the tile and half variants: C tile = sum over K of A tile times B tile by multiply-adds, through workgroup memory.
// HALF multiplies in f16, two at once on many GPUs, and adds eight products in f16 before f32 takes their sum.
// The kernel gives what it gives lib/coop.wgsl. A thread has TM rows of eight columns, two neighbouring groups of four.
// A step is BK deep. Its tiles are fetched into registers while the step before is multiplied: between fetch and use stands
// a barrier, over which the drivers do not move them back to their use.
const BM: u32 = 128u;           // a workgroup's tile
const BN: u32 = 128u;
const BK: u32 = 16u;
const TM: u32 = 8u;             // rows of a thread
const B_RUN: u32 = 32u;         // neighbouring groups of four of B that neighbouring threads load
const A_FOURS: u32 = 1u;         // groups of four that a load has
const B_FOURS: u32 = 1u;
const SPLITS: u32 = 1u;         // workgroups that share a tile's steps
const SLICES: u32 = 1u;         // products of one kind side by side
const HALF: u32 = 0u;
const WIDE: bool = false;       // of no meaning here: f32 holds what f32 held
const NORMED: u32 = 0u;          // what lib/coop.wgsl does with the sums of rows is not done here
const SUMMED: u32 = 0u;
const RAGGED: bool = false;     // are there rows or columns beyond the matrix in a tile?
const GROUP: u32 = 8u;          // tiles down before the next column of tiles, so that neighbours share what is cached
const ACROSS: u32 = BN / 8u;    // threads side by side
const THREADS: u32 = (BM / TM) * ACROSS;
const BK4: u32 = BK / 4u;
const BN4: u32 = BN / 4u;
const A_ROW: u32 = BM + 2u;     // four of K of each row, padded, so that neighbouring threads write to different banks
const B_HALF: u32 = ACROSS + 4u; // the even groups of four of a line, then the odd ones: threads side by side read neighbours
const B_ROW: u32 = 2u * B_HALF;
const A_LOADS: u32 = BM * BK4 / THREADS;
const B_LOADS: u32 = BK * BN4 / THREADS;
const A_RUN: u32 = BK4;                             // neighbouring threads that load a row of A
const B_THREADS: u32 = B_RUN;                       // .. and a run of B
const A_ROWS: u32 = THREADS / BK4;                  // rows from one load of a thread to its next
const B_ROWS: u32 = THREADS / B_RUN;
const B_RUNS: u32 = BN4 / B_RUN;
alias part4 = vec4<f32>;
alias loaded_a = part4;
alias loaded_b = part4;

// Which share of the steps this workgroup has.
var<private> share: u32;
// Which of the products side by side it is of.
var<private> slice: u32;

var<workgroup> a_tile: array<part4, BK4 * A_ROW>;   // [k / 4, row]
var<workgroup> b_tile: array<part4, BK * B_ROW>;    // [k, parity, column / 8]

fn taken_a(value: elem4) -> loaded_a { return part4(vec4<f32>(value)); }

// The row of the tile that a thread's first load is of.
fn own_row(local: u32) -> u32 { return local / BK4; }

fn own_line(local: u32) -> u32 { return local / B_RUN; }

// Where group of four `n4` lies in a line of B's tile.
fn b_place(n4: u32) -> u32 { return n4 / 2u + n4 % 2u * B_HALF; }

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
    let down = local / ACROSS * TM;
    let across = local % ACROSS;
    let a_to = local % BK4 * A_ROW + own_row(local);
    let b_to = own_line(local) * B_ROW;
    let b_from = local % B_RUN;
    prepare(row0, n4_0, local, first);
    //: for r in 0..TM
    var acc_$r_0 = vec4<f32>(0.0);
    var acc_$r_1 = vec4<f32>(0.0);
    //: if 0 < HALF
    var few_$r_0 = part4();
    var few_$r_1 = part4();
    //: end
    //: end
    //: for i in 0..A_LOADS
    a_tile[a_to + $iu * A_ROWS] = load_a($iu);
    //: end
    //: for i in 0..B_LOADS
    b_tile[b_to + $iu / B_RUNS * (B_ROWS * B_ROW) + b_place(b_from + $iu % B_RUNS * B_RUN)] = load_b($iu);
    //: end
    workgroupBarrier();
    for (var step = first; step < last; step++) {
        if (step + 1u < last) { advance(); }
        //: for i in 0..A_LOADS
        let next_a_$i = load_a($iu);
        //: end
        //: for i in 0..B_LOADS
        let next_b_$i = load_b($iu);
        //: end
        //: for j in 0..BK4
        {
            //: for r in 0..TM
            let a_$r = a_tile[$ju * A_ROW + down + $ru];
            //: end
            //: for k in 0..4
            {
                let b_0 = b_tile[($ju * 4u + $ku) * B_ROW + across];
                let b_1 = b_tile[($ju * 4u + $ku) * B_ROW + B_HALF + across];
                //: for r in 0..TM
                //: if HALF < 1
                acc_$r_0 = fma(part4(a_$r[$k]), b_0, acc_$r_0);
                acc_$r_1 = fma(part4(a_$r[$k]), b_1, acc_$r_1);
                //: end
                //: if 0 < HALF
                few_$r_0 = fma(part4(a_$r[$k]), b_0, few_$r_0);
                few_$r_1 = fma(part4(a_$r[$k]), b_1, few_$r_1);
                //: end
                //: end
            }
            //: end
            //: if (1 - $j % 2) * (BK4 - 1) < HALF
            //: for r in 0..TM
            acc_$r_0 += vec4<f32>(few_$r_0);
            acc_$r_1 += vec4<f32>(few_$r_1);
            few_$r_0 = part4();
            few_$r_1 = part4();
            //: end
            //: end
        }
        //: end
        workgroupBarrier();
        //: for i in 0..A_LOADS
        a_tile[a_to + $iu * A_ROWS] = next_a_$i;
        //: end
        //: for i in 0..B_LOADS
        b_tile[b_to + $iu / B_RUNS * (B_ROWS * B_ROW) + b_place(b_from + $iu % B_RUNS * B_RUN)] = next_b_$i;
        //: end
        workgroupBarrier();
    }
    let n4 = n4_0 + across * 2u;
    //: for r in 0..TM
    {
        let row = row0 + down + $ru;
        if (!RAGGED || (row < dims.m && n4 < dims.n4)) { store_c(row_of_c(row), n4, acc_$r_0, acc_$r_1); }
    }
    //: end
}
