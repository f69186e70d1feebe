// The end of a convolution in Winograd's tiles (kernels/lib/winograd.wgsl), and of shares of its products: Aᵀ m A, or Aᵀ m, then the epilogue (lib/epilogue.wgsl).
// For the group norm that reads it first, or for kernels/winograd/output.wgsl. Needs TILED, pixels of a tile, a binding shares [SPLITS, TILED TILED, rows / TILED, n4]
// and dims.{rows, n4, wide}.

// Four channels of each pixel of a tile, whose first pixel is `row` of the batch.
fn ended_tile(tile: u32, row: u32, c4: u32) -> array<vec4<f32>, TILED> {
    //: for i in 0..TILED
    let rest_$i = load_residual(pixel_in_tile(row, $iu), c4);
    //: end
    let added = load_bias(row, c4);
    let tiles = dims.rows / TILED;
    //: for p in 0..TILED * TILED
    var m_$p = vec4<f32>(shares[($pu * tiles + tile) * dims.n4 + c4]);
    //: for s in 1..SPLITS
    m_$p += vec4<f32>(shares[(($su * TILED * TILED + $pu) * tiles + tile) * dims.n4 + c4]);
    //: end
    //: end
    //: if TILED < 4
    var sums = array<vec4<f32>, TILED>(m_0 + m_1 + m_2 + added, m_1 - m_2 - m_3 + added);
    //: end
    //: if 2 < TILED
    //: for j in 0..4
    let above_$j = m_$j + m_${4 + $j} + m_${8 + $j};
    let below_$j = m_${4 + $j} - m_${8 + $j} - m_${12 + $j};
    //: end
    var sums = array<vec4<f32>, TILED>(
        above_0 + above_1 + above_2 + added, above_1 - above_2 - above_3 + added,
        below_0 + below_1 + below_2 + added, below_1 - below_2 - below_3 + added,
    );
    //: end
    //: for i in 0..TILED
    sums[$i] = activate(sums[$i]);
    if (HAS_RESIDUAL) { sums[$i] += vec4<f32>(rest_$i); }
    //: end
    return sums;
}
