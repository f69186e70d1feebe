// A layer norm's scale and shift folded into the linear layer after it, in place: rows of the weight times gamma, the columns then centred,
// so that what a row's mean adds is nothing; beta times the weight joins the bias. The norm that is left scales by the deviation (src/ops/row_sums.rs).
// One thread for four columns.
alias weight4 = vec4<f16>;

struct Dims { k: u32, n4: u32 }

@group(0) @binding(0) var<storage, read> gamma: array<f32>;             // [k]
@group(0) @binding(1) var<storage, read> beta: array<f32>;              // [k]
@group(0) @binding(2) var<storage, read_write> weight: array<weight4>;  // [k, n4]
@group(0) @binding(3) var<storage, read_write> bias: array<vec4<f32>>;  // [n4]
@group(0) @binding(4) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let column = linear_index(id);
    if (column >= dims.n4) { return; }
    var sum = vec4<f32>(0.0);
    var shift = vec4<f32>(0.0);
    for (var row = 0u; row < dims.k; row++) {
        let w = vec4<f32>(weight[row * dims.n4 + column]);
        sum += w * gamma[row];
        shift += w * beta[row];
    }
    let mean = sum / f32(dims.k);
    for (var row = 0u; row < dims.k; row++) {
        let at = row * dims.n4 + column;
        weight[at] = weight4(vec4<f32>(weight[at]) * gamma[row] - mean);
    }
    bias[column] += shift;
}
