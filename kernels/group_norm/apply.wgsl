// Group norm, 3 of 3: x scale + shift, and SiLU if asked. One thread for four channels of one pixel; two sources become one.
alias elem4 = vec4<f32>;
alias out4 = vec4<f32>;
const TWO_SOURCES: bool = false;
const SILU: bool = false;

struct Dims { batch: u32, pixels: u32, x4: u32, y4: u32 }

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [B, pixels, x4]
@group(0) @binding(1) var<storage, read> y: array<elem4>;           // [B, pixels, y4]
@group(0) @binding(2) var<storage, read> affine: array<vec4<f32>>;  // [B, x4 + y4, 2]: scale, shift
@group(0) @binding(3) var<storage, read_write> out: array<out4>;    // [B, pixels, x4 + y4]
@group(0) @binding(4) var<uniform> dims: Dims;

fn load(pixel: u32, c4: u32) -> vec4<f32> {
    if (TWO_SOURCES && c4 >= dims.x4) { return vec4<f32>(y[pixel * dims.y4 + c4 - dims.x4]); }
    return vec4<f32>(x[pixel * dims.x4 + c4]);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let c4s = dims.x4 + dims.y4;
    if (index >= dims.batch * dims.pixels * c4s) { return; }
    let c4 = index % c4s;
    let pixel = index / c4s;
    let at = (pixel / dims.pixels * c4s + c4) * 2u;
    var v = load(pixel, c4) * affine[at] + affine[at + 1u];
    if (SILU) { v = v / (1.0 + exp(-v)); }
    out[index] = out4(v);
}
