// What a kernel stores of a Winograd tile's inputs, Bᵀ d B or Bᵀ d (kernels/lib/winograd.wgsl): four channels of a row of each product's A.
// Needs the kernel's TO_TILES, pixels of a tile, and its out.
fn store_transformed(d: array<vec4<f32>, TO_TILES * TO_TILES>, to: u32, apart: u32) {
    //: if TO_TILES < 4
    out[to] = out4(d[0] - d[2]);
    out[to + apart] = out4(d[1] + d[2]);
    out[to + 2u * apart] = out4(d[2] - d[1]);
    out[to + 3u * apart] = out4(d[1] - d[3]);
    //: end
    //: if 2 < TO_TILES
    //: for j in 0..4
    let t_0_$j = d[$j] - d[${8 + $j}];
    let t_1_$j = d[${4 + $j}] + d[${8 + $j}];
    let t_2_$j = d[${8 + $j}] - d[${4 + $j}];
    let t_3_$j = d[${4 + $j}] - d[${12 + $j}];
    //: end
    //: for i in 0..4
    out[to + ($iu * 4u + 0u) * apart] = out4(t_$i_0 - t_$i_2);
    out[to + ($iu * 4u + 1u) * apart] = out4(t_$i_1 + t_$i_2);
    out[to + ($iu * 4u + 2u) * apart] = out4(t_$i_2 - t_$i_1);
    out[to + ($iu * 4u + 3u) * apart] = out4(t_$i_1 - t_$i_3);
    //: end
    //: end
}
