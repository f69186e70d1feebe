// The end of a convolution in Winograd's tiles, and of shares of its products: Aᵀ m A, then the epilogue. Where a group norm comes next, that does it as it reads
// (lib/ended.wgsl). One thread for four channels of a tile.
alias share4 = vec4<f32>;
alias residual4 = vec4<f16>;
alias out4 = vec4<f16>;
const SPLITS: u32 = 1u;
const TILED: u32 = 4u;          // pixels of a tile, 2 or 4

struct Dims { rows: u32, n4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32, wide: u32 }

@group(0) @binding(0) var<storage, read> shares: array<share4>;      // [SPLITS, TILED TILED, rows / TILED, n4]
@group(0) @binding(1) var<storage, read> bias: array<vec4<f32>>;        // [.., n4]
@group(0) @binding(2) var<storage, read> residual: array<residual4>;    // [rows, n4]
@group(0) @binding(3) var<storage, read_write> out: array<out4>;        // [rows, n4]
@group(0) @binding(4) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let tile = index / dims.n4;
    let c4 = index % dims.n4;
    if (tile >= dims.rows / TILED) { return; }
    let first = first_of_tile(tile, TILED);
    let found = ended_tile(tile, first, c4);
    //: for i in 0..TILED
    out[pixel_in_tile(first, $iu) * dims.n4 + c4] = out4(found[$i]);
    //: end
}
