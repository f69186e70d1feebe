// One index over a grid that gpu::graph::linear_grid folded into two dimensions, in workgroups of 64.
fn linear_index(id: vec3<u32>) -> u32 { return id.x + id.y * (65535u * 64u); }
