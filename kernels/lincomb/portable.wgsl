// Linear combination of up to four tensors, f32: the sampler's arithmetic. One thread for four numbers.
const TERMS: u32 = 4u;

struct Dims { count: u32 }                                          // groups of four
struct Coefficients { c0: f32, c1: f32, c2: f32, c3: f32 }

@group(0) @binding(0) var<storage, read> x0: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> x1: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> x2: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> x3: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(5) var<uniform> dims: Dims;
@group(1) @binding(0) var<uniform> step: Coefficients;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = linear_index(id);
    if (i >= dims.count) { return; }
    var sum = step.c0 * x0[i];
    if (TERMS > 1u) { sum += step.c1 * x1[i]; }
    if (TERMS > 2u) { sum += step.c2 * x2[i]; }
    if (TERMS > 3u) { sum += step.c3 * x3[i]; }
    out[i] = sum;
}
