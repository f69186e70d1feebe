// Group norm by one workgroup for a span of groups, whose threads hold EACH pixels each: of a whole image, or of a chunk of it, of which it
// leaves mean and sum of squared deviations for kernels/group_norm/merged.wgsl. Two sources become one. With SPLITS the first comes as
// shares of a product, and this ends that product as well (lib/ended.wgsl). Where that was a convolution in Winograd's tiles, a thread's
// pixels are such tiles (lib/ended_tile.wgsl); where the next is, their transforms are what is stored. Grid (spans, chunks, B).
alias elem4 = vec4<f32>;
alias share4 = vec4<f32>;       // halves, where they are products of tiles
alias residual4 = vec4<f32>;
alias out4 = vec4<f32>;
const TWO_SOURCES: bool = false;
const SILU: bool = false;
const WHOLE: u32 = 1u;          // 1: the only chunk is normed, too
const SPLITS: u32 = 0u;
const TILED: u32 = 0u;          // pixels of a tile of x
const TO_TILES: u32 = 0u;       // .. and of what is stored
const HELD: u32 = 1u;           // pixels of an image times channels / 4 of a span, where that is stored in tiles
const EACH: u32 = 1u;
const THREADS: u32 = 256u;
const PARTS: u32 = 32u;         // of a group's lines, each summed by one thread, then all by one
const MOST: u32 = 8u;           // groups of a span

struct Dims {
    pixels: u32, x4: u32, y4: u32, span4: u32, group: u32, eps: f32,    // span4 channels / 4 of a span, group channels
    //: if 0 < SPLITS
    rows: u32, n4: u32, rows_per_bias: u32, bias_stride4: u32, bias_offset4: u32,
    //: end
    //: if 0 < TILED + TO_TILES
    wide: u32,      // pixels of a line
    //: end
}

//: if SPLITS < 1
@group(0) @binding(0) var<storage, read> x: array<elem4>;               // [B, pixels, x4]
@group(0) @binding(1) var<storage, read> y: array<elem4>;               // [B, pixels, y4]
//: if 0 < WHOLE
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>;       // [x4 + y4]
@group(0) @binding(3) var<storage, read> beta: array<vec4<f32>>;        // [x4 + y4]
@group(0) @binding(4) var<storage, read_write> out: array<out4>;        // [B, pixels, x4 + y4]
@group(0) @binding(5) var<uniform> dims: Dims;
//: end
//: if WHOLE < 1
@group(0) @binding(2) var<storage, read_write> stats: array<vec2<f32>>; // [B, chunks, groups]: mean, squared deviations
@group(0) @binding(3) var<uniform> dims: Dims;
//: end
//: end
//: if 0 < SPLITS
@group(0) @binding(0) var<storage, read> shares: array<share4>;      // [SPLITS, B pixels, x4]
@group(0) @binding(1) var<storage, read> bias: array<vec4<f32>>;        // [.., x4]
@group(0) @binding(2) var<storage, read> residual: array<residual4>;    // [B, pixels, x4]
@group(0) @binding(3) var<storage, read> y: array<elem4>;               // the others as above
//: if 0 < WHOLE
@group(0) @binding(4) var<storage, read> gamma: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> beta: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> x: array<elem4>;
@group(0) @binding(7) var<storage, read_write> out: array<out4>;
@group(0) @binding(8) var<uniform> dims: Dims;
//: end
//: if WHOLE < 1
@group(0) @binding(4) var<storage, read_write> x: array<elem4>;
@group(0) @binding(5) var<storage, read_write> stats: array<vec2<f32>>;
@group(0) @binding(6) var<uniform> dims: Dims;
//: end
//: end

// The chunk's first pixel. Deviations are counted from each group's first channel there: no cancellation where the mean is large against
// the spread.
var<workgroup> pixel_0: array<f32, THREADS>;
// Of a thread's pixels: sum, sum of squares; of its first channel's group, and of the next.
var<workgroup> sums: array<vec4<f32>, THREADS>;
// The same of each group and part.
var<workgroup> parts: array<vec2<f32>, PARTS * MOST>;
//: if 0 < WHOLE
// Mean, 1 / deviation.
var<workgroup> of_groups: array<vec2<f32>, MOST>;
//: end
//: if 0 < TO_TILES
var<workgroup> normed: array<out4, HELD>;
//: end

//: if TILED < 1
fn load(pixel: u32, c4: u32) -> vec4<f32> {
    if (TWO_SOURCES && c4 >= dims.x4) { return vec4<f32>(y[pixel * dims.y4 + c4 - dims.x4]); }
    //: if SPLITS < 1
    return vec4<f32>(x[pixel * dims.x4 + c4]);
    //: end
    //: if 0 < SPLITS
    return vec4<f32>(elem4(ended(pixel, c4)));
    //: end
}
//: end
//: if 0 < TILED
// Of the pixels of a tile.
fn load(tile: u32, first: u32, c4: u32) -> array<vec4<f32>, TILED> {
    var found = array<vec4<f32>, TILED>();
    if (TWO_SOURCES && c4 >= dims.x4) {
        //: for i in 0..TILED
        found[$i] = vec4<f32>(y[pixel_in_tile(first, $iu) * dims.y4 + c4 - dims.x4]);
        //: end
        return found;
    }
    found = ended_tile(tile, first, c4);
    //: for i in 0..TILED
    found[$i] = vec4<f32>(elem4(found[$i]));
    //: end
    return found;
}
//: end

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    // Threads beyond whole lines load what the last line does, and count nothing.
    let lines = THREADS / dims.span4;
    let column = local % dims.span4;
    let line = local / dims.span4;
    let c4 = wid.x * dims.span4 + column;
    let chunk = lines * EACH;
    let count = min(chunk, dims.pixels - wid.y * chunk);
    let start = wid.z * dims.pixels + wid.y * chunk;
    //: if TILED < 1
    //: for i in 0..EACH
    let at_$i = start + min(line + $iu * lines, count - 1u);
    let has_$i = line < lines && line + $iu * lines < count;
    let v_$i = load(at_$i, c4);
    //: end
    //: end
    //: if 0 < TILED
    //: for i in 0..EACH / TILED
    let tile_$i = start / TILED + min(line + $iu * lines, count / TILED - 1u);
    let first_$i = first_of_tile(tile_$i, TILED);
    let found_$i = load(tile_$i, first_$i, c4);
    //: for k in 0..TILED
    let at_${$i * TILED + $k} = pixel_in_tile(first_$i, $ku);
    let has_${$i * TILED + $k} = line < lines && line + $iu * lines < count / TILED;
    let v_${$i * TILED + $k} = found_$i[$k];
    //: end
    //: end
    //: end
    //: if 0 < WHOLE
    // Before they are needed.
    let weight = gamma[c4];
    let added = beta[c4];
    //: end
    if (line == 0u) {
        //: for k in 0..4
        pixel_0[column * 4u + $ku] = v_0[$k];
        //: end
    }
    workgroupBarrier();
    let group = first_group(column);
    let next = in_next(column, group);
    // Of the last channels there is no next group, and no use.
    let origin = select(vec4<f32>(pixel_0[group * dims.group]), vec4<f32>(pixel_0[min((group + 1u) * dims.group, THREADS - 1u)]), next);
    var sum = vec4<f32>(0.0);
    var square = vec4<f32>(0.0);
    //: for i in 0..EACH
    if (has_$i) {
        //: if 0 < SPLITS
        if (!TWO_SOURCES || c4 < dims.x4) { x[at_$i * dims.x4 + c4] = elem4(v_$i); }
        //: end
        let d = v_$i - origin;
        sum += d;
        square += d * d;
    }
    //: end
    let of_next = select(vec4<f32>(0.0), vec4<f32>(1.0), next);
    let of_own = vec4<f32>(1.0) - of_next;
    sums[local] = vec4<f32>(dot(sum, of_own), dot(square, of_own), dot(sum, of_next), dot(square, of_next));
    workgroupBarrier();
    let groups = dims.span4 * 4u / dims.group;
    let many = min(PARTS, lines);
    if (local < many * groups) {
        let own = local % groups;
        var all = vec2<f32>(0.0);
        for (var l = local / groups; l < lines; l += PARTS) {
            for (var c = own * dims.group / 4u; c < ((own + 1u) * dims.group + 3u) / 4u; c++) {
                let both = sums[l * dims.span4 + c];
                all += select(both.zw, both.xy, c * 4u >= own * dims.group);
            }
        }
        parts[local] = all;
    }
    workgroupBarrier();
    if (local < groups) {
        var all = parts[local];
        for (var p = 1u; p < many; p++) { all += parts[p * groups + local]; }
        let elements = f32(count * dims.group);
        let mean = all.x / elements;
        let squares = max(all.y - all.x * mean, 0.0);
        //: if WHOLE < 1
        stats[((wid.z * grid.y + wid.y) * grid.x + wid.x) * groups + local] = vec2<f32>(pixel_0[local * dims.group] + mean, squares);
        //: end
        //: if 0 < WHOLE
        of_groups[local] = vec2<f32>(pixel_0[local * dims.group] + mean, 1.0 / sqrt(squares / elements + dims.eps));
        //: end
    }
    //: if 0 < WHOLE
    workgroupBarrier();
    //: if TO_TILES < 1
    if (line >= lines) { return; }
    //: end
    let of_group = of_groups[group];
    let other = of_groups[min(group + 1u, groups - 1u)];
    let scale = weight * select(vec4<f32>(of_group.y), vec4<f32>(other.y), next);
    let shift = added - select(vec4<f32>(of_group.x), vec4<f32>(other.x), next) * scale;
    //: for i in 0..EACH
    if (has_$i) {
        var v = v_$i * scale + shift;
        if (SILU) { v = v / (1.0 + exp(-v)); }
        //: if TO_TILES < 1
        out[at_$i * (dims.x4 + dims.y4) + c4] = out4(v);
        //: end
        //: if 0 < TO_TILES
        normed[(at_$i - start) * dims.span4 + column] = out4(v);
        //: end
    }
    //: end
    //: if 0 < TO_TILES
    workgroupBarrier();
    let tiles = dims.pixels / TO_TILES;
    for (var t = local; t < BANDS * tiles * dims.span4; t += THREADS) {
        let part = t / (tiles * dims.span4);
        let tile = t / dims.span4 % tiles;
        let own = t % dims.span4;
        var d = array<vec4<f32>, 4>();
        var e = array<vec4<f32>, 4>();
        //: for j in 0..4
        {
            let place = input_of(tile, line_of(part) * 4u + $ju, TO_TILES, dims.pixels / dims.wide);
            if (place.inside) { d[$j] = vec4<f32>(normed[place.pixel * dims.span4 + own]); }
            //: if 2 < TO_TILES
            let other = input_of(tile, other_line_of(part) * 4u + $ju, TO_TILES, dims.pixels / dims.wide);
            if (other.inside) { e[$j] = vec4<f32>(normed[other.pixel * dims.span4 + own]); }
            //: end
        }
        //: end
        let wide4 = dims.x4 + dims.y4;
        store_part(part, d, e, (start / TO_TILES + tile) * wide4 + wid.x * dims.span4 + own, grid.z * tiles * wide4);
    }
    //: end
    //: end
}
