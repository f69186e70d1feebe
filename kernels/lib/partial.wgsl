// The end of a product whose depth several workgroups share: plain sums, one image of C for each share, for
// kernels/matmul/reduce.wgsl. With lib/bare.wgsl.
fn store_four(row: u32, n4: u32, sum: vec4<f32>, rest: residual4) {
    out[(share * SLICES * dims.m + row) * dims.n4 + n4] = out4(sum);
}

fn store_c(row: u32, n4: u32, first: vec4<f32>, second: vec4<f32>) {
    store_four(row, n4, first, residual4());
    if (n4 + 1u < dims.n4) { store_four(row, n4 + 1u, second, residual4()); }
}
