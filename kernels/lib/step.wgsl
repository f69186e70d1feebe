// The scalars of one model call; the host writes those of all calls before the loop (src/denoiser.rs, same order).
struct Step {
    call: u32,                                  // which call of the run this is
    c_in: f32, c_skip: f32, c_out: f32,         // denoised = c_skip x + c_out output, the network sees c_in x
    sigma: f32,                                 // the noise level
    cfg: f32, sag_scale: f32, threshold: f32,
    blur0: f32, blur1: f32, blur2: f32, blur3: f32, blur4: f32,    // Gaussian weights from the centre outwards
}
