// Reads weights and forgets them: the products after it find them in the device's cache instead of waiting for its memory, step after
// step, all workgroups at once. One thread for a line of the cache, then for the next of as many as there are threads.
const COUNT: u32 = 1u;          // buffers
const LINE: u32 = 8u;           // words that the cache fetches at once

struct Dims {
    threads: u32,
    lines_0: u32, lines_1: u32, lines_2: u32, lines_3: u32, lines_4: u32, lines_5: u32, lines_6: u32,
}

//: for i in 0..COUNT
@group(0) @binding($i) var<storage, read> weights_$i: array<u32>;
//: end
@group(0) @binding(${COUNT}) var<storage, read_write> sink: array<u32>;
@group(0) @binding(${COUNT + 1}) var<uniform> dims: Dims;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var sum = 0u;
    //: for i in 0..COUNT
    for (var line = id.x; line < dims.lines_$i; line += dims.threads) { sum += weights_$i[line * LINE]; }
    //: end
    // So that the loads are not left out; nobody reads it.
    if (sum == 1u) { sink[0] = sum; }
}
