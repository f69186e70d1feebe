// The rows of one matrix, then those of another. One thread for four numbers.
alias elem4 = vec4<f16>;

struct Dims { first: u32, all: u32 }    // groups of four of the one, and of both

@group(0) @binding(0) var<storage, read> above: array<elem4>;
@group(0) @binding(1) var<storage, read> below: array<elem4>;
@group(0) @binding(2) var<storage, read_write> out: array<elem4>;
@group(0) @binding(3) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.all) { return; }
    if (index < dims.first) {
        out[index] = above[index];
    } else {
        out[index] = below[index - dims.first];
    }
}
