// The product of the subgroup variants: 8 rows by 32 columns a thread, the 8 threads of a subgroup loading one column group
// each and handing it round. On lavapipe a load costs the same whether its lanes agree or not, and a broadcast is nearly free.
// A step is four deep; the kernel fills rows_x. Rows of a thread are 8 apart, so that neighbours take neighbouring rows.
var<private> rows_x: array<vec4<f32>, 8>;
var<private> acc: array<array<vec4<f32>, 8>, 8>;      // [column group][row]

fn multiply_add(k: u32, n4: u32, lane: u32) {
    let at = k * dims.n4 + min(n4 + lane, dims.n4 - 1u);
    let w0 = load_weight(b[at]);
    let w1 = load_weight(b[at + dims.n4]);
    let w2 = load_weight(b[at + 2u * dims.n4]);
    let w3 = load_weight(b[at + 3u * dims.n4]);
    // A broadcast's lane must be a constant.
    add_column(0u, subgroupBroadcast(w0, 0u), subgroupBroadcast(w1, 0u), subgroupBroadcast(w2, 0u), subgroupBroadcast(w3, 0u));
    add_column(1u, subgroupBroadcast(w0, 1u), subgroupBroadcast(w1, 1u), subgroupBroadcast(w2, 1u), subgroupBroadcast(w3, 1u));
    add_column(2u, subgroupBroadcast(w0, 2u), subgroupBroadcast(w1, 2u), subgroupBroadcast(w2, 2u), subgroupBroadcast(w3, 2u));
    add_column(3u, subgroupBroadcast(w0, 3u), subgroupBroadcast(w1, 3u), subgroupBroadcast(w2, 3u), subgroupBroadcast(w3, 3u));
    add_column(4u, subgroupBroadcast(w0, 4u), subgroupBroadcast(w1, 4u), subgroupBroadcast(w2, 4u), subgroupBroadcast(w3, 4u));
    add_column(5u, subgroupBroadcast(w0, 5u), subgroupBroadcast(w1, 5u), subgroupBroadcast(w2, 5u), subgroupBroadcast(w3, 5u));
    add_column(6u, subgroupBroadcast(w0, 6u), subgroupBroadcast(w1, 6u), subgroupBroadcast(w2, 6u), subgroupBroadcast(w3, 6u));
    add_column(7u, subgroupBroadcast(w0, 7u), subgroupBroadcast(w1, 7u), subgroupBroadcast(w2, 7u), subgroupBroadcast(w3, 7u));
}

fn add_column(c: u32, w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>) {
    for (var r = 0u; r < 8u; r++) {
        acc[c][r] += rows_x[r].x * w0 + rows_x[r].y * w1 + rows_x[r].z * w2 + rows_x[r].w * w3;
    }
}
