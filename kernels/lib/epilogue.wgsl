// The end of matmul and conv2d: out = act(acc + bias) + residual, four output channels at a time.
// Needs bindings bias, residual, out and dims.{rows_per_bias, bias_stride4, bias_offset4, n4} in the kernel.
const ACTIVATION: u32 = 0u;      // 0 none, 1 SiLU, 2 GELU (erf), 3 quick GELU, 4 GEGLU
const HAS_BIAS: bool = false;
const HAS_RESIDUAL: bool = false;
const PAIRED: u32 = ACTIVATION / 4u;

// erf by Abramowitz & Stegun 7.1.26, |error| < 1.5e-7.
fn erf4(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x);
    let t = 1.0 / (1.0 + 0.3275911 * a);
    let p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
    return sign(x) * (1.0 - p * exp(-a * a));
}

fn gelu4(x: vec4<f32>) -> vec4<f32> { return 0.5 * x * (1.0 + erf4(x * 0.70710678118)); }

fn activate(x: vec4<f32>) -> vec4<f32> {
    if (ACTIVATION == 1u) { return x / (1.0 + exp(-x)); }
    if (ACTIVATION == 2u) { return gelu4(x); }
    if (ACTIVATION == 3u) { return x / (1.0 + exp(-1.702 * x)); }
    return x;
}

fn load_bias(row: u32, n4: u32) -> vec4<f32> {
    if (!HAS_BIAS) { return vec4<f32>(0.0); }
    return bias[(row / dims.rows_per_bias) * dims.bias_stride4 + dims.bias_offset4 + n4];
}

// Two neighbouring groups of four channels, n4 even. With GEGLU they are the value and its gate, and make one output.
fn store_c(row: u32, n4: u32, first: vec4<f32>, second: vec4<f32>) {
    if (PAIRED == 1u) {
        let at = row * (dims.n4 / 2u) + n4 / 2u;
        out[at] = out4((first + load_bias(row, n4)) * gelu4(second + load_bias(row, n4 + 1u)));
        return;
    }
    store_four(row, n4, first);
    if (n4 + 1u < dims.n4) { store_four(row, n4 + 1u, second); }
}

// Four channels, unless they are PAIRED.
fn store_four(row: u32, n4: u32, sum: vec4<f32>) {
    let at = row * dims.n4 + n4;
    var v = activate(sum + load_bias(row, n4));
    if (HAS_RESIDUAL) { v += vec4<f32>(residual[at]); }
    out[at] = out4(v);
}
