// The query projection folded into a prompt's keys: what a row of the network's activations is multiplied by to have its scores, of all
// heads side by side. One thread for a channel and four keys of a head.
alias elem4 = vec4<f16>;
alias weight4 = vec4<f16>;
const BIASED: u32 = 0u;             // 1: the projection has a bias, which by the keys is one of the scores

// A head's channels in groups of four, and the keys that there are and that it has room for; c channels in all.
struct Dims { prompts: u32, c: u32, heads: u32, d4: u32, keys: u32, room4: u32, scale: f32 }

@group(0) @binding(0) var<storage, read> q: array<weight4>;             // [c, heads d4]
@group(0) @binding(1) var<storage, read> kv: array<elem4>;              // [prompts, keys, 2 heads d4]: keys, then values
//: if BIASED < 1
@group(0) @binding(2) var<storage, read_write> folded: array<elem4>;    // [prompts, c, heads, room4]
@group(0) @binding(3) var<uniform> dims: Dims;
//: end
//: if 0 < BIASED
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;        // [heads d4]
@group(0) @binding(3) var<storage, read_write> folded: array<elem4>;    // [prompts, c, heads, room4]
@group(0) @binding(4) var<storage, read_write> folded_bias: array<vec4<f32>>;   // [prompts, heads, room4]
@group(0) @binding(5) var<uniform> dims: Dims;
//: end

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let key = index % dims.room4 * 4u;
    let head = index / dims.room4 % dims.heads;
    let channel = index / (dims.room4 * dims.heads) % dims.c;
    let prompt = index / (dims.room4 * dims.heads * dims.c);
    if (prompt >= dims.prompts) { return; }
    let width = dims.heads * dims.d4;
    let from_q = channel * width + head * dims.d4;
    let from_k = prompt * dims.keys * 2u * width + head * dims.d4;
    var sums = vec4<f32>(0.0);
    for (var i = 0u; i < 4u && key + i < dims.keys; i++) {
        for (var d = 0u; d < dims.d4; d++) {
            sums[i] += dot(vec4<f32>(q[from_q + d]), vec4<f32>(kv[from_k + (key + i) * 2u * width + d]));
        }
    }
    folded[index] = elem4(sums * dims.scale);
    //: if 0 < BIASED
    // Once for a prompt.
    if (channel > 0u) { return; }
    sums = vec4<f32>(0.0);
    for (var i = 0u; i < 4u && key + i < dims.keys; i++) {
        for (var d = 0u; d < dims.d4; d++) {
            sums[i] += dot(bias[head * dims.d4 + d], vec4<f32>(kv[from_k + (key + i) * 2u * width + d]));
        }
    }
    folded_bias[(prompt * dims.heads + head) * dims.room4 + key / 4u] = sums * dims.scale;
    //: end
}
