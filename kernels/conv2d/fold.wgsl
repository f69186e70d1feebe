// The weights of a 3x3 convolution after doubling by nearest neighbour, as four 2x2 convolutions on the small picture: one for each
// parity of the output's line and column. Taps that read the same small pixel are added. One thread for four output channels.
alias weight4 = vec4<f32>;
alias folded4 = vec4<f32>;

struct Dims { channels: u32, n4: u32 }

@group(0) @binding(0) var<storage, read> weight: array<weight4>;            // [3, 3, channels, n4]
@group(0) @binding(1) var<storage, read_write> folded: array<folded4>;      // [2, 2 of parity, 2, 2 taps, channels, n4]
@group(0) @binding(2) var<uniform> dims: Dims;

// The first tap of three, and how many, that read what folded tap `tap` of an even (0) or odd (1) line or column reads.
fn taps(parity: u32, tap: u32) -> vec2<u32> {
    if (parity == 0u) { return select(vec2<u32>(0u, 1u), vec2<u32>(1u, 2u), tap == 1u); }
    return select(vec2<u32>(0u, 2u), vec2<u32>(2u, 1u), tap == 1u);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let one = dims.channels * dims.n4;
    if (index >= 16u * one) { return; }
    let which = index / one;
    let lines = taps(which / 8u, which / 2u % 2u);
    let columns = taps(which / 4u % 2u, which % 2u);
    var sum = vec4<f32>(0.0);
    for (var y = lines.x; y < lines.x + lines.y; y++) {
        for (var x = columns.x; x < columns.x + columns.y; x++) {
            sum += vec4<f32>(weight[(y * 3u + x) * one + index % one]);
        }
    }
    folded[index] = folded4(sum);
}
