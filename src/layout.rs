//! Between PyTorch's layout [B, C, H, W] on the host and the kernels' [B, H, W, C].

/// [B, C, H, W] → [B, H, W, C].
pub(crate) fn to_nhwc(data: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    let mut out = Vec::with_capacity(data.len());
    for image in 0..b {
        for pixel in 0..h * w {
            out.extend((0..c).map(|channel| data[(image * c + channel) * h * w + pixel]));
        }
    }
    out
}

/// [B, H, W, C] → [B, C, H, W], `shape` given as the latter.
pub(crate) fn to_nchw(data: &[f32], [b, c, h, w]: [usize; 4]) -> Vec<f32> {
    let mut out = Vec::with_capacity(data.len());
    for image in data.chunks_exact(c * h * w).take(b) {
        for channel in 0..c {
            out.extend(image.iter().skip(channel).step_by(c));
        }
    }
    out
}
