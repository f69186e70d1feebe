// Q K^T scale for some rows of queries on matrix units (kernels/lib/coop.wgsl), in f32: attention of heads too wide for
// attention/coop, 1 of 3. Grid (tiles, 1, images of heads): a slice is a head of an image.
alias elem4 = vec4<f32>;

// Rows m of an image's queries from q_row on, n4 groups of four keys, d4 groups of four channels.
struct Dims {
    m: u32, n4: u32, d4: u32, heads: u32,
    q_row: u32, queries: u32, q_stride4: u32, q_offset4: u32,
    kv_row: u32, kv_repeat: u32, kv_stride4: u32, k_offset4: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> q: array<elem4>;               // [.., q_stride4]
@group(0) @binding(1) var<storage, read> kv: array<elem4>;              // [.., kv_stride4]
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;   // [slices, m, n4]
@group(0) @binding(3) var<uniform> dims: Dims;

// Where this thread's first loads of the step are.
var<private> a_row: u32;
var<private> b_row: u32;
var<private> column: u32;

fn row_of_c(row: u32) -> u32 { return slice * dims.m + row; }

fn steps() -> u32 { return dims.d4 / BK4; }

fn prepare(row0: u32, n4_0: u32, local: u32, step: u32) {
    a_row = row0 + own_row(local);
    b_row = n4_0 * 4u + own_line(local);
    column = local % BK4 + step * BK4 + slice % dims.heads * dims.d4;
}

fn advance() { column += BK4; }

fn load_a(i: u32) -> vec4<f16> {
    let row = slice / dims.heads * dims.queries + dims.q_row + min(a_row + i * A_ROWS, dims.m - 1u);
    return operand(vec4<f32>(q[row * dims.q_stride4 + dims.q_offset4 + column]));
}

fn load_b(i: u32) -> vec4<f16> {
    let keys = dims.n4 * 4u;
    let key = dims.kv_row + slice / dims.heads / dims.kv_repeat * keys + min(b_row + i * B_ROWS, keys - 1u);
    return operand(vec4<f32>(kv[key * dims.kv_stride4 + dims.k_offset4 + column]));
}

alias residual4 = vec4<f32>;   // of which there is none: lib/bare.wgsl

fn store_four(row: u32, n4: u32, sum: vec4<f32>, rest: residual4) {
    // Both operands were scaled down, and the sums up once.
    out[row * dims.n4 + n4] = sum * dims.scale * select(1.0, SCALE, WIDE);
}
