// Weights stored as f32 or f16, four along the output channels.
fn load_weight(v: weight4) -> vec4<f32> { return vec4<f32>(v); }
