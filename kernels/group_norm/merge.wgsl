// Group norm, 2 of 3: the chunks' sums of a group to one scale and one shift for each channel.
// One thread for one channel; it merges all channels of its group (Chan et al. 1979, parallel variance).
struct Dims { batch: u32, pixels: u32, channels: u32, group: u32, chunks: u32, chunk: u32, eps: f32 }

@group(0) @binding(0) var<storage, read> sums: array<f32>;          // [B, chunks, channels/4, 2, 4]
@group(0) @binding(1) var<storage, read> gamma: array<f32>;         // [channels]
@group(0) @binding(2) var<storage, read> beta: array<f32>;          // [channels]
@group(0) @binding(3) var<storage, read_write> affine: array<f32>;  // [B, channels/4, 2, 4]: scale, shift
@group(0) @binding(4) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.batch * dims.channels) { return; }
    let batch = index / dims.channels;
    let channel = index % dims.channels;
    let first = channel / dims.group * dims.group;
    var count = 0.0;
    var mean = 0.0;
    var squares = 0.0;
    for (var chunk = 0u; chunk < dims.chunks; chunk++) {
        let n = f32(min(dims.chunk, dims.pixels - chunk * dims.chunk));
        for (var c = first; c < first + dims.group; c++) {
            let at = ((batch * dims.chunks + chunk) * (dims.channels / 4u) + c / 4u) * 8u + c % 4u;
            let delta = sums[at] - mean;
            let total = count + n;
            mean += delta * (n / total);
            squares += sums[at + 4u] + delta * delta * (count * n / total);
            count = total;
        }
    }
    let scale = gamma[channel] / sqrt(squares / count + dims.eps);
    let at = (batch * (dims.channels / 4u) + channel / 4u) * 8u + channel % 4u;
    affine[at] = scale;
    affine[at + 4u] = beta[channel] - mean * scale;
}
