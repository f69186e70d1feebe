// Softmax of each row, f32 to f16: attention of heads too wide for attention/coop, 2 of 3. One workgroup for one row.
alias half4 = vec4<f16>;
const THREADS: u32 = 256u;

struct Dims { rows: u32, n4: u32 }

@group(0) @binding(0) var<storage, read> scores: array<vec4<f32>>;      // [rows, n4]
@group(0) @binding(1) var<storage, read_write> out: array<half4>;       // [rows, n4]
@group(0) @binding(2) var<uniform> dims: Dims;

var<workgroup> parts: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let row = min(wid.x + wid.y * 65535u, dims.rows - 1u);
    let base = row * dims.n4;
    var high = vec4<f32>(-1.0e30);
    for (var i = local; i < dims.n4; i += THREADS) { high = max(high, scores[base + i]); }
    parts[local] = max(max(high.x, high.y), max(high.z, high.w));
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if (local < half) { parts[local] = max(parts[local], parts[local + half]); }
        workgroupBarrier();
    }
    let top = parts[0];
    workgroupBarrier();
    var sum = vec4<f32>(0.0);
    for (var i = local; i < dims.n4; i += THREADS) { sum += exp(scores[base + i] - top); }
    parts[local] = dot(sum, vec4<f32>(1.0));
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if (local < half) { parts[local] += parts[local + half]; }
        workgroupBarrier();
    }
    let total = parts[0];
    if (wid.x + wid.y * 65535u >= dims.rows) { return; }
    for (var i = local; i < dims.n4; i += THREADS) { out[base + i] = half4(exp(scores[base + i] - top) / total); }
}
