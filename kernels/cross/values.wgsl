// The output projection folded into a prompt's values: what the weights of all heads side by side are multiplied by to have the layer's
// output. One thread for a key of a head and four channels.
alias elem4 = vec4<f16>;
alias weight4 = vec4<f16>;

// A head's channels in groups of four, and the keys that there are and that it has room for; n4 groups of four channels out.
struct Dims { prompts: u32, n4: u32, heads: u32, d4: u32, keys: u32, room: u32 }

@group(0) @binding(0) var<storage, read> out_weight: array<weight4>;    // [4 heads d4, n4]
@group(0) @binding(1) var<storage, read> kv: array<elem4>;              // [prompts, keys, 2 heads d4]: keys, then values
@group(0) @binding(2) var<storage, read_write> folded: array<elem4>;    // [prompts, heads, room, n4]
@group(0) @binding(3) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let column = index % dims.n4;
    let key = index / dims.n4 % dims.room;
    let head = index / (dims.n4 * dims.room) % dims.heads;
    let prompt = index / (dims.n4 * dims.room * dims.heads);
    if (prompt >= dims.prompts) { return; }
    let width = dims.heads * dims.d4;
    var sum = vec4<f32>(0.0);
    // Beyond the last key there is nothing, and it weighs nothing.
    if (key < dims.keys) {
        for (var d = 0u; d < dims.d4; d++) {
            let value = vec4<f32>(kv[((prompt * dims.keys + key) * 2u + 1u) * width + head * dims.d4 + d]);
            let rows = (head * dims.d4 + d) * 4u * dims.n4 + column;
            sum += value.x * vec4<f32>(out_weight[rows]) + value.y * vec4<f32>(out_weight[rows + dims.n4]);
            sum += value.z * vec4<f32>(out_weight[rows + 2u * dims.n4]) + value.w * vec4<f32>(out_weight[rows + 3u * dims.n4]);
        }
    }
    folded[index] = elem4(sum);
}
