// Layer norm over the channels of each row: one subgroup for one row, which it holds in registers. No barrier.
alias elem4 = vec4<f32>;
const LANES: u32 = 32u;         // of a subgroup
const PER: u32 = 3u;            // groups of four channels a lane holds
const ROWS: u32 = 4u;           // rows, and subgroups, of a workgroup
const THREADS: u32 = LANES * ROWS;

struct Dims { rows: u32, c4: u32, eps: f32 }

@group(0) @binding(0) var<storage, read> x: array<elem4>;           // [rows, c4]
@group(0) @binding(1) var<storage, read> gamma: array<vec4<f32>>;   // [c4]
@group(0) @binding(2) var<storage, read> beta: array<vec4<f32>>;    // [c4]
@group(0) @binding(3) var<storage, read_write> out: array<elem4>;   // [rows, c4]
@group(0) @binding(4) var<uniform> dims: Dims;

fn total(value: vec4<f32>) -> f32 { return subgroupAdd(dot(value, vec4<f32>(1.0))); }

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let row = (wid.x + wid.y * 65535u) * ROWS + local / LANES;
    let base = min(row, dims.rows - 1u) * dims.c4;
    let lane = local % LANES;
    let channels = f32(dims.c4 * 4u);
    var sum = vec4<f32>(0.0);
    //: for i in 0..PER
    var v_$i = vec4<f32>(0.0);
    var gamma_$i = vec4<f32>(0.0);
    var beta_$i = vec4<f32>(0.0);
    if (lane + $iu * LANES < dims.c4) {
        v_$i = vec4<f32>(x[base + lane + $iu * LANES]);
        // Before they are needed: they come from memory, while the row is summed.
        gamma_$i = gamma[lane + $iu * LANES];
        beta_$i = beta[lane + $iu * LANES];
    }
    //: end
    //: for i in 0..PER
    sum += v_$i;
    //: end
    let mean = total(sum) / channels;
    var squares = vec4<f32>(0.0);
    //: for i in 0..PER
    if (lane + $iu * LANES < dims.c4) {
        v_$i -= mean;
        squares += v_$i * v_$i;
    }
    //: end
    let scale = 1.0 / sqrt(total(squares) / channels + dims.eps);
    if (row >= dims.rows) { return; }
    //: for i in 0..PER
    if (lane + $iu * LANES < dims.c4) { out[base + lane + $iu * LANES] = elem4(v_$i * scale * gamma_$i + beta_$i); }
    //: end
}
