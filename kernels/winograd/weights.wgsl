// The weights of a 3x3 convolution as Winograd's products take them, G g Gᵀ, or G g for each of three lines (kernels/lib/winograd.wgsl). One thread for four output channels.
alias weight4 = vec4<f32>;
alias folded4 = vec4<f32>;
const TILED: u32 = 4u;          // pixels of a tile, 2 or 4

struct Dims { channels: u32, n4: u32 }

@group(0) @binding(0) var<storage, read> weight: array<weight4>;            // [3, 3, channels, n4]
@group(0) @binding(1) var<storage, read_write> folded: array<folded4>;      // [4, 4, channels, n4], or [4, 3 lines, channels, n4]
@group(0) @binding(2) var<uniform> dims: Dims;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let one = dims.channels * dims.n4;
    if (index >= one) { return; }
    //: for i in 0..3
    //: for j in 0..3
    let g_$i_$j = vec4<f32>(weight[($iu * 3u + $ju) * one + index]);
    //: end
    //: end
    //: if TILED < 4
    //: for i in 0..3
    folded[(0u + $iu) * one + index] = folded4(g_$i_0);
    folded[(3u + $iu) * one + index] = folded4(0.5 * (g_$i_0 + g_$i_1 + g_$i_2));
    folded[(6u + $iu) * one + index] = folded4(0.5 * (g_$i_0 - g_$i_1 + g_$i_2));
    folded[(9u + $iu) * one + index] = folded4(g_$i_2);
    //: end
    //: end
    //: if 2 < TILED
    //: for j in 0..3
    let t_0_$j = g_0_$j;
    let t_1_$j = 0.5 * (g_0_$j + g_1_$j + g_2_$j);
    let t_2_$j = 0.5 * (g_0_$j - g_1_$j + g_2_$j);
    let t_3_$j = g_2_$j;
    //: end
    //: for i in 0..4
    folded[($iu * 4u + 0u) * one + index] = folded4(t_$i_0);
    folded[($iu * 4u + 1u) * one + index] = folded4(0.5 * (t_$i_0 + t_$i_1 + t_$i_2));
    folded[($iu * 4u + 2u) * one + index] = folded4(0.5 * (t_$i_0 - t_$i_1 + t_$i_2));
    folded[($iu * 4u + 3u) * one + index] = folded4(t_$i_2);
    //: end
    //: end
}
