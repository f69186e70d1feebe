//! Pictures: from the decoder's numbers to pixels, PNG with text, labels, and files that are whole or not there.

use std::path::Path;

use embedded_graphics::Pixel;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::{MonoTextStyle, ascii::FONT_10X20};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::DrawTarget;
use embedded_graphics::text::{Baseline, Text};
use embedded_graphics::Drawable;

use crate::error::{Error, Result};
use crate::weights::io_problem;

/// An RGB picture, 8 bits a channel, rows from the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// width · height · 3 bytes.
    pub rgb: Vec<u8>,
}

impl Image {
    /// A picture of one colour.
    pub fn filled(width: u32, height: u32, color: [u8; 3]) -> Image {
        Image { width, height, rgb: color.repeat((width * height) as usize) }
    }

    /// From [H, W, stride] in -1 .. 1, red, green, blue first; rounded to the nearest of 256 levels.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a number is not finite: a black picture is not written silently.
    pub fn from_nhwc(data: &[f32], width: u32, height: u32, stride: usize) -> Result<Image> {
        assert_eq!(data.len(), (width * height) as usize * stride, "picture of {width}x{height}");
        let bad = data.iter().filter(|value| !value.is_finite()).count();
        if bad > 0 {
            return Err(Error::invalid("the decoded picture", "finite numbers (try --precision f32)", format!("{bad} that are not")));
        }
        let level = |v: &f32| ((v * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8;
        let rgb = data.chunks_exact(stride).flat_map(|pixel| pixel[..3].iter().map(level)).collect();
        Ok(Image { width, height, rgb })
    }

    /// A grey picture of `values` [H, W], 0 .. `max` to black .. white.
    pub fn from_gray(values: &[f32], width: u32, height: u32, max: f32) -> Image {
        assert_eq!(values.len(), (width * height) as usize, "grey picture of {width}x{height}");
        let level = |v: &f32| ((v / max.max(f32::MIN_POSITIVE)).clamp(0.0, 1.0) * 255.0).round() as u8;
        Image { width, height, rgb: values.iter().flat_map(|v| [level(v); 3]).collect() }
    }

    /// Enlarged or reduced by nearest neighbour.
    pub fn resize_nearest(&self, width: u32, height: u32) -> Image {
        let mut out = Image::filled(width, height, [0; 3]);
        for y in 0..height {
            for x in 0..width {
                let (sx, sy) = (x * self.width / width, y * self.height / height);
                out.set(x, y, self.get(sx, sy));
            }
        }
        out
    }

    /// The colour of a pixel.
    pub fn get(&self, x: u32, y: u32) -> [u8; 3] {
        let at = (y * self.width + x) as usize * 3;
        [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
    }

    /// Set a pixel.
    pub fn set(&mut self, x: u32, y: u32, color: [u8; 3]) {
        let at = (y * self.width + x) as usize * 3;
        self.rgb[at..at + 3].copy_from_slice(&color);
    }

    /// Put `other` with its top left corner at x, y; what lies outside is cut off.
    pub fn paste(&mut self, other: &Image, x: u32, y: u32) {
        for row in 0..other.height.min(self.height.saturating_sub(y)) {
            for column in 0..other.width.min(self.width.saturating_sub(x)) {
                self.set(x + column, y + row, other.get(column, row));
            }
        }
    }

    /// Write ASCII text with its top left corner at x, y, in letters of 10x20 pixels.
    pub fn draw_text(&mut self, x: u32, y: u32, text: &str, color: [u8; 3]) {
        let style = MonoTextStyle::new(&FONT_10X20, Rgb888::new(color[0], color[1], color[2]));
        let at = Point::new(x as i32, y as i32);
        let Ok(_) = Text::with_baseline(text, at, style, Baseline::Top).draw(self);
    }

    /// Width of [`Image::draw_text`]'s letters together.
    pub fn text_width(text: &str) -> u32 {
        10 * text.chars().count() as u32
    }

    /// PNG with text chunks (tEXt where the text is Latin-1, else iTXt).
    ///
    /// # Errors
    /// [`Error::Invalid`] if PNG cannot hold the picture or the keyword.
    pub fn encode_png(&self, text: &[(&str, &str)]) -> Result<Vec<u8>> {
        let bad = |e: png::EncodingError| Error::invalid("PNG", "a picture and texts that PNG can hold", e);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        for (keyword, value) in text {
            let latin = value.chars().all(|c| (c as u32) < 256 && c != '\0');
            match latin {
                true => encoder.add_text_chunk((*keyword).into(), (*value).into()),
                false => encoder.add_itxt_chunk((*keyword).into(), value.replace('\0', " ")),
            }
            .map_err(bad)?;
        }
        let mut writer = encoder.write_header().map_err(bad)?;
        writer.write_image_data(&self.rgb).map_err(bad)?;
        writer.finish().map_err(bad)?;
        Ok(bytes)
    }
}

impl OriginDimensions for Image {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Image {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> std::result::Result<(), Self::Error> {
        for Pixel(at, color) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y))
                && x < self.width
                && y < self.height
            {
                self.set(x, y, [color.r(), color.g(), color.b()]);
            }
        }
        Ok(())
    }
}

/// Keywords and texts of a PNG.
///
/// # Errors
/// [`Error::Invalid`] if the bytes are no PNG.
pub fn read_png_text(bytes: &[u8]) -> Result<Vec<(String, String)>> {
    let bad = |e: png::DecodingError| Error::invalid("PNG", "a PNG file", e);
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().map_err(bad)?;
    reader.finish().map_err(bad)?;
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().map(|t| (t.keyword.clone(), t.text.clone()));
    let utf8 = info.utf8_text.iter().filter_map(|t| Some((t.keyword.clone(), t.get_text().ok()?)));
    Ok(latin.chain(utf8).collect())
}

/// Write a file whole or not at all: beside it first, then renamed.
///
/// # Errors
/// [`Error::File`] if the folder is missing or closed to us; an older file of that name is then as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let hint = "choose another output with -o";
    if path.is_dir() {
        return Err(Error::file(path, "this is a folder, expected a file name", hint));
    }
    let Some(name) = path.file_name() else { return Err(Error::file(path, "no file name", hint)) };
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(format!(".{}.part", std::process::id()));
    let beside = path.with_file_name(beside);
    let written = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
    written.map_err(|e| {
        let _ = std::fs::remove_file(&beside);
        let problem = match e.kind() {
            std::io::ErrorKind::NotFound => "cannot be written: its folder does not exist".to_owned(),
            _ => format!("cannot be written: {}", io_problem(&e)),
        };
        Error::file(path, problem, hint)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_levels() {
        let image = Image::from_nhwc(&[-1.0, 0.0, 1.0, 9.0, -2.0, 2.0, 0.5, 9.0], 2, 1, 4).expect("finite");
        assert_eq!(image.rgb, [0, 128, 255, 0, 255, 191]);
        assert!(Image::from_nhwc(&[f32::NAN; 4], 1, 1, 4).is_err());
    }

    #[test]
    fn png_keeps_its_texts() {
        let texts = [("parameters", "a fox\nSteps: 20"), ("request", "{\"prompt\":\"ein Füchslein 狐\"}")];
        let png = Image::filled(3, 2, [1, 2, 3]).encode_png(&texts).expect("png");
        let read = read_png_text(&png).expect("png");
        assert_eq!(read.len(), 2);
        for (keyword, value) in texts {
            assert!(read.iter().any(|(k, v)| k == keyword && v == value), "{keyword} in {read:?}");
        }
    }

    #[test]
    fn text_is_drawn_inside_the_picture() {
        let mut image = Image::filled(60, 24, [255; 3]);
        image.draw_text(2, 2, "with SAG", [0; 3]);
        let dark = image.rgb.iter().filter(|&&v| v == 0).count();
        assert!(dark > 100 && dark < 60 * 24, "{dark}");
    }

    #[test]
    fn a_file_is_whole_or_not_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.png");
        write_atomic(&path, b"one").expect("written");
        write_atomic(&path, b"two").expect("written again");
        assert_eq!(std::fs::read(&path).expect("there"), b"two");
        let missing = folder.path().join("no/such/a.png");
        let error = write_atomic(&missing, b"x").expect_err("no folder").to_string();
        assert!(error.contains("its folder does not exist"), "{error}");
        assert!(write_atomic(folder.path(), b"x").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1, "no partial file is left");
    }
}
