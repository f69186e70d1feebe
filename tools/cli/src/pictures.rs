//! Pictures that the user gives: read in any usual format, brought to the size that is asked for.

use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageReader, imageops};
use scumble::image::Image;
use scumble::inpaint::Init;
use scumble::{Error, Result};

/// A picture to start from and its mask. Without a size, the picture's own, cut to multiples of 8 from the middle, as ComfyUI
/// does; with one, scaled to it.
pub fn init(path: &Path, mask: Option<&Path>, feather: f32, size: [Option<u32>; 2]) -> Result<Init> {
    let picture = open(path)?;
    let (w, h) = (picture.width(), picture.height());
    let size = match size {
        [None, None] => [w / 8 * 8, h / 8 * 8],
        // One side given: the other keeps the proportions.
        [Some(width), None] => [width, near8(u64::from(h) * u64::from(width), w)],
        [None, Some(height)] => [near8(u64::from(w) * u64::from(height), h), height],
        [Some(width), Some(height)] => [width, height],
    };
    if size.iter().any(|&side| side < 40) {
        return Err(Error::file(
            path,
            format!("a picture of {w}x{h}, expected at least 40x40"),
            "give a larger picture",
        ));
    }
    let image = fit(&picture, size).to_rgb8();
    let image = Image { width: image.width(), height: image.height(), rgb: image.into_raw() };
    let mask = match mask {
        None => None,
        Some(path) => {
            let mask = open(path)?;
            if (mask.width(), mask.height()) != (w, h) && (mask.width(), mask.height()) != (size[0], size[1]) {
                let problem = format!("a mask of {}x{}, expected {w}x{h} as the picture", mask.width(), mask.height());
                return Err(Error::file(path, problem, "give a mask of the picture's size"));
            }
            Some(fit(&mask, size).to_luma8().into_raw().into_iter().map(|v| f32::from(v) / 255.0).collect())
        }
    };
    Ok(Init { image, mask, feather })
}

/// a / b to the nearest multiple of 8.
fn near8(a: u64, b: u32) -> u32 {
    let b = u64::from(b.max(1)) * 8;
    u32::try_from((a + b / 2) / b * 8).unwrap_or(u32::MAX)
}

/// Cut where it is a little too large, scaled where it is not of that size at all.
fn fit(picture: &DynamicImage, [width, height]: [u32; 2]) -> DynamicImage {
    let (w, h) = (picture.width(), picture.height());
    let cut = (w / 8 * 8, h / 8 * 8) == (width, height);
    match cut {
        true => picture.crop_imm((w - width) / 2, (h - height) / 2, width, height),
        false => picture.resize_exact(width, height, imageops::FilterType::Lanczos3),
    }
}

/// A picture, turned as its camera says.
fn open(path: &Path) -> Result<DynamicImage> {
    let bad = |problem: String| Error::file(path, problem, "give a PNG, JPEG, WebP or BMP picture");
    let reader = ImageReader::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => bad("no such file".into()),
        _ => bad(e.to_string()),
    })?;
    let reader = reader.with_guessed_format().map_err(|e| bad(e.to_string()))?;
    let read = || -> image::ImageResult<DynamicImage> {
        let mut decoder = reader.into_decoder()?;
        let orientation = decoder.orientation()?;
        let mut picture = DynamicImage::from_decoder(decoder)?;
        picture.apply_orientation(orientation);
        Ok(picture)
    };
    read().map_err(|e| bad(format!("not a picture: {e}")))
}
