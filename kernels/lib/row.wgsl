// What the lanes that share a row of a matrix find out together: MATES neighbours, of a subgroup's lanes 1, 2 or 4.
fn highest(x: vec4<f32>) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }

fn of_row_max(x: f32) -> f32 {
    var high = x;
    if (1u < MATES) { high = max(high, subgroupShuffleXor(high, 1u)); }
    if (2u < MATES) { high = max(high, subgroupShuffleXor(high, 2u)); }
    return high;
}

fn of_row_sum(x: f32) -> f32 {
    var sum = x;
    if (1u < MATES) { sum += subgroupShuffleXor(sum, 1u); }
    if (2u < MATES) { sum += subgroupShuffleXor(sum, 2u); }
    return sum;
}
