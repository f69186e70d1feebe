// Eight neighbouring keys (or values) of one group of channels: the 8 threads of a subgroup load one each and hand it round.
var<private> eight: array<vec4<f32>, 8>;

fn load_eight(base: u32, key: u32, lane: u32) {
    let mine = vec4<f32>(kv[base + min(key + lane, dims.keys - 1u) * dims.kv_stride4]);
    eight[0] = subgroupBroadcast(mine, 0u);
    eight[1] = subgroupBroadcast(mine, 1u);
    eight[2] = subgroupBroadcast(mine, 2u);
    eight[3] = subgroupBroadcast(mine, 3u);
    eight[4] = subgroupBroadcast(mine, 4u);
    eight[5] = subgroupBroadcast(mine, 5u);
    eight[6] = subgroupBroadcast(mine, 6u);
    eight[7] = subgroupBroadcast(mine, 7u);
}
