// Group norm in one dispatch, for small pictures: one workgroup for one image and a span of groups, as few as have whole groups of
// four channels. Deviations are counted from each channel's first pixel: no cancellation where the mean is large against the spread.
// Channels are then merged into groups (Chan et al. 1979, parallel variance). Two sources become one.
alias elem4 = vec4<f32>;
alias out4 = vec4<f32>;
const TWO_SOURCES: bool = false;
const SILU: bool = false;
const THREADS: u32 = 256u;
const TOGETHER: u32 = 4u;       // pixels whose loads are under way together

struct Dims { pixels: u32, x4: u32, y4: u32, span4: u32, group: u32, eps: f32 }     // span4 channels / 4 of a span, group channels

@group(0) @binding(0) var<storage, read> x: array<elem4>;               // [B, pixels, x4]
@group(0) @binding(1) var<storage, read> y: array<elem4>;               // [B, pixels, y4]
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>;       // [x4 + y4]
@group(0) @binding(3) var<storage, read> beta: array<vec4<f32>>;        // [x4 + y4]
@group(0) @binding(4) var<storage, read_write> out: array<out4>;        // [B, pixels, x4 + y4]
@group(0) @binding(5) var<uniform> dims: Dims;

// Of each thread's pixels: sums, sums of squares. Afterwards, of each four channels: means, squared deviations.
var<workgroup> sums: array<vec4<f32>, THREADS>;
var<workgroup> squares: array<vec4<f32>, THREADS>;
// Mean and 1 / deviation of each group; a span has at most four.
var<workgroup> stats: array<vec4<f32>, 4>;

fn load(pixel: u32, c4: u32) -> vec4<f32> {
    if (TWO_SOURCES && c4 >= dims.x4) { return vec4<f32>(y[pixel * dims.y4 + c4 - dims.x4]); }
    return vec4<f32>(x[pixel * dims.x4 + c4]);
}

fn channels_of(column: u32) -> vec4<u32> { return vec4<u32>(column * 4u) + vec4<u32>(0u, 1u, 2u, 3u); }

// Sum over four channels of a span, those of one group alone: that of channels first .. end.
fn within(first: u32, end: u32, column: u32, value: vec4<f32>) -> f32 {
    let channels = channels_of(column);
    return dot(value, select(vec4<f32>(0.0), vec4<f32>(1.0), channels >= vec4<u32>(first) & channels < vec4<u32>(end)));
}

// Statistics of the groups that four channels are of. Of four groups at most: three comparisons, where a division takes twenty instructions.
fn stats_of(column: u32) -> array<vec4<f32>, 2> {
    let channels = channels_of(column);
    var groups = vec4<u32>(0u);
    for (var g = 1u; g < 4u; g++) { groups += select(vec4<u32>(0u), vec4<u32>(1u), channels >= vec4<u32>(g * dims.group)); }
    let a = stats[groups.x];
    let b = stats[groups.y];
    let c = stats[groups.z];
    let d = stats[groups.w];
    return array<vec4<f32>, 2>(vec4<f32>(a.x, b.x, c.x, d.x), vec4<f32>(a.y, b.y, c.y, d.y));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) local: u32, @builtin(workgroup_id) wid: vec3<u32>) {
    let c4s = dims.x4 + dims.y4;
    let spans = c4s / dims.span4;
    let image = wid.x / spans * dims.pixels;
    // A thread keeps to one column of four channels; those beyond whole lines have none.
    let lines = THREADS / dims.span4;
    let column = local % dims.span4;
    let line = local / dims.span4;
    let c4 = wid.x % spans * dims.span4 + column;
    let first = load(image, c4);
    // Ahead of the sums, so that nothing waits for them.
    let weight = gamma[c4];
    let bias = beta[c4];
    var sum = vec4<f32>(0.0);
    var square = vec4<f32>(0.0);
    if (line < lines) {
        for (var p = line; p < dims.pixels; p += TOGETHER * lines) {
            //: for i in 0..TOGETHER
            let v_$i = load(image + min(p + $iu * lines, dims.pixels - 1u), c4);
            //: end
            //: for i in 0..TOGETHER
            if (p + $iu * lines < dims.pixels) {
                let d = v_$i - first;
                sum += d;
                square += d * d;
            }
            //: end
        }
    }
    sums[local] = sum;
    squares[local] = square;
    workgroupBarrier();
    for (var rest = lines; rest > 1u; rest = (rest + 1u) / 2u) {
        let half = (rest + 1u) / 2u;
        if (line < rest - half) {
            sums[local] += sums[local + half * dims.span4];
            squares[local] += squares[local + half * dims.span4];
        }
        workgroupBarrier();
    }
    let count = f32(dims.pixels);
    if (line == 0u) {
        let mean = sums[local] / count;
        squares[local] = max(squares[local] - sums[local] * mean, vec4<f32>(0.0));
        sums[local] = first + mean;
    }
    workgroupBarrier();
    let first_of = local * dims.group;
    if (first_of < dims.span4 * 4u) {
        let end = first_of + dims.group;
        let columns = (end + 3u) / 4u;
        var mean = 0.0;
        for (var i = first_of / 4u; i < columns; i++) { mean += within(first_of, end, i, sums[i]); }
        mean /= f32(dims.group);
        var spread = 0.0;
        for (var i = first_of / 4u; i < columns; i++) {
            let d = sums[i] - mean;
            spread += within(first_of, end, i, squares[i] + count * d * d);
        }
        stats[local] = vec4<f32>(mean, 1.0 / sqrt(spread / (count * f32(dims.group)) + dims.eps), 0.0, 0.0);
    }
    workgroupBarrier();
    if (line >= lines) { return; }
    let own = stats_of(column);
    let scale = weight * own[1];
    let shift = bias - own[0] * scale;
    for (var p = line; p < dims.pixels; p += TOGETHER * lines) {
        //: for i in 0..TOGETHER
        let v_$i = load(image + min(p + $iu * lines, dims.pixels - 1u), c4);
        //: end
        //: for i in 0..TOGETHER
        if (p + $iu * lines < dims.pixels) {
            var v = v_$i * scale + shift;
            if (SILU) { v = v / (1.0 + exp(-v)); }
            out[(image + p + $iu * lines) * c4s + c4] = out4(v);
        }
        //: end
    }
}
