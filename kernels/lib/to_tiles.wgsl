// What a kernel stores of a Winograd tile's inputs, Bᵀ d B or Bᵀ d (kernels/lib/winograd.wgsl), a line of it a thread: four channels of a row of four
// products' A. Needs the kernel's TO_TILES, pixels of a tile, and its out.
const BANDS: u32 = TO_TILES * TO_TILES / 4u;    // lines of a tile's products

// The lines of inputs that a line of Bᵀ d is the difference of, or the sum; of F(2, 3), the first is the line.
fn line_of(part: u32) -> u32 { return select(part, 1u, part == 3u); }

fn other_line_of(part: u32) -> u32 { return select(select(2u, 1u, part == 2u), 3u, part == 3u); }

fn store_part(part: u32, line: array<vec4<f32>, 4>, other: array<vec4<f32>, 4>, to: u32, apart: u32) {
    var t = line;
    //: if 2 < TO_TILES
    let sign = select(-1.0, 1.0, part == 1u);
    //: for j in 0..4
    t[$j] += sign * other[$j];
    //: end
    //: end
    let first = to + part * 4u * apart;
    out[first] = out4(t[0] - t[2]);
    out[first + apart] = out4(t[1] + t[2]);
    out[first + 2u * apart] = out4(t[2] - t[1]);
    out[first + 3u * apart] = out4(t[1] - t[3]);
}
