// 2-D convolution without workgroup memory or barriers, for software devices: one thread for two output pixels and sixteen
// output channels. Neighbouring threads take neighbouring pixels, so that a load of the weights serves all lanes of a
// subgroup. Grid (M/128, N/16).
alias elem4 = vec4<f32>;
alias weight4 = vec4<f32>;
alias out4 = vec4<f32>;
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
@group(0) @binding(4) var<storage, read> residual: array<elem4>;    // [M, N/4]
@group(0) @binding(5) var<storage, read_write> out: array<out4>;    // [M, N/4]
@group(0) @binding(6) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(local_invocation_id) lid: vec3<u32>, @builtin(workgroup_id) wid: vec3<u32>) {
    let row0 = wid.x * 128u + lid.x;
    let row1 = row0 + 64u;
    let n4 = wid.y * 4u;
    let last = dims.n4 - 1u;
    let c1 = min(n4 + 1u, last);
    let c2 = min(n4 + 2u, last);
    let c3 = min(n4 + 3u, last);
    let place0 = place(min(row0, dims.m - 1u));
    let place1 = place(min(row1, dims.m - 1u));
    let c4s = dims.x4 + dims.y4;
    var p0 = vec4<f32>(0.0); var p1 = vec4<f32>(0.0); var p2 = vec4<f32>(0.0); var p3 = vec4<f32>(0.0);
    var q0 = vec4<f32>(0.0); var q1 = vec4<f32>(0.0); var q2 = vec4<f32>(0.0); var q3 = vec4<f32>(0.0);
    var at = 0u;
    for (var tap = 0u; tap < KERNEL * KERNEL; tap++) {
        let t0 = tap_at(place0, tap);
        let t1 = tap_at(place1, tap);
        let in0 = select(0.0, 1.0, t0.inside);
        let in1 = select(0.0, 1.0, t1.inside);
        for (var c4 = 0u; c4 < c4s; c4++) {
            let u = load_x(t0.pixel, c4) * in0;
            let v = load_x(t1.pixel, c4) * in1;
            for (var i = 0u; i < 4u; i++) {
                let b0 = load_weight(b[at + n4]);
                let b1 = load_weight(b[at + c1]);
                let b2 = load_weight(b[at + c2]);
                let b3 = load_weight(b[at + c3]);
                let ui = u[i];
                let vi = v[i];
                p0 += ui * b0; p1 += ui * b1; p2 += ui * b2; p3 += ui * b3;
                q0 += vi * b0; q1 += vi * b1; q2 += vi * b2; q3 += vi * b3;
                at += dims.n4;
            }
        }
    }
    if (row0 < dims.m) {
        store_c(row0, n4, p0, p1);
        if (n4 + 2u < dims.n4) { store_c(row0, n4 + 2u, p2, p3); }
    }
    if (row1 < dims.m) {
        store_c(row1, n4, q0, q1);
        if (n4 + 2u < dims.n4) { store_c(row1, n4 + 2u, q2, q3); }
    }
}
