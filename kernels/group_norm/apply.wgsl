// Group norm, 3 of 3: x scale + shift, and SiLU if asked. One thread for four channels of four
// pixels, a quarter of the image apart, so that its loads are under way together; two sources become one. Grid (threads, folded, B).
alias elem4 = vec4<f32>;
alias out4 = vec4<f32>;
const TWO_SOURCES: bool = false;
const SILU: bool = false;

struct Dims { pixels: u32, quarter: u32, x4: u32, y4: u32 }

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [B, pixels, x4]
@group(0) @binding(1) var<storage, read> y: array<elem4>;           // [B, pixels, y4]
@group(0) @binding(2) var<storage, read> affine: array<vec4<f32>>;  // [B, x4 + y4, 2]: scale, shift
@group(0) @binding(3) var<storage, read_write> out: array<out4>;    // [B, pixels, x4 + y4]
@group(0) @binding(4) var<uniform> dims: Dims;

fn load(pixel: u32, c4: u32) -> elem4 {
    if (TWO_SOURCES && c4 >= dims.x4) { return y[pixel * dims.y4 + c4 - dims.x4]; }
    return x[pixel * dims.x4 + c4];
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let c4s = dims.x4 + dims.y4;
    let index = linear_index(id);
    let c4 = index % c4s;
    let first = index / c4s;
    if (first >= dims.quarter) { return; }
    let image = id.z * dims.pixels;
    let at = (id.z * c4s + c4) * 2u;
    let scale = affine[at];
    let shift = affine[at + 1u];
    //: for i in 0..4
    let pixel_$i = image + min(first + $iu * dims.quarter, dims.pixels - 1u);
    let value_$i = load(pixel_$i, c4);
    //: end
    //: for i in 0..4
    if (first + $iu * dims.quarter < dims.pixels) {
        var v = vec4<f32>(value_$i) * scale + shift;
        if (SILU) { v = v / (1.0 + exp(-v)); }
        out[pixel_$i * c4s + c4] = out4(v);
    }
    //: end
}
