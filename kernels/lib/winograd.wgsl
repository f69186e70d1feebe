// Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2015, arXiv 1509.09308): a tile of 2x2 outputs of a 3x3 convolution is
// Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A with d its 4x4 inputs, g the taps, and ⊙, summed over channels, sixteen matrix products over all tiles.
// Images have even sides: tiles are counted line by line, sides / 2 of them a line.
// Needs dims.wide, an image's width, in the kernel.

// The first pixel of a tile, both counted from the same image's first or both from the batch's.
fn first_of_tile(tile: u32) -> u32 { return tile / (dims.wide / 2u) * 2u * dims.wide + tile % (dims.wide / 2u) * 2u; }

// One of the four pixels of a tile of which `first` is the first.
fn pixel_in_tile(first: u32, i: u32) -> u32 { return first + i / 2u * dims.wide + i % 2u; }

// A pixel under a tile's 4x4 inputs, from line and column of its first on, of an image of `high` lines.
struct Input { pixel: u32, inside: bool }

fn input_of(tile: u32, i: u32, high: u32) -> Input {
    // Unsigned wrap-around makes a line above the first one very large: outside.
    let line = tile / (dims.wide / 2u) * 2u + i / 4u - 1u;
    let column = tile % (dims.wide / 2u) * 2u + i % 4u - 1u;
    return Input(min(line, high - 1u) * dims.wide + min(column, dims.wide - 1u), line < high && column < dims.wide);
}
