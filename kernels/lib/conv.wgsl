// What the conv2d variants share: from an output pixel and a tap to the stored pixel under it.
// Where a tap reads: the pixel's index in the stored input, and whether it is inside.
struct Tap { pixel: u32, inside: bool }

// The output pixel `row` of the batch as image, line, column.
fn place(row: u32) -> vec3<u32> {
    let area = dims.out_h * dims.out_w;
    let rest = row % area;
    return vec3<u32>(row / area, rest / dims.out_w, rest % dims.out_w);
}

fn tap_at(p: vec3<u32>, tap: u32) -> Tap {
    // Unsigned wrap-around makes a line above the first one very large: outside.
    let iy = p.y * dims.stride + tap / KERNEL - dims.pad;
    let ix = p.z * dims.stride + tap % KERNEL - dims.pad;
    let inside = iy < dims.in_h && ix < dims.in_w;
    var sy = min(iy, dims.in_h - 1u);
    var sx = min(ix, dims.in_w - 1u);
    if (RESIZE) {
        sy = min(u32(f32(sy) * dims.scale_y), dims.src_h - 1u);
        sx = min(u32(f32(sx) * dims.scale_x), dims.src_w - 1u);
    }
    return Tap((p.x * dims.src_h + sy) * dims.src_w + sx, inside);
}

// Channels 4 c4 .. 4 c4 + 3 of a stored pixel.
fn load_x(pixel: u32, c4: u32) -> vec4<f32> {
    if (TWO_SOURCES && c4 >= dims.x4) { return vec4<f32>(y[pixel * dims.y4 + c4 - dims.x4]); }
    return vec4<f32>(x[pixel * dims.x4 + c4]);
}
