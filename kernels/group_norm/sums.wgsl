// Group norm, 1 of 3: mean and sum of squared deviations of each channel over a chunk of pixels.
// One thread for four channels of one chunk; neighbours take neighbouring channels. Two sources in place of a concatenation.
alias elem4 = vec4<f32>;
const TWO_SOURCES: bool = false;
const INSIDE: bool = false;     // statistics of a rectangle alone: a tile's own part, without its margins

struct Dims {
    batch: u32, pixels: u32, x4: u32, y4: u32, chunks: u32, chunk: u32,    // pixels of the image, or of the rectangle
    area: u32, width: u32, inner: u32, corner: u32,     // of the image: pixels, width; of the rectangle: width, first pixel
}

@group(0) @binding(0) var<storage, read> x: array<elem4>;               // [B, pixels, x4]
@group(0) @binding(1) var<storage, read> y: array<elem4>;               // [B, pixels, y4]
@group(0) @binding(2) var<storage, read_write> sums: array<vec4<f32>>;  // [B, chunks, x4 + y4, 2]: mean, squared deviations
@group(0) @binding(3) var<uniform> dims: Dims;

// Pixel i of those that count.
fn pixel_of(batch: u32, i: u32) -> u32 {
    if (INSIDE) { return batch * dims.area + dims.corner + i / dims.inner * dims.width + i % dims.inner; }
    return batch * dims.area + i;
}

fn load(pixel: u32, c4: u32) -> vec4<f32> {
    if (TWO_SOURCES && c4 >= dims.x4) { return vec4<f32>(y[pixel * dims.y4 + c4 - dims.x4]); }
    return vec4<f32>(x[pixel * dims.x4 + c4]);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    let c4s = dims.x4 + dims.y4;
    if (index >= dims.batch * dims.chunks * c4s) { return; }
    let c4 = index % c4s;
    let chunk = index / c4s % dims.chunks;
    let batch = index / c4s / dims.chunks;
    let first = chunk * dims.chunk;
    let count = min(dims.chunk, dims.pixels - first);
    // Deviations from the chunk's first pixel: no cancellation where the mean is large against the spread.
    let origin = load(pixel_of(batch, first), c4);
    var sum = vec4<f32>(0.0);
    var squares = vec4<f32>(0.0);
    // Four at a time, so that their loads are under way together.
    var i = 1u;
    for (; i + 3u < count; i += 4u) {
        //: for k in 0..4
        let d_$k = load(pixel_of(batch, first + i + $ku), c4) - origin;
        //: end
        //: for k in 0..4
        sum += d_$k;
        squares += d_$k * d_$k;
        //: end
    }
    for (; i < count; i++) {
        let d = load(pixel_of(batch, first + i), c4) - origin;
        sum += d;
        squares += d * d;
    }
    let mean = sum / f32(count);
    sums[index * 2u] = origin + mean;
    sums[index * 2u + 1u] = max(squares - sum * mean, vec4<f32>(0.0));
}
