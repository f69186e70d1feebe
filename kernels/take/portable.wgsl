// The rows of this call out of the rows of all calls. One thread for four channels.
struct Dims { rows: u32, calls: u32, c4: u32 }

@group(0) @binding(0) var<storage, read> all: array<vec4<f32>>;         // [rows, calls, c4]
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;   // [rows, c4]
@group(0) @binding(2) var<uniform> dims: Dims;
@group(1) @binding(0) var<uniform> step: Step;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.rows * dims.c4) { return; }
    let row = index / dims.c4;
    out[index] = all[(row * dims.calls + step.call) * dims.c4 + index % dims.c4];
}
