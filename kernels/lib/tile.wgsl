// The main loop of the tile variants: C tile = sum over K of A tile times B tile, 16 deep, through workgroup memory.
// The kernel gives prepare(row), load_a(row, k4), load_b(k, n4), k4_steps(), dims.m and dims.n4.
var<workgroup> a_tile: array<vec4<f32>, 260>;     // index k4 * 65 + row: the 65 keeps the writes apart
var<workgroup> b_tile: array<vec4<f32>, 256>;     // 16 deep, 16 groups of four columns

@compute @workgroup_size(128)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let row_base = wid.y * 64u;
    let n4_base = wid.x * 16u;
    let ty = local / 8u;                          // 16 bands of 4 rows
    let tx = local % 8u * 2u;                     // 8 pairs of column groups
    let load_row = local % 64u;
    let load_k4 = local / 64u;
    prepare(row_base + load_row);
    var acc: array<vec4<f32>, 8>;
    for (var i = 0u; i < 8u; i++) { acc[i] = vec4<f32>(0.0); }
    let steps = k4_steps();
    for (var k4 = 0u; k4 < steps; k4 += 4u) {
        a_tile[load_k4 * 65u + load_row] = load_a(row_base + load_row, k4 + load_k4);
        a_tile[(load_k4 + 2u) * 65u + load_row] = load_a(row_base + load_row, k4 + load_k4 + 2u);
        b_tile[local] = load_b(k4 * 4u + local / 16u, n4_base + local % 16u);
        b_tile[local + 128u] = load_b(k4 * 4u + local / 16u + 8u, n4_base + local % 16u);
        workgroupBarrier();
        for (var j = 0u; j < 4u; j++) {
            let a0 = a_tile[j * 65u + ty * 4u];
            let a1 = a_tile[j * 65u + ty * 4u + 1u];
            let a2 = a_tile[j * 65u + ty * 4u + 2u];
            let a3 = a_tile[j * 65u + ty * 4u + 3u];
            for (var i = 0u; i < 4u; i++) {
                let b0 = b_tile[(j * 4u + i) * 16u + tx];
                let b1 = b_tile[(j * 4u + i) * 16u + tx + 1u];
                acc[0] += a0[i] * b0; acc[1] += a0[i] * b1;
                acc[2] += a1[i] * b0; acc[3] += a1[i] * b1;
                acc[4] += a2[i] * b0; acc[5] += a2[i] * b1;
                acc[6] += a3[i] * b0; acc[7] += a3[i] * b1;
            }
        }
        workgroupBarrier();
    }
    let n4 = n4_base + tx;
    if (n4 >= dims.n4) { return; }
    for (var r = 0u; r < 4u; r++) {
        let row = row_base + ty * 4u + r;
        if (row < dims.m) { store_c(row, n4, acc[r * 2u], acc[r * 2u + 1u]); }
    }
}
