// The network's input: out = c_in x in the network's element type, the batch repeated (uncond and cond see the same x).
// Inpainting models see more beside it: the mask and the masked picture's latents, which are not scaled.
// One thread for four channels.
alias elem4 = vec4<f32>;
alias out4 = vec4<f32>;

const EXTRA: u32 = 0u;                      // groups of four channels beside those of x

struct Dims { count: u32, source: u32, c4: u32, area: u32 }     // groups of four: of out, of x; of x's channels; h w

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [B, h, w, c4]
@group(0) @binding(1) var<storage, read> extra: array<vec4<f32>>;   // [h, w, EXTRA]
@group(0) @binding(2) var<storage, read_write> out: array<out4>;    // [n B, h, w, c4 + EXTRA]
@group(0) @binding(3) var<uniform> dims: Dims;
@group(1) @binding(0) var<uniform> step: Step;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.count) { return; }
    let pixel = index / (dims.c4 + EXTRA);
    let group = index % (dims.c4 + EXTRA);
    if (group < dims.c4) {
        out[index] = out4(step.c_in * vec4<f32>(x[(pixel * dims.c4 + group) % dims.source]));
    } else {
        out[index] = out4(extra[pixel % dims.area * EXTRA + group - dims.c4]);
    }
}
