// A layer norm between two products, of which there is no dispatch: its scale and shift are in the weights of the second, and their columns
// are centred, so that a row's mean adds nothing (kernels/row_sums/fold.wgsl). What is left is to scale each row of the second's sums by
// the row's deviation, for which the first leaves sums and sums of squares of what it stored, in parts (src/ops/row_sums.rs).
//: if 0 < NORMED
fn row_scale(row: u32) -> f32 {
    var sums = vec2<f32>(0.0);
    //: for part in 0..NORMED
    sums += row_sums[row * NORMED + $partu];
    //: end
    let mean = sums.x * dims.per_channel;
    return inverseSqrt(max(sums.y * dims.per_channel - mean * mean, 0.0) + dims.eps);
}
//: end
