// Weights stored as f16, two in a u32, for devices without f16; four along the output channels.
fn load_weight(v: weight4) -> vec4<f32> { return vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y)); }
