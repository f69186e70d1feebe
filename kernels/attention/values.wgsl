// P V for some rows of queries on matrix units (kernels/lib/coop.wgsl): attention of heads too wide for attention/coop, 3 of 3.
// Grid (tiles, 1, images of heads).
alias elem4 = vec4<f32>;
alias half4 = vec4<f16>;
alias out4 = vec4<f32>;

// Rows m of an image's queries from q_row on, n4 groups of four of a head's channels, k4 groups of four keys.
struct Dims {
    m: u32, n4: u32, k4: u32, heads: u32,
    q_row: u32, queries: u32,
    kv_row: u32, kv_repeat: u32, kv_stride4: u32, v_offset4: u32,
}

@group(0) @binding(0) var<storage, read> p: array<half4>;               // [slices, m, k4]
@group(0) @binding(1) var<storage, read> kv: array<elem4>;              // [.., kv_stride4]
@group(0) @binding(2) var<storage, read_write> out: array<out4>;        // [.., heads, n4]
@group(0) @binding(3) var<uniform> dims: Dims;

// Where this thread's first loads of the step are.
var<private> a_row: u32;
var<private> a_column: u32;
var<private> b_row: u32;
var<private> b_column: u32;

fn row_of_c(row: u32) -> u32 { return slice / dims.heads * dims.queries + dims.q_row + row; }

fn steps() -> u32 { return dims.k4 / BK4; }

fn prepare(row0: u32, n4_0: u32, local: u32, step: u32) {
    a_row = row0 + own_row(local);
    a_column = local % BK4 + step * BK4;
    b_row = dims.kv_row + slice / dims.heads / dims.kv_repeat * dims.k4 * 4u + own_line(local) + step * BK;
    b_column = n4_0 + local % B_RUN;
}

fn advance() {
    a_column += BK4;
    b_row += BK;
}

fn load_a(i: u32) -> vec4<f16> {
    return vec4<f16>(p[(slice * dims.m + min(a_row + i * A_ROWS, dims.m - 1u)) * dims.k4 + a_column]);
}

fn load_b(i: u32) -> vec4<f16> {
    let key = b_row + i / B_RUNS * B_ROWS;
    let column = slice % dims.heads * dims.n4 + min(b_column + i % B_RUNS * B_RUN, dims.n4 - 1u);
    return operand(vec4<f32>(kv[key * dims.kv_stride4 + dims.v_offset4 + column]));
}

alias residual4 = vec4<f32>;   // of which there is none: lib/bare.wgsl

fn store_four(row: u32, n4: u32, sum: vec4<f32>, rest: residual4) {
    out[(row * dims.heads + slice % dims.heads) * dims.n4 + n4] = out4(sum);
}
