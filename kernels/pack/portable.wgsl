// The network's input: out = c_in x in the network's element type, the batch repeated (uncond and cond see the same x).
// One thread for four channels.
alias elem4 = vec4<f32>;
alias out4 = vec4<f32>;

struct Dims { count: u32, source: u32 }     // groups of four: of out, of x

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [B, h, w, c4]
@group(0) @binding(1) var<storage, read_write> out: array<out4>;    // [n B, h, w, c4]
@group(0) @binding(2) var<uniform> dims: Dims;
@group(1) @binding(0) var<uniform> step: Step;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.count) { return; }
    out[index] = out4(step.c_in * vec4<f32>(x[index % dims.source]));
}
