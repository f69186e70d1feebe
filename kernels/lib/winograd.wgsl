// Winograd's minimal filtering of 3x3 convolutions (Lavin and Gray 2015, arXiv 1509.09308), in tiles of four pixels, F(2x2, 3x3), or of two side by side,
// F(2, 3) for each line of taps. With d a tile's inputs, 4x4 or 4 of each of three lines, and g the taps, its outputs are Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A,
// or the sum over three lines of Aᵀ [(G g) ⊙ (Bᵀ d)]; ⊙, summed over channels and lines, is sixteen, or four, products of matrices over all tiles:
//
//     Bᵀ = 1  0 -1  0    G = 1    0    0     Aᵀ = 1  1  1  0
//          0  1  1  0        1/2  1/2  1/2        0  1 -1 -1
//          0 -1  1  0        1/2 -1/2  1/2
//          0  1  0 -1        0    0    1
//
// Images have even sides, or even lines; tiles are counted line by line. `pixels` is a tile's pixels; their square is its inputs, and the products.
// Needs dims.wide, an image's width, in the kernel.

// The first pixel of a tile, both counted from the same image's first or both from the batch's.
fn first_of_tile(tile: u32, pixels: u32) -> u32 {
    if (pixels == 2u) { return tile * 2u; }
    return tile / (dims.wide / 2u) * 2u * dims.wide + tile % (dims.wide / 2u) * 2u;
}

// One of the pixels of a tile of which `first` is the first.
fn pixel_in_tile(first: u32, i: u32) -> u32 { return first + i / 2u * dims.wide + i % 2u; }

// A pixel under a tile's inputs, of an image of `high` lines.
struct Input { pixel: u32, inside: bool }

fn input_of(tile: u32, i: u32, pixels: u32, high: u32) -> Input {
    // Unsigned wrap-around makes a line above the first one very large: outside.
    let line = tile / (dims.wide / 2u) * (pixels / 2u) + i / 4u + 1u - pixels / 2u;
    let column = tile % (dims.wide / 2u) * 2u + i % 4u - 1u;
    return Input(min(line, high - 1u) * dims.wide + min(column, dims.wide - 1u), line < high && column < dims.wide);
}
