// Masked latents, f32: out = m a + (1 - m) (picture + sigma noise), so that what is not masked stays the given picture.
// One thread for one latent pixel (four channels).
const NOISE: bool = true;       // at the step's noise level; else the picture itself

struct Dims { pixels: u32, area: u32 }      // B h w, h w

@group(0) @binding(0) var<storage, read> a: array<vec4<f32>>;           // [B, h, w]
@group(0) @binding(1) var<storage, read> mask: array<f32>;              // [h, w], 1 where a stays
@group(0) @binding(2) var<storage, read> picture: array<vec4<f32>>;     // [h, w]
@group(0) @binding(3) var<storage, read> noise: array<vec4<f32>>;       // [B, h, w], unit normals
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;   // [B, h, w]
@group(0) @binding(5) var<uniform> dims: Dims;
@group(1) @binding(0) var<uniform> step: Step;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = linear_index(id);
    if (i >= dims.pixels) { return; }
    let at = i % dims.area;
    var kept = picture[at];
    if (NOISE) { kept += step.sigma * noise[i]; }
    out[i] = mask[at] * a[i] + (1.0 - mask[at]) * kept;
}
