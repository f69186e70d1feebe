// Group norm, 2 of 3: the chunks' sums of a group to one scale and one shift for each channel. One workgroup for one group: its
// threads merge a part each, then each other's (Chan et al. 1979, parallel variance).
struct Dims { batch: u32, pixels: u32, channels: u32, group: u32, chunks: u32, chunk: u32, eps: f32 }

@group(0) @binding(0) var<storage, read> sums: array<f32>;          // [B, chunks, channels/4, 2, 4]
@group(0) @binding(1) var<storage, read> gamma: array<f32>;         // [channels]
@group(0) @binding(2) var<storage, read> beta: array<f32>;          // [channels]
@group(0) @binding(3) var<storage, read_write> affine: array<f32>;  // [B, channels/4, 2, 4]: scale, shift
@group(0) @binding(4) var<uniform> dims: Dims;

const THREADS: u32 = 256u;

// Count, mean, sum of squared deviations.
var<workgroup> parts: array<vec4<f32>, THREADS>;

fn merged(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let count = a.x + b.x;
    let share = b.x / max(count, 1.0);
    let delta = b.y - a.y;
    return vec4<f32>(count, a.y + delta * share, a.z + b.z + delta * delta * a.x * share, 0.0);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let groups = dims.channels / dims.group;
    let batch = wid.x / groups;
    let first = wid.x % groups * dims.group;
    var own = vec4<f32>(0.0);
    let last = dims.chunks * dims.group - 1u;
    for (var begin = local; begin <= last; begin += 4u * THREADS) {
        // Four at a time, so that their loads are under way together; what is beyond the last counts nothing.
        //: for k in 0..4
        let i_$k = min(begin + $ku * THREADS, last);
        let chunk_$k = i_$k / dims.group;
        let c_$k = first + i_$k % dims.group;
        let at_$k = ((batch * dims.chunks + chunk_$k) * (dims.channels / 4u) + c_$k / 4u) * 8u + c_$k % 4u;
        let mean_$k = sums[at_$k];
        let spread_$k = sums[at_$k + 4u];
        //: end
        //: for k in 0..4
        if (begin + $ku * THREADS <= last) {
            let count = f32(min(dims.chunk, dims.pixels - chunk_$k * dims.chunk));
            own = merged(own, vec4<f32>(count, mean_$k, spread_$k, 0.0));
        }
        //: end
    }
    parts[local] = own;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if (local < half) { parts[local] = merged(parts[local], parts[local + half]); }
        workgroupBarrier();
    }
    let all = parts[0];
    for (var i = local; i < dims.group; i += THREADS) {
        let c = first + i;
        let scale = gamma[c] / sqrt(all.z / all.x + dims.eps);
        let at = (batch * (dims.channels / 4u) + c / 4u) * 8u + c % 4u;
        affine[at] = scale;
        affine[at + 4u] = beta[c] - all.y * scale;
    }
}
