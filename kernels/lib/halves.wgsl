// Four of eight halves that were read as numbers: half as many loads and stores as of fours, and compilers leave nothing of the detour
// through f32, which is there because naga 30 has no bitcast to f16.
fn halves(bits: vec2<u32>) -> vec4<f16> { return vec4<f16>(vec4<f32>(unpack2x16float(bits.x), unpack2x16float(bits.y))); }
