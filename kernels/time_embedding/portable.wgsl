// Sinusoidal embedding of timesteps (Vaswani et al. 2017, as DDPM uses it), f32. One thread for one frequency: its sine and cosine.
// WGSL promises sin and cos only near zero; timesteps reach 1000, so the argument is reduced and the series are our own.
const COS_FIRST: bool = true;               // diffusers' flip_sin_to_cos

// Of each call: rows of the result, and timesteps given, which the rows repeat in turn.
struct Dims { rows: u32, calls: u32, half: u32, given: u32 }

@group(0) @binding(0) var<storage, read> timesteps: array<f32>;         // [calls, given]
@group(0) @binding(1) var<storage, read> frequencies: array<f32>;       // [half]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;         // [rows, calls, 2 half]
@group(0) @binding(3) var<uniform> dims: Dims;

// cos and sin of x in 0 .. 2000: to the nearest multiple of pi/2 in three parts (Cody & Waite), then Cephes' series.
fn cos_sin(x: f32) -> vec2<f32> {
    let k = floor(x * 0.63661977236758 + 0.5);
    let r = ((x - k * 1.5703125) - k * 4.837512969970703e-4) - k * 7.549789948768648e-8;
    let z = r * r;
    let s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4));
    let c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5));
    let quarter = u32(k) % 4u;
    if (quarter == 0u) { return vec2<f32>(c, s); }
    if (quarter == 1u) { return vec2<f32>(-s, c); }
    if (quarter == 2u) { return vec2<f32>(-c, -s); }
    return vec2<f32>(s, -c);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let index = linear_index(id);
    if (index >= dims.rows * dims.calls * dims.half) { return; }
    let i = index % dims.half;
    let call = index / dims.half % dims.calls;
    let row = index / dims.half / dims.calls;
    let both = cos_sin(timesteps[call * dims.given + row % dims.given] * frequencies[i]);
    let at = (row * dims.calls + call) * 2u * dims.half + i;
    out[at] = select(both.y, both.x, COS_FIRST);
    out[at + dims.half] = select(both.x, both.y, COS_FIRST);
}
