// 2-D convolution as an implicit matrix product in tiles of 64 pixels and 64 output channels through workgroup memory
// (kernels/lib/tile.wgsl): K runs over taps, then input channels. Grid (N/64, M/64).
alias elem4 = vec4<f32>;
alias weight4 = vec4<f32>;
alias out4 = vec4<f32>;
alias residual4 = vec4<f32>;
const KERNEL: u32 = 3u;             // 1 or 3 taps a side
const TWO_SOURCES: bool = false;    // channels of x, then channels of y, in place of a concatenation
const RESIZE: bool = false;         // nearest-neighbour resize of the input to in_h x in_w before the taps

struct Dims {
    m: u32, n4: u32,                            // output pixels of the batch, output channels / 4
    out_h: u32, out_w: u32, in_h: u32, in_w: u32,
    x4: u32, y4: u32,                           // channels / 4 of the two sources
    stride: u32, pad: u32,                      // pad: rows above and columns to the left
    src_h: u32, src_w: u32,                     // the stored input; in_h, in_w unless RESIZE
    scale_y: f32, scale_x: f32,                 // f32(src / in), as PyTorch's nearest
    rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32,
}

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [B, src_h, src_w, x4]
@group(0) @binding(1) var<storage, read> y: array<elem4>;           // [B, src_h, src_w, y4]
@group(0) @binding(2) var<storage, read> b: array<weight4>;         // [KERNEL, KERNEL, 4 (x4 + y4), N/4]
@group(0) @binding(3) var<storage, read> bias: array<vec4<f32>>;    // [.., N/4]
@group(0) @binding(4) var<storage, read> residual: array<residual4>; // [M, N/4]
@group(0) @binding(5) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(6) var<uniform> dims: Dims;

// The output pixel whose taps this thread loads.
var<private> loaded: vec3<u32>;

fn prepare(row: u32) { loaded = place(min(row, dims.m - 1u)); }

fn k4_steps() -> u32 { return KERNEL * KERNEL * (dims.x4 + dims.y4); }

fn load_a(row: u32, k4: u32) -> vec4<f32> {
    if (row >= dims.m || k4 >= k4_steps()) { return vec4<f32>(0.0); }
    let c4s = dims.x4 + dims.y4;
    let t = tap_at(loaded, k4 / c4s);
    if (!t.inside) { return vec4<f32>(0.0); }
    return load_x(t.pixel, k4 % c4s);
}

fn load_b(k: u32, n4: u32) -> vec4<f32> {
    if (k >= k4_steps() * 4u || n4 >= dims.n4) { return vec4<f32>(0.0); }
    return load_weight(b[k * dims.n4 + n4]);
}
