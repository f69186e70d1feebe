// Classifier-free guidance and self-attention guidance in one pass, f32 (Hong et al. 2023, in denoised form):
// denoised = D_u + cfg (D_c - D_u) + sag_scale (degraded - D_d), D = c_skip x + c_out output. One thread for one latent pixel.
const UNCOND: bool = true;      // outputs hold uncond, then cond; else cond alone
const SAG: bool = true;

struct Dims { pixels: u32 }     // B h w

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;           // [B, h, w]
@group(0) @binding(1) var<storage, read> outputs: array<vec4<f32>>;     // [2 B, h, w] of the network at x: uncond, cond
@group(0) @binding(2) var<storage, read> degraded: array<vec4<f32>>;    // [B, h, w], uncond's denoised with its mask blurred
@group(0) @binding(3) var<storage, read> renoised: array<vec4<f32>>;    // [B, h, w], degraded with x's noise
@group(0) @binding(4) var<storage, read> again: array<vec4<f32>>;       // [B, h, w] of the network at renoised, uncond
@group(0) @binding(5) var<storage, read_write> denoised: array<vec4<f32>>;
@group(0) @binding(6) var<uniform> dims: Dims;
@group(1) @binding(0) var<uniform> step: Step;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = linear_index(id);
    if (i >= dims.pixels) { return; }
    let first = step.c_skip * x[i] + step.c_out * outputs[i];
    var result = first;
    if (UNCOND) {
        let cond = step.c_skip * x[i] + step.c_out * outputs[dims.pixels + i];
        result = first + step.cfg * (cond - first);
    }
    if (SAG) {
        let denoised_again = step.c_skip * renoised[i] + step.c_out * again[i];
        result += step.sag_scale * (degraded[i] - denoised_again);
    }
    denoised[i] = result;
}
