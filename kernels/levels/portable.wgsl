// The VAE's picture as pixels: (x + 1) / 2 of red, green and blue in levels of 255, a half up, one word a pixel, red the lowest byte. The highest byte is 1
// where a number was NaN or infinite, else 0. One thread for four pixels.
struct Dims { fours: u32 }

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;           // [pixels], the fourth number of no use
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u32>>;   // [fours]
@group(0) @binding(2) var<uniform> dims: Dims;

fn levels(value: vec4<f32>) -> u32 {
    let scaled = clamp((value.xyz + 1.0) / 2.0, vec3<f32>(0.0), vec3<f32>(1.0)) * 255.0;
    let below = vec3<u32>(scaled);
    let level = below + select(vec3<u32>(0u), vec3<u32>(1u), scaled - vec3<f32>(below) >= vec3<f32>(0.5));
    // By its bits: compilers may take it that numbers are finite.
    let finite = all((bitcast<vec3<u32>>(value.xyz) & vec3<u32>(0x7f800000u)) != vec3<u32>(0x7f800000u));
    return select(0x1000000u, level.x | (level.y << 8u) | (level.z << 16u), finite);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.fours) { return; }
    //: for i in 0..4
    let value_$i = x[index * 4u + $iu];
    //: end
    out[index] = vec4<u32>(levels(value_0), levels(value_1), levels(value_2), levels(value_3));
}
