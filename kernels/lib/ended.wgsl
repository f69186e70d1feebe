// The end of a product whose shares the kernel after it sums, in order, and ends as kernels/matmul/reduce.wgsl would (lib/epilogue.wgsl).
// Needs a binding shares [SPLITS, rows, n4] and dims.{rows, n4} in the kernel.
//: if 0 < SPLITS
// Four channels of a row.
fn ended(row: u32, c4: u32) -> vec4<f32> {
    let rest = load_residual(row, c4);
    var sum = load_bias(row, c4);
    //: for s in 0..SPLITS
    sum += shares[($su * dims.rows + row) * dims.n4 + c4];
    //: end
    sum = activate(sum);
    if (HAS_RESIDUAL) { sum += vec4<f32>(rest); }
    return sum;
}
//: end
