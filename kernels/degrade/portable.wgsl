// SAG's degraded input in one pass, f32 (Hong et al. 2023): where uncond's self-attention looks most, its predicted picture is
// blurred, and the noise that was there is added again. mass > threshold -> nearest upsample -> 9x9 Gaussian with
// reflected edges -> mix -> re-noise. One thread for one latent pixel (four channels).
struct Dims {
    batch: u32, h: u32, w: u32,
    mid_h: u32, mid_w: u32,             // the mid block's grid, where mass lives
    scale_y: f32, scale_x: f32,         // f32(mid / latent), as PyTorch's nearest
    mask_stride: u32,                   // floats of one image in mask
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;               // [B, h, w]
@group(0) @binding(1) var<storage, read> outputs: array<vec4<f32>>;         // [.., h, w] of the network at x, uncond first
@group(0) @binding(2) var<storage, read> mass: array<f32>;                  // [B, mid_h, mid_w]
@group(0) @binding(3) var<storage, read_write> degraded: array<vec4<f32>>;  // [B, h, w]: D_u, blurred under the mask
@group(0) @binding(4) var<storage, read_write> renoised: array<vec4<f32>>;  // [B, h, w]: degraded + (x - D_u)
@group(0) @binding(5) var<storage, read_write> mask: array<f32>;            // [calls, B, mask_stride]: 1 where blurred
@group(0) @binding(6) var<uniform> dims: Dims;
@group(1) @binding(0) var<uniform> step: Step;

fn denoised(at: u32) -> vec4<f32> { return step.c_skip * x[at] + step.c_out * outputs[at]; }

// The index in 0 .. n-1 that a reflection at both edge pixels (the edge is not repeated) gives for i in -4 .. n+3, n > 4.
fn reflect_edge(i: i32, n: i32) -> u32 {
    let a = abs(i);
    return u32(select(a, 2 * (n - 1) - a, a >= n));
}

fn weight(d: i32) -> f32 {
    switch abs(d) {
        case 0: { return step.blur0; }
        case 1: { return step.blur1; }
        case 2: { return step.blur2; }
        case 3: { return step.blur3; }
        default: { return step.blur4; }
    }
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let i = linear_index(id);
    let area = dims.h * dims.w;
    if (i >= dims.batch * area) { return; }
    let batch = i / area;
    let row = i % area / dims.w;
    let column = i % dims.w;
    let mid_y = min(u32(f32(row) * dims.scale_y), dims.mid_h - 1u);
    let mid_x = min(u32(f32(column) * dims.scale_x), dims.mid_w - 1u);
    let masked = mass[(batch * dims.mid_h + mid_y) * dims.mid_w + mid_x] > step.threshold;
    let before = denoised(i);
    var after = before;
    if (masked) {
        after = vec4<f32>(0.0);
        for (var dy = -4; dy <= 4; dy++) {
            let line = (batch * dims.h + reflect_edge(i32(row) + dy, i32(dims.h))) * dims.w;
            var sum = vec4<f32>(0.0);
            for (var dx = -4; dx <= 4; dx++) {
                sum += weight(dx) * denoised(line + reflect_edge(i32(column) + dx, i32(dims.w)));
            }
            after += weight(dy) * sum;
        }
    }
    degraded[i] = after;
    renoised[i] = after + (x[i] - before);
    mask[(step.call * dims.batch + batch) * dims.mask_stride + i % area] = select(0.0, 1.0, masked);
}
