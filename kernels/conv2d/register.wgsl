// 2-D convolution without workgroup memory or barriers, for software devices: one thread for 8 output pixels and 32 output
// channels, in registers as far as they go (kernels/lib/rows_each.wgsl or rows_shared.wgsl).
// Workgroups of 8, grid (M/64, N/32).
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

@compute @workgroup_size(8)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let row0 = wid.x * 64u + lane;
    let n4 = wid.y * 8u;
    let c4s = dims.x4 + dims.y4;
    var places: array<vec3<u32>, 8>;
    for (var r = 0u; r < 8u; r++) { places[r] = place(min(row0 + r * 8u, dims.m - 1u)); }
    var pixels: array<u32, 8>;
    var inside: array<f32, 8>;
    for (var tap = 0u; tap < KERNEL * KERNEL; tap++) {
        for (var r = 0u; r < 8u; r++) {
            let t = tap_at(places[r], tap);
            pixels[r] = t.pixel;
            inside[r] = select(0.0, 1.0, t.inside);
        }
        for (var c4 = 0u; c4 < c4s; c4++) {
            for (var r = 0u; r < 8u; r++) { rows_x[r] = load_x(pixels[r], c4) * inside[r]; }
            multiply_add((tap * c4s + c4) * 4u, n4, lane);
        }
    }
    for (var r = 0u; r < 8u; r++) {
        let row = row0 + r * 8u;
        if (row >= dims.m) { continue; }
        for (var c = 0u; c < 8u; c += 2u) {
            if (n4 + c < dims.n4) { store_c(row, n4 + c, acc[c][r], acc[c + 1u][r]); }
        }
    }
}
