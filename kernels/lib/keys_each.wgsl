// Eight neighbouring keys (or values) of one group of channels, every thread loading all of them.
var<private> eight: array<vec4<f32>, 8>;

fn load_eight(base: u32, key: u32, lane: u32) {
    for (var j = 0u; j < 8u; j++) { eight[j] = vec4<f32>(kv[base + min(key + j, dims.keys - 1u) * dims.kv_stride4]); }
}
