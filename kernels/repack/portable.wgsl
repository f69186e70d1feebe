// Weights from a file's layout to the kernels': [N, C, taps] to rows (tap, channel) of columns n, with LoRA's low-rank product added.
// One thread for four columns of one row. Conversions are integer arithmetic: exact on every device, whatever its f16 does.
const SOURCE: u32 = 0u;             // the file's type: 0 f32, 1 f16, 2 bf16
const HALF: bool = false;           // the target's: f16, two in a u32, or f32
const RANK: bool = false;           // is there a LoRA?

struct Dims {
    count: u32,                             // threads: rows of four columns
    n: u32, c: u32, taps: u32,              // of the source
    c_padded: u32,                          // channels of a tap in the target; those beyond c are zero
    columns: u32, first: u32,               // columns of a row of the target; where this source's begin
    geglu: u32,                             // n / 2: four values, then their four gates, in turn; 0: in order
    base: u32,                              // where the source begins, in u32
    rank: u32,
    slot: u32,                              // where in `found` to leave a word
}

@group(0) @binding(0) var<storage, read> source: array<u32>;
@group(0) @binding(1) var<storage, read> up: array<f32>;            // [n, rank], scales in it
@group(0) @binding(2) var<storage, read> down: array<f32>;          // [rank, c taps]
@group(0) @binding(3) var<storage, read_write> out: array<u32>;
@group(0) @binding(4) var<storage, read_write> found: array<u32>;   // pairs: not finite, too large for f16
@group(0) @binding(5) var<uniform> dims: Dims;

// f16 bits to f32 bits.
fn widen(h: u32) -> u32 {
    let sign = (h & 0x8000u) << 16u;
    let magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) { return sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13u); }
    if (magnitude >= 0x400u) { return sign | ((magnitude << 13u) + (112u << 23u)); }
    // A subnormal: its highest bit becomes the implicit one.
    if (magnitude == 0u) { return sign; }
    let top = firstLeadingBit(magnitude);
    return sign | ((top + 103u) << 23u) | ((magnitude << (23u - top)) & 0x7fffffu);
}

// f32 bits to f16 bits, to the nearest, ties to even; beyond f16: infinity.
fn narrow(bits: u32) -> u32 {
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) { return sign | 0x7e00u; }
    if (magnitude >= 0x477ff000u) { return sign | 0x7c00u; }
    if (magnitude >= 0x38800000u) {
        return sign | ((magnitude - (112u << 23u) + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u);
    }
    // Subnormal in f16: the mantissa with its implicit bit, shifted to units of 2^-24.
    if (magnitude < 0x33000000u) { return sign; }
    let shift = 126u - (magnitude >> 23u);
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    let half = 1u << (shift - 1u);
    let kept = mantissa >> shift;
    let rest = mantissa & ((1u << shift) - 1u);
    return sign | (kept + select(0u, 1u, rest > half || (rest == half && (kept & 1u) == 1u)));
}

// Element i of the source, as f32 bits.
fn load(i: u32) -> u32 {
    if (SOURCE == 0u) { return source[dims.base + i]; }
    let pair = source[dims.base + i / 2u];
    let half = select(pair & 0xffffu, pair >> 16u, (i & 1u) == 1u);
    if (SOURCE == 1u) { return widen(half); }
    return half << 16u;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.count) { return; }
    let groups = (dims.n + 3u) / 4u;
    let row = index / groups;
    let n0 = index % groups * 4u;
    let tap = row / dims.c_padded;
    let c = row % dims.c_padded;
    var bits = vec4<u32>(0u);
    if (c < dims.c) {
        for (var i = 0u; i < 4u; i++) {
            let n = n0 + i;
            if (n < dims.n) {
                var value = load((n * dims.c + c) * dims.taps + tap);
                if (RANK) {
                    var sum = 0.0;
                    for (var r = 0u; r < dims.rank; r++) {
                        sum += up[n * dims.rank + r] * down[(r * dims.c + c) * dims.taps + tap];
                    }
                    value = bitcast<u32>(bitcast<f32>(value) + sum);
                }
                if ((value & 0x7f800000u) == 0x7f800000u) { found[dims.slot] = 1u; }
                if (HALF && (value & 0x7fffffffu) >= 0x477ff000u) { found[dims.slot + 1u] = 1u; }
                bits[i] = value;
            }
        }
    }
    var column = n0;
    if (dims.geglu > 0u) { column = n0 % dims.geglu * 2u + n0 / dims.geglu * 4u; }
    let at = row * dims.columns + dims.first + column;
    if (HALF) {
        out[at / 2u] = narrow(bits.x) | (narrow(bits.y) << 16u);
        out[at / 2u + 1u] = narrow(bits.z) | (narrow(bits.w) << 16u);
    } else {
        out[at] = bits.x;
        out[at + 1u] = bits.y;
        out[at + 2u] = bits.z;
        out[at + 3u] = bits.w;
    }
}
