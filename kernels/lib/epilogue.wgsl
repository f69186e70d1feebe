// The end of matmul and conv2d: out = act(acc + bias) + residual, four output channels at a time.
// Needs bindings bias, residual, out and dims.{rows_per_bias, bias_stride4, bias_offset4, n4} in the kernel.
const ACTIVATION: u32 = 0u;      // 0 none, 1 SiLU, 2 GELU (erf), 3 quick GELU, 4 GEGLU
const BIAS: u32 = 0u;            // rows of it: 0 none, 1 one for all, 2 several, but one for a workgroup's tile, 3 several
const HAS_RESIDUAL: bool = false;
const PAIRED: u32 = ACTIVATION / 4u;
const STORES: u32 = 1u;          // 0 where the kernel stores in a way of its own

// x times the normal distribution's integral by Abramowitz & Stegun 26.2.17, |error| < 7.5e-8 of x, from the side that x is on: half the instructions of an erf
// with its sign, and no cancellation where x is below 0.
fn gelu4(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x);
    let t = 1.0 / (1.0 + 0.2316419 * a);
    let tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t;
    return max(x, vec4<f32>(0.0)) - a * (tail * exp2(-0.72134752044 * a * a));
}

fn activate(x: vec4<f32>) -> vec4<f32> {
    if (ACTIVATION == 1u) { return x / (1.0 + exp(-x)); }
    if (ACTIVATION == 2u) { return gelu4(x); }
    if (ACTIVATION == 3u) { return x / (1.0 + exp(-1.702 * x)); }
    return x;
}

fn load_bias(row: u32, n4: u32) -> vec4<f32> {
    if (BIAS == 0u) { return vec4<f32>(0.0); }
    if (BIAS == 1u) { return bias[dims.bias_offset4 + n4]; }
    return bias[(row / dims.rows_per_bias) * dims.bias_stride4 + dims.bias_offset4 + n4];
}

fn load_residual(row: u32, n4: u32) -> residual4 {
    if (!HAS_RESIDUAL) { return residual4(); }
    return residual[row * dims.n4 + n4];
}

//: if 0 < STORES
// Four channels, unless they are PAIRED: their sum with the bias, and what is added last. What is stored, to be summed.
fn store_four(row: u32, n4: u32, sum: vec4<f32>, rest: residual4) -> vec4<f32> {
    var v = activate(sum);
    if (HAS_RESIDUAL) { v += vec4<f32>(rest); }
    let stored = out4(v);
    out[row * dims.n4 + n4] = stored;
    return vec4<f32>(stored);
}

// Two neighbouring groups of four channels, n4 even, which with GEGLU are the value and its gate, and make one output.
fn store_pair(row: u32, n4: u32, value: vec4<f32>, gate: vec4<f32>) {
    out[row * (dims.n4 / 2u) + n4 / 2u] = out4(value * gelu4(gate));
}

// The sums of two neighbouring groups of four channels, n4 even; there may be no second.
fn store_c(row: u32, n4: u32, first: vec4<f32>, second: vec4<f32>) {
    if (PAIRED == 1u) {
        store_pair(row, n4, first + load_bias(row, n4), second + load_bias(row, n4 + 1u));
        return;
    }
    store_four(row, n4, first + load_bias(row, n4), load_residual(row, n4));
    if (n4 + 1u < dims.n4) {
        store_four(row, n4 + 1u, second + load_bias(row, n4 + 1u), load_residual(row, n4 + 1u));
    }
}
//: end
