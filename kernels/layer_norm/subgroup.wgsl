// Layer norm over the channels of each row: lanes of one subgroup for one row, which they hold in registers. No barrier.
// With SPLITS the row comes as shares of a product, and this ends that product as well (lib/ended.wgsl).
alias loaded = vec4<f32>;       // what a lane loads at once: four channels, or the bits of eight f16
const FOURS: u32 = 1u;          // groups of four channels in it
const SPAN: u32 = 32u;          // lanes of a row: a power of two within a subgroup
const PER: u32 = 3u;            // loads of a lane
const THREADS: u32 = 128u;
const ROWS: u32 = THREADS / SPAN;
const SPLITS: u32 = 0u;
alias residual4 = vec4<f32>;

//: if SPLITS < 1
struct Dims { rows: u32, c4: u32, eps: f32 }

@group(0) @binding(0) var<storage, read> x: array<loaded>;          // [rows, c4 / FOURS]
@group(0) @binding(1) var<storage, read> gamma: array<vec4<f32>>;   // [c4]
@group(0) @binding(2) var<storage, read> beta: array<vec4<f32>>;    // [c4]
@group(0) @binding(3) var<storage, read_write> out: array<loaded>;  // as x
@group(0) @binding(4) var<uniform> dims: Dims;
//: end
//: if 0 < SPLITS
struct Dims { rows: u32, c4: u32, eps: f32, n4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32 }

@group(0) @binding(0) var<storage, read> shares: array<vec4<f32>>;      // [SPLITS, rows, c4]
@group(0) @binding(1) var<storage, read> bias: array<vec4<f32>>;        // [.., c4]
@group(0) @binding(2) var<storage, read> residual: array<residual4>;    // [rows, c4]
@group(0) @binding(3) var<storage, read> gamma: array<vec4<f32>>;       // [c4]
@group(0) @binding(4) var<storage, read> beta: array<vec4<f32>>;        // [c4]
@group(0) @binding(5) var<storage, read_write> x: array<loaded>;        // [rows, c4 / FOURS]
@group(0) @binding(6) var<storage, read_write> out: array<loaded>;      // as x
@group(0) @binding(7) var<uniform> dims: Dims;

// What a lane would load of a row of x.
fn row_of(row: u32, load: u32) -> loaded {
    //: if FOURS < 2
    return loaded(ended(row, load));
    //: end
    //: if 1 < FOURS
    return loaded(bits(ended(row, load * 2u)), bits(ended(row, load * 2u + 1u)));
    //: end
}
//: end

//: if FOURS < 2
fn four_0(v: loaded) -> vec4<f32> { return vec4<f32>(v); }
//: end
//: if 1 < FOURS
fn four_0(v: loaded) -> vec4<f32> { return vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y)); }
fn four_1(v: loaded) -> vec4<f32> { return vec4<f32>(unpack2x16float(v.z), unpack2x16float(v.w)); }
fn bits(v: vec4<f32>) -> vec2<u32> { return vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw)); }
//: end

/// The sum over the lanes of a row, the same in each.
fn total(value: vec4<f32>) -> f32 {
    var sum = dot(value, vec4<f32>(1.0));
    for (var step = 1u; step < SPAN; step *= 2u) { sum += subgroupShuffleXor(sum, step); }
    return sum;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let row = (wid.x + wid.y * 65535u) * ROWS + local / SPAN;
    let loads = dims.c4 / FOURS;
    let held = min(row, dims.rows - 1u);
    let base = held * loads;
    let lane = local % SPAN;
    let channels = f32(dims.c4 * 4u);
    var sum = vec4<f32>(0.0);
    //: for i in 0..PER
    var row_$i = loaded();
    //: if SPLITS < 1
    if (lane + $iu * SPAN < loads) { row_$i = x[base + lane + $iu * SPAN]; }
    //: end
    //: if 0 < SPLITS
    if (lane + $iu * SPAN < loads) { row_$i = row_of(held, lane + $iu * SPAN); }
    //: end
    //: end
    //: if SPLITS < 1
    // Before they are needed: they come from memory while the row is summed.
    //: for i in 0..PER
    //: for f in 0..FOURS
    var gamma_$i_$f = vec4<f32>(0.0);
    var beta_$i_$f = vec4<f32>(0.0);
    if (lane + $iu * SPAN < loads) {
        gamma_$i_$f = gamma[(lane + $iu * SPAN) * FOURS + $fu];
        beta_$i_$f = beta[(lane + $iu * SPAN) * FOURS + $fu];
    }
    //: end
    //: end
    //: end
    //: if 0 < SPLITS
    // Behind the row's loads: a compiler puts none ahead of a store.
    //: for i in 0..PER
    if (row < dims.rows && lane + $iu * SPAN < loads) { x[base + lane + $iu * SPAN] = row_$i; }
    //: end
    //: end
    //: for i in 0..PER
    //: for f in 0..FOURS
    var v_$i_$f = four_$f(row_$i);
    sum += v_$i_$f;
    //: end
    //: end
    let mean = total(sum) / channels;
    var squares = vec4<f32>(0.0);
    //: for i in 0..PER
    if (lane + $iu * SPAN < loads) {
        //: for f in 0..FOURS
        v_$i_$f -= mean;
        squares += v_$i_$f * v_$i_$f;
        //: end
    }
    //: end
    let scale = 1.0 / sqrt(total(squares) / channels + dims.eps);
    if (row >= dims.rows) { return; }
    //: for i in 0..PER
    if (lane + $iu * SPAN < loads) {
        //: for f in 0..FOURS
        //: if 0 < SPLITS
        // Not before: the shares want the registers.
        let gamma_$i_$f = gamma[(lane + $iu * SPAN) * FOURS + $fu];
        let beta_$i_$f = beta[(lane + $iu * SPAN) * FOURS + $fu];
        //: end
        v_$i_$f = v_$i_$f * scale * gamma_$i_$f + beta_$i_$f;
        //: end
        //: if FOURS < 2
        out[base + lane + $iu * SPAN] = loaded(v_$i_0);
        //: end
        //: if 1 < FOURS
        out[base + lane + $iu * SPAN] = vec4<u32>(bits(v_$i_0), bits(v_$i_1));
        //: end
    }
    //: end
}
