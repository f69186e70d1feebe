// 2-D convolution as an implicit matrix product in tiles, on matrix units (kernels/lib/coop.wgsl) or by multiply-adds (kernels/lib/tile.wgsl). Steps run over the taps of BK channels,
// then over channels, so that what one tap fetched is still cached for the next. Channels of both sources are multiples of
// BK. Grid (tiles, shares of K, slices).
//
// After doubling by nearest neighbour a 3x3 convolution is four of 2x2 on the small picture (kernels/conv2d/fold.wgsl), one for each
// parity of the output's line and column: DOUBLED, a slice for each. Rows are then pixels of the small picture.
//
// Winograd's products for lines of taps (kernels/lib/winograd.wgsl) are convolutions of 3 lines of one tap, side by side: SLICED, each of a source and weights of its own.
alias elem4 = vec4<f16>;
alias weight4 = vec4<f16>;
alias out4 = vec4<f16>;
alias residual4 = vec4<f16>;
const KERNEL: u32 = 3u;             // 1 or 3 taps a side; 2 where DOUBLED
const COLUMNS: u32 = KERNEL;         // .. a line
const DOUBLED: bool = false;
const SLICED: bool = false;
const TWO_SOURCES: bool = false;    // channels of x, then channels of y, in place of a concatenation
const RESIZE: bool = false;         // nearest-neighbour resize of the input to in_h x in_w before the taps
const LINEAR: bool = true;          // output pixels lie over the stored ones: stride 1, no resize

struct Dims {
    m: u32, n4: u32,                            // output pixels of the batch, output channels / 4
    out_h: u32, out_w: u32, in_h: u32, in_w: u32,
    x4: u32, y4: u32,                           // channels / 4 of the two sources
    stride: u32, pad: u32,                      // pad: rows above and columns to the left
    src_h: u32, src_w: u32,                     // the stored input; in_h, in_w unless RESIZE
    scale_y: f32, scale_x: f32,                 // f32(src / in), as PyTorch's nearest
    rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32,
}

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [B, src_h, src_w, x4], A_FOURS of them in one
@group(0) @binding(1) var<storage, read> y: array<elem4>;           // [B, src_h, src_w, y4], A_FOURS of them in one
@group(0) @binding(2) var<storage, read> b: array<weight4>;         // [KERNEL, KERNEL, 4 (x4 + y4), N/4], B_FOURS of them in one
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;    // [.., N/4]
@group(0) @binding(4) var<storage, read> residual: array<residual4>; // [M, N/4]
@group(0) @binding(5) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(6) var<uniform> dims: Dims;

const TAPS: u32 = KERNEL * COLUMNS;

// Of this thread's loads: the output pixel of the first, and for each which taps are inside the picture (LINEAR: three bits
// for lines, three for columns, four loads a word) or its line and column.
var<private> a_row: u32;
var<private> a_column: u32;
var<private> places: array<u32, A_LOADS>;
// Lines above and columns to the left of the picture.
var<private> pad: vec2<u32>;
// The step: tap, and first channels, in loads.
var<private> tap: vec2<u32>;
var<private> channel: u32;
// How long a source's rows and B's are, in loads.
var<private> x_width: u32;
var<private> y_width: u32;
var<private> b_width: u32;
var<private> b_at: u32;
var<private> b_column: u32;

fn steps() -> u32 { return TAPS * ((dims.x4 + dims.y4) / BK4); }

fn row_of_c(row: u32) -> u32 {
    if (SLICED) { return slice * dims.m + row; }
    if (!DOUBLED) { return row; }
    let p = place(row);
    return ((p.x * dims.out_h + p.y) * 2u + slice / 2u) * 2u * dims.out_w + p.z * 2u + slice % 2u;
}

// Which of up to three taps from `at` - pad on are inside.
fn inside(at: u32, pad: u32, size: u32) -> u32 {
    return select(0u, 1u, at >= pad) | select(0u, 2u, at + 1u - pad < size) | select(0u, 4u, at + 2u - pad < size);
}

fn row_of(i: u32) -> u32 {
    if (RAGGED) { return min(a_row + i * A_ROWS, dims.m - 1u); }
    return a_row + i * A_ROWS;
}

fn prepare(row0: u32, n4_0: u32, local: u32, step: u32) {
    a_row = row0 + own_row(local);
    a_column = local % A_RUN;
    x_width = dims.x4 / A_FOURS;
    y_width = dims.y4 / A_FOURS;
    pad = vec2<u32>(dims.pad, select(0u, dims.pad, COLUMNS == KERNEL));
    if (DOUBLED) { pad = vec2<u32>(1u - slice / 2u, 1u - slice % 2u); }
    //: for i in 0..A_LOADS
    {
        let p = place(row_of($iu));
        if (LINEAR) {
            let bits = inside(p.y, pad.x, dims.in_h) | (inside(p.z, pad.y, dims.in_w) << 3u);
            places[$i / 4] |= bits << ($iu % 4u * 8u);
        } else {
            places[$i] = (p.y << 16u) | p.z;
        }
    }
    //: end
    tap = vec2<u32>(step % TAPS / COLUMNS, step % COLUMNS);
    channel = step / TAPS * A_RUN;
    b_width = dims.n4 / B_FOURS;
    b_column = n4_0 / B_FOURS + local % B_THREADS;
    b_at = (own_line(local) + slice * TAPS * 4u * (dims.x4 + dims.y4)) * b_width;
    if (!RAGGED) { b_at += b_column; }
}

fn advance() {
    tap.y += 1u;
    if (tap.y == COLUMNS) { tap = vec2<u32>(tap.x + 1u, 0u); }
    if (tap.x == KERNEL) {
        tap.x = 0u;
        channel += A_RUN;
    }
}

// Channels of a stored pixel, in the source that the step is of.
fn fetch(pixel: u32) -> loaded_a {
    if (TWO_SOURCES && channel >= x_width) { return taken_a(y[pixel * y_width + channel - x_width + a_column]); }
    return taken_a(x[pixel * x_width + channel + a_column]);
}

fn load_a(i: u32) -> loaded_a {
    let row = row_of(i);
    if (KERNEL == 1u && LINEAR) { return fetch(row); }
    if (LINEAR) {
        let inside = places[i / 4u] >> (i % 4u * 8u);
        if (((inside >> tap.x) & (inside >> (3u + tap.y)) & 1u) == 0u) { return loaded_a(); }
        let own = row + select(0u, slice * dims.m, SLICED);
        return fetch(own + (tap.x - pad.x) * dims.src_w + tap.y - pad.y);
    }
    let p = vec3<u32>(row / (dims.out_h * dims.out_w), places[i] >> 16u, places[i] & 0xffffu);
    let t = tap_at(p, tap.x * KERNEL + tap.y);
    if (!t.inside) { return loaded_a(); }
    return fetch(t.pixel);
}

fn load_b(i: u32) -> loaded_b {
    let depth = (tap.x * COLUMNS + tap.y) * (dims.x4 + dims.y4) * 4u + channel * (4u * A_FOURS) + i / B_RUNS * B_ROWS;
    var at = b_at + depth * b_width;
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
