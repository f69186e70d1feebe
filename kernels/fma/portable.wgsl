// The rate of multiply-adds alone: eight chains of vec4 in registers. What is stored depends on all of them.
alias elem4 = vec4<f32>;
const ROUNDS: u32 = 1024u;

struct Dims { threads: u32 }

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;           // one factor for each thread of a workgroup
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;   // [threads]
@group(0) @binding(2) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = linear_index(id);
    let factor = elem4(x[local]);
    //: for i in 0..8
    var v_$i = factor * elem4($i);
    //: end
    for (var round = 0u; round < ROUNDS; round++) {
        //: for i in 0..8
        v_$i = fma(v_$i, factor, factor);
        //: end
    }
    if (index < dims.threads) { out[index] = vec4<f32>(v_0 + v_1 + v_2 + v_3 + v_4 + v_5 + v_6 + v_7); }
}
