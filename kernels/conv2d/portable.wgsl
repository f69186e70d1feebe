// 2-D convolution, channels last: the plain form, one thread for one output pixel and eight output channels.
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

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let pairs = (dims.n4 + 1u) / 2u;
    let row = index / pairs;
    let n4 = index % pairs * 2u;
    if (row >= dims.m) { return; }
    let last = min(n4 + 1u, dims.n4 - 1u);
    let c4s = dims.x4 + dims.y4;
    let p = place(row);
    var acc0 = vec4<f32>(0.0);
    var acc1 = vec4<f32>(0.0);
    for (var tap = 0u; tap < KERNEL * KERNEL; tap++) {
        let t = tap_at(p, tap);
        if (!t.inside) { continue; }
        for (var c4 = 0u; c4 < c4s; c4++) {
            let v = load_x(t.pixel, c4);
            for (var i = 0u; i < 4u; i++) {
                let at = ((tap * c4s + c4) * 4u + i) * dims.n4;
                acc0 += v[i] * load_weight(b[at + n4]);
                acc1 += v[i] * load_weight(b[at + last]);
            }
        }
    }
    store_c(row, n4, acc0, acc1);
}
