// Group norm, 2 of 2: every workgroup merges the chunks' statistics of its groups (Chan et al. 1979, parallel variance), then x scale + shift,
// and SiLU if asked. One workgroup for a block of pixels of one image and a span of groups; pixels are loaded before the statistics, so
// that nothing waits for them. Two sources become one. Or what Winograd's tiles make of the norm is stored (kernels/lib/winograd.wgsl): a thread norms the inputs
// of a tile of two pixels, or a workgroup those of CUT tiles of 2x2 side by side, whose inputs overlap more. Grid (spans, blocks, B).
alias elem4 = vec4<f32>;
alias out4 = vec4<f32>;
const TWO_SOURCES: bool = false;
const SILU: bool = false;
const THREADS: u32 = 256u;
const TOGETHER: u32 = 4u;       // pixels of a thread, or tiles of two
const TO_TILES: u32 = 0u;        // pixels of a tile
const CUT: u32 = 16u;            // .. of 2x2: those of a workgroup
const HELD: u32 = 1u;            // pixels under them times channels / 4 of a span
const MOST: u32 = 512u;         // statistics of a span: chunks of all its groups
const PAIR: u32 = TO_TILES * (4u - TO_TILES) / 4u;  // 1: tiles have two pixels

struct Dims {
    pixels: u32, x4: u32, y4: u32, span4: u32, group: u32, chunks: u32, chunk: u32, eps: f32,   // span4 channels / 4 of a span, group channels
    //: if 0 < TO_TILES
    wide: u32,      // pixels of a line
    //: end
}

@group(0) @binding(0) var<storage, read> x: array<elem4>;               // [B, pixels, x4]
@group(0) @binding(1) var<storage, read> y: array<elem4>;               // [B, pixels, y4]
@group(0) @binding(2) var<storage, read> stats: array<vec2<f32>>;       // [B, chunks, groups]: mean, squared deviations
@group(0) @binding(3) var<storage, read> gamma: array<vec4<f32>>;       // [x4 + y4]
@group(0) @binding(4) var<storage, read> beta: array<vec4<f32>>;        // [x4 + y4]
@group(0) @binding(5) var<storage, read_write> out: array<out4>;        // [B, pixels, x4 + y4]
@group(0) @binding(6) var<uniform> dims: Dims;

const GROUPS: u32 = 8u;         // of a span, at most
//: if 2 < TO_TILES
const WIDTH: u32 = 2u * CUT + 2u;       // pixels of each of the four lines under the tiles

// The norm of those pixels, 0 outside of the image.
var<workgroup> normed: array<out4, HELD>;
//: end

// The chunks' statistics, and those of whole groups: mean, 1 / deviation.
var<workgroup> of_chunks: array<vec2<f32>, MOST>;
var<workgroup> of_groups: array<vec2<f32>, GROUPS>;

fn load(pixel: u32, c4: u32) -> elem4 {
    if (TWO_SOURCES && c4 >= dims.x4) { return y[pixel * dims.y4 + c4 - dims.x4]; }
    return x[pixel * dims.x4 + c4];
}

// One of the span's groups. Deviations of the chunks' means are counted from the first's.
fn merged(group: u32, groups: u32) -> vec2<f32> {
    let origin = of_chunks[group].x;
    var sum = 0.0;
    var square = 0.0;
    for (var i = 0u; i < dims.chunks; i++) {
        let found = of_chunks[i * groups + group];
        let n = f32(min(dims.chunk, dims.pixels - i * dims.chunk));
        let d = found.x - origin;
        sum += n * d;
        square += found.y + n * d * d * f32(dims.group);
    }
    let mean = sum / f32(dims.pixels);
    let spread = max(square / f32(dims.pixels * dims.group) - mean * mean, 0.0);
    return vec2<f32>(origin + mean, 1.0 / sqrt(spread + dims.eps));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let c4s = dims.x4 + dims.y4;
    let image = wid.z * dims.pixels;
    let lines = THREADS / dims.span4;
    let column = local % dims.span4;
    let line = local / dims.span4;
    let c4 = wid.x * dims.span4 + column;
    let first = wid.y * lines * TOGETHER + line;
    //: if TO_TILES < 1
    //: for i in 0..TOGETHER
    let v_$i = load(image + min(first + $iu * lines, dims.pixels - 1u), c4);
    //: end
    //: end
    //: if 0 < PAIR
    let tiles = dims.pixels / TO_TILES;
    //: for k in 0..TOGETHER
    //: for i in 0..4
    let place_$k_$i = input_of(min(first + $ku * lines, tiles - 1u), $iu, TO_TILES, dims.pixels / dims.wide);
    let v_$k_$i = load(image + place_$k_$i.pixel, c4);
    //: end
    //: end
    //: end
    //: if 2 < TO_TILES
    let high = dims.pixels / dims.wide;
    let across = (dims.wide / 2u + CUT - 1u) / CUT;
    let line_0 = wid.y / across * 2u;
    let column_0 = wid.y % across * 2u * CUT;
    //: for i in 0..TOGETHER
    // Unsigned wrap-around makes what is before the first very large: outside.
    let y_$i = line_0 + (line + $iu * lines) / WIDTH - 1u;
    let x_$i = column_0 + (line + $iu * lines) % WIDTH - 1u;
    let v_$i = load(image + min(y_$i, high - 1u) * dims.wide + min(x_$i, dims.wide - 1u), c4);
    //: end
    //: end
    let weight = gamma[c4];
    let bias = beta[c4];
    let groups = dims.span4 * 4u / dims.group;
    for (var i = local; i < dims.chunks * groups; i += THREADS) {
        of_chunks[i] = stats[((wid.z * dims.chunks + i / groups) * grid.x + wid.x) * groups + i % groups];
    }
    workgroupBarrier();
    // One thread for each: if all threads merged for themselves, it would take longer than the norm.
    if (local < groups) { of_groups[local] = merged(local, groups); }
    workgroupBarrier();
    //: if TO_TILES < 3
    // Threads beyond whole lines have nothing to store.
    if (line >= lines) { return; }
    //: end
    let group = first_group(column);
    let next = in_next(column, group);
    // Of the last channels there is no next group, and no use.
    let own = of_groups[group];
    let other = of_groups[min(group + 1u, groups - 1u)];
    let mean = select(vec4<f32>(own.x), vec4<f32>(other.x), next);
    let scale = weight * select(vec4<f32>(own.y), vec4<f32>(other.y), next);
    let shift = bias - mean * scale;
    //: if TO_TILES < 1
    //: for i in 0..TOGETHER
    if (first + $iu * lines < dims.pixels) {
        var v = vec4<f32>(v_$i) * scale + shift;
        if (SILU) { v = v / (1.0 + exp(-v)); }
        out[(image + first + $iu * lines) * c4s + c4] = out4(v);
    }
    //: end
    //: end
    //: if 0 < PAIR
    //: for k in 0..TOGETHER
    if (first + $ku * lines < tiles) {
        var d = array<vec4<f32>, 4>();
        //: for i in 0..4
        d[$i] = vec4<f32>(v_$k_$i) * scale + shift;
        if (SILU) { d[$i] = d[$i] / (1.0 + exp(-d[$i])); }
        if (!place_$k_$i.inside) { d[$i] = vec4<f32>(0.0); }
        //: end
        store_part(0u, d, d, (image / TO_TILES + first + $ku * lines) * c4s + c4, grid.z * tiles * c4s);
    }
    //: end
    //: end
    //: if 2 < TO_TILES
    //: for i in 0..TOGETHER
    if (line < lines && line + $iu * lines < WIDTH * 4u) {
        var v = vec4<f32>(v_$i) * scale + shift;
        if (SILU) { v = v / (1.0 + exp(-v)); }
        normed[(line + $iu * lines) * dims.span4 + column] = out4(select(vec4<f32>(0.0), v, y_$i < high && x_$i < dims.wide));
    }
    //: end
    workgroupBarrier();
    for (var t = local; t < CUT * 4u * dims.span4; t += THREADS) {
        let part = t / dims.span4 / CUT;
        let tile = t / dims.span4 % CUT;
        let own = t % dims.span4;
        if (column_0 / 2u + tile < dims.wide / 2u) {
            var d = array<vec4<f32>, 4>();
            var e = array<vec4<f32>, 4>();
            //: for j in 0..4
            d[$j] = vec4<f32>(normed[(line_of(part) * WIDTH + tile * 2u + $ju) * dims.span4 + own]);
            e[$j] = vec4<f32>(normed[(other_line_of(part) * WIDTH + tile * 2u + $ju) * dims.span4 + own]);
            //: end
            let to = image / TO_TILES + line_0 / 2u * (dims.wide / 2u) + column_0 / 2u + tile;
            store_part(part, d, e, to * c4s + wid.x * dims.span4 + own, grid.z * dims.pixels / TO_TILES * c4s);
        }
    }
    //: end
}
