// Activations in f32 as matrix units take them: f16, scaled down as kernels/lib/coop.wgsl does it, since they may exceed it. One thread for
// four channels of four pixels, so that its loads are under way together.
alias half4 = vec4<f16>;

struct Dims { fours: u32, threads: u32 }

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> out: array<half4>;
@group(0) @binding(2) var<uniform> dims: Dims;

const SCALE: f32 = 64.0;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.threads) { return; }
    //: for i in 0..4
    let at_$i = min(index + $iu * dims.threads, dims.fours - 1u);
    let value_$i = x[at_$i] / SCALE;
    //: end
    //: for i in 0..4
    // What even so is too large is cut off: a bright spot, not an infinity that spreads. Some threads write the last one, all the same.
    out[at_$i] = half4(clamp(value_$i, vec4<f32>(-65504.0), vec4<f32>(65504.0)));
    //: end
}
