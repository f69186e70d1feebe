// The product of the register variants: 8 rows by 32 columns a thread, every thread loading its own weights.
// A step is four deep; the kernel fills rows_x. Rows of a thread are 8 apart, so that neighbours take neighbouring rows.
var<private> rows_x: array<vec4<f32>, 8>;
var<private> acc: array<array<vec4<f32>, 8>, 8>;      // [column group][row]

fn multiply_add(k: u32, n4: u32, lane: u32) {
    for (var c = 0u; c < 8u; c++) {
        let at = k * dims.n4 + min(n4 + c, dims.n4 - 1u);
        let w0 = load_weight(b[at]);
        let w1 = load_weight(b[at + dims.n4]);
        let w2 = load_weight(b[at + 2u * dims.n4]);
        let w3 = load_weight(b[at + 3u * dims.n4]);
        for (var r = 0u; r < 8u; r++) {
            acc[c][r] += rows_x[r].x * w0 + rows_x[r].y * w1 + rows_x[r].z * w2 + rows_x[r].w * w3;
        }
    }
}
