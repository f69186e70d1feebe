//! Pictures to start from: masks in pixels and in latents, what an inpainting model is shown, the seam put together again.

use crate::error::{Error, Result};
use crate::image::Image;

/// A picture to start from, and which part of it to repaint.
#[derive(Clone, Debug, PartialEq)]
pub struct Init {
    /// The picture, of the request's size.
    pub image: Image,
    /// [height, width], 1 where it is repainted, 0 where it stays; all of it, if none.
    pub mask: Option<Vec<f32>>,
    /// Standard deviation in pixels of a Gaussian blur of the mask.
    pub feather: f32,
}

impl Init {
    /// Does it fit a request of that size?
    ///
    /// # Errors
    /// [`Error::Invalid`] with the sizes.
    pub fn check(&self, width: u32, height: u32) -> Result<()> {
        let size = |w: u32, h: u32| format!("{w}x{h}");
        if (self.image.width, self.image.height) != (width, height) {
            return Err(Error::invalid("init", size(width, height), size(self.image.width, self.image.height)));
        }
        if let Some(mask) = &self.mask
            && (mask.len() != (width * height) as usize || mask.iter().any(|m| !(0.0..=1.0).contains(m)))
        {
            return Err(Error::invalid("mask", format!("{} numbers from 0 to 1", width * height), mask.len()));
        }
        if !(0.0..=1000.0).contains(&self.feather) {
            return Err(Error::invalid("mask-feather", "0 to 1000 pixels", self.feather));
        }
        Ok(())
    }

    /// The mask with its feather, [height, width].
    pub fn feathered(&self) -> Option<Vec<f32>> {
        let mask = self.mask.as_ref()?;
        Some(feather(mask, self.image.width as usize, self.image.height as usize, self.feather))
    }
}

/// Gaussian blur of [h, w] with edges repeated, the kernel cut at three standard deviations.
pub fn feather(mask: &[f32], w: usize, h: usize, sigma: f32) -> Vec<f32> {
    if sigma == 0.0 {
        return mask.to_vec();
    }
    let radius = (3.0 * sigma).ceil() as i64;
    let weights: Vec<f32> = (-radius..=radius).map(|t| (-0.5 * (t as f32 / sigma).powi(2)).exp()).collect();
    let total: f32 = weights.iter().sum();
    let blur = |at: &dyn Fn(i64) -> f32, i: usize| {
        let sum: f32 = weights.iter().zip(-radius..).map(|(weight, t)| weight * at(i as i64 + t)).sum();
        sum / total
    };
    let clamp = |i: i64, n: usize| i.clamp(0, n as i64 - 1) as usize;
    let rows: Vec<f32> = (0..h * w).map(|i| blur(&|x| mask[i / w * w + clamp(x, w)], i % w)).collect();
    (0..h * w).map(|i| blur(&|y| rows[clamp(y, h) * w + i % w], i / w).clamp(0.0, 1.0)).collect()
}

/// A mask in pixels [8 h, 8 w] as one in latents [h, w]: bilinear at the centres, as ComfyUI resizes it.
pub fn latent_mask(mask: &[f32], h: usize, w: usize) -> Vec<f32> {
    let at = |y: usize, x: usize| mask[y * 8 * w + x];
    // The centre of eight pixels lies between the fourth and the fifth.
    let mean = |y: usize, x: usize| (at(y, x) + at(y, x + 1) + at(y + 1, x) + at(y + 1, x + 1)) / 4.0;
    (0..h * w).map(|i| mean(i / w * 8 + 3, i % w * 8 + 3)).collect()
}

/// The decoder's numbers of a picture, [h, w, 4] in -1 .. 1 with a fourth channel of zeros; grey where `hide` is at least ½.
pub fn normalised(image: &Image, hide: Option<&[f32]>) -> Vec<f32> {
    let mut out = Vec::with_capacity(image.rgb.len() / 3 * 4);
    for (i, pixel) in image.rgb.chunks_exact(3).enumerate() {
        let hidden = hide.is_some_and(|mask| mask[i] >= 0.5);
        out.extend(pixel.iter().map(|&v| if hidden { 0.0 } else { f32::from(v) / 127.5 - 1.0 }));
        out.push(0.0);
    }
    out
}

/// What an inpainting model sees beside x, [h, w, 8]: the mask (1 is repainted), the masked picture's latents [h, w, 4], zeros.
/// The mask is taken at every eighth pixel, as diffusers does for these models.
pub fn shown(mask: Option<&[f32]>, masked: &[f32], h: usize, w: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(h * w * 8);
    for (i, latent) in masked.chunks_exact(4).enumerate() {
        let repaint = mask.is_none_or(|mask| mask[(i / w * 8) * 8 * w + i % w * 8] >= 0.5);
        out.push(f32::from(u8::from(repaint)));
        out.extend_from_slice(latent);
        out.extend([0.0; 3]);
    }
    assert_eq!(out.len(), h * w * 8, "what an inpainting model sees");
    out
}

/// The repainted picture inside the mask, the given one outside, bit for bit where the mask is 0.
pub fn composite(made: &Image, given: &Image, mask: &[f32]) -> Image {
    let mut out = made.clone();
    for (i, value) in out.rgb.iter_mut().enumerate() {
        let m = mask[i / 3];
        *value = (m * f32::from(*value) + (1.0 - m) * f32::from(given.rgb[i])).round() as u8;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feather_keeps_flat_masks_and_softens_edges() {
        let (w, h) = (40, 24);
        let half: Vec<f32> = (0..w * h).map(|i| if i % w < 20 { 0.0 } else { 1.0 }).collect();
        assert_eq!(feather(&half, w, h, 0.0), half);
        let soft = feather(&half, w, h, 2.0);
        assert!(soft[5 * w] == 0.0 && (soft[5 * w + 39] - 1.0).abs() < 1e-6);
        assert!((soft[5 * w + 19] + soft[5 * w + 20] - 1.0).abs() < 1e-5 && soft[5 * w + 19] > 0.3);
        assert!(feather(&vec![1.0; w * h], w, h, 7.5).iter().all(|v| (v - 1.0).abs() < 1e-5));
    }

    #[test]
    fn latent_masks_of_whole_blocks_are_exact() {
        let (h, w) = (5, 6);
        let mask: Vec<f32> = (0..h * w * 64).map(|i| f32::from(u8::from(i / (8 * w) / 8 % 2 == 1))).collect();
        assert_eq!(latent_mask(&mask, h, w), (0..h * w).map(|i| (i / w % 2) as f32).collect::<Vec<f32>>());
    }

    #[test]
    fn outside_the_mask_nothing_changes() {
        let given = Image { width: 2, height: 1, rgb: vec![10, 20, 30, 40, 50, 60] };
        let made = Image { width: 2, height: 1, rgb: vec![255; 6] };
        assert_eq!(composite(&made, &given, &[0.0, 1.0]).rgb, [10, 20, 30, 255, 255, 255]);
        assert_eq!(normalised(&given, Some(&[0.0, 1.0]))[4..], [0.0; 4]);
    }

    #[test]
    fn sizes_are_checked() {
        let init = Init { image: Image::filled(64, 64, [0; 3]), mask: None, feather: 0.0 };
        assert!(init.check(64, 64).is_ok() && init.check(64, 72).is_err());
        assert!(Init { mask: Some(vec![0.0; 5]), ..init.clone() }.check(64, 64).is_err());
        assert!(Init { feather: f32::NAN, ..init }.check(64, 64).is_err());
    }
}
