// The end of a product whose depth several workgroups share: plain sums, one image of C for each share, for
// kernels/matmul/reduce.wgsl.
fn store_c(row: u32, n4: u32, first: vec4<f32>, second: vec4<f32>) {
    let at = (share * SLICES * dims.m + row) * dims.n4 + n4;
    out[at] = first;
    if (n4 + 1u < dims.n4) { out[at + 1u] = second; }
}
