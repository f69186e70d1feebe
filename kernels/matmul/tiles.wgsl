// C = epilogue(A B) in tiles, on matrix units (kernels/lib/coop.wgsl) or by multiply-adds (kernels/lib/tile.wgsl). A [M, K], B [K, N], C [M, N], K a multiple of BK;
// grid (tiles, shares of K, slices): products side by side have rows and a B of their own each.
alias elem4 = vec4<f16>;
alias weight4 = vec4<f16>;
alias out4 = vec4<f16>;
alias residual4 = vec4<f16>;

struct Dims {
    m: u32, n4: u32, k4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32,
    //: if 0 < NORMED
    per_channel: f32, eps: f32,     // 1 / A's channels; the norm's
    //: end
}

@group(0) @binding(0) var<storage, read> a: array<elem4>;           // [M, K/4], A_FOURS of them in one
@group(0) @binding(1) var<storage, read> b: array<weight4>;         // [K, N/4], B_FOURS of them in one
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;    // [.., N/4]
@group(0) @binding(3) var<storage, read> residual: array<residual4>; // [M, N/4]
//: if NORMED + SUMMED < 1
@group(0) @binding(4) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(5) var<uniform> dims: Dims;
//: end
//: if 0 < NORMED
@group(0) @binding(4) var<storage, read> row_sums: array<vec2<f32>>; // [M, NORMED] of A
@group(0) @binding(5) var<storage, read_write> out: array<out4>;
@group(0) @binding(6) var<uniform> dims: Dims;
//: end
//: if 0 < SUMMED
@group(0) @binding(4) var<storage, read_write> out: array<out4>;
@group(0) @binding(5) var<storage, read_write> kept_sums: array<vec2<f32>>;  // [M, N / WN] of C
@group(0) @binding(6) var<uniform> dims: Dims;

fn keep_sums(row: u32, strip: u32, sums: vec2<f32>) { kept_sums[row * ((dims.n4 * 4u + WN - 1u) / WN) + strip] = sums; }
//: end

// Where this thread's first loads of the step are, and how long rows are, in loads.
var<private> a_row: u32;
var<private> a_at: u32;
var<private> a_width: u32;
var<private> b_at: u32;
var<private> b_column: u32;
var<private> b_width: u32;

fn row_of_c(row: u32) -> u32 { return select(row, slice * dims.m + row, SLICES > 1u); }

fn steps() -> u32 { return dims.k4 / BK4; }

fn prepare(row0: u32, n4_0: u32, local: u32, step: u32) {
    a_width = dims.k4 / A_FOURS;
    a_row = row0 + own_row(local);
    a_at = local % A_RUN + step * A_RUN;
    if (!RAGGED) { a_at += a_row * a_width; }
    b_width = dims.n4 / B_FOURS;
    b_column = n4_0 / B_FOURS + local % B_THREADS;
    b_at = (own_line(local) + step * BK) * b_width;
    if (!RAGGED) { b_at += b_column; }
    if (SLICES > 1u) {
        b_at += slice * dims.k4 * 4u * b_width;
        if (!RAGGED) { a_at += slice * dims.m * a_width; }
    }
}

fn advance() {
    a_at += A_RUN;
    b_at += BK * b_width;
}

fn load_a(i: u32) -> loaded_a {
    if (RAGGED) { return taken_a(a[row_of_c(min(a_row + i * A_ROWS, dims.m - 1u)) * a_width + a_at]); }
    return taken_a(a[a_at + i * (A_ROWS * a_width)]);
}

fn load_b(i: u32) -> loaded_b {
    var at = b_at + i / B_RUNS * B_ROWS * b_width;
    if (RAGGED) {
        at += min(b_column + i % B_RUNS * B_THREADS, b_width - 1u);
    } else {
        at += i % B_RUNS * B_THREADS;
    }
    //: if B_FOURS < 2
    return part4(load_weight(b[at]));
    //: end
    //: if 1 < B_FOURS
    return b[at];
    //: end
}
