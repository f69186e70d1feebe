// What a product stores where nothing is added to its sums: kernels/lib/coop.wgsl asks all that store the same. Needs the kernel's residual4.
const PAIRED: u32 = 0u;
const BIAS: u32 = 0u;

fn load_bias(row: u32, n4: u32) -> vec4<f32> { return vec4<f32>(0.0); }

fn load_residual(row: u32, n4: u32) -> residual4 { return residual4(); }
