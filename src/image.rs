//! Pictures: from the decoder's numbers to pixels, PNG with text, and labels.

use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::{MonoTextStyle, iso_8859_1::FONT_10X20};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::prelude::DrawTarget;
use embedded_graphics::text::{Baseline, Text};
use embedded_graphics::{Drawable, Pixel};

use crate::error::{Error, Result};

/// An RGB picture, 8 bits a channel, rows from the top.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// [height, width, 3] bytes.
    pub rgb: Vec<u8>,
}

/// Pixels of a picture.
fn area(width: u32, height: u32) -> usize {
    width as usize * height as usize
}

/// 0 .. 1 to the nearest of 256 levels, halves up; what lies outside is cut off.
fn level(value: f32) -> u8 {
    let scaled = value.clamp(0.0, 1.0) * 255.0;
    // As `round`, which many processors have no instruction for.
    let below = scaled as i32;
    (below + i32::from(scaled - below as f32 >= 0.5)) as u8
}

fn not_finite(found: String) -> Error {
    Error::invalid("the VAE's picture", "finite numbers (try --precision f32)", found)
}

impl Image {
    /// A picture of one colour.
    pub fn filled(width: u32, height: u32, color: [u8; 3]) -> Image {
        Image { width, height, rgb: color.repeat(area(width, height)) }
    }

    /// From the VAE's [height, width, STRIDE] in -1 .. 1, red, green, blue first of each STRIDE (3 or more) numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a colour is not finite: a black picture is never made of it in silence.
    pub fn from_nhwc<const STRIDE: usize>(data: &[f32], width: u32, height: u32) -> Result<Image> {
        assert_eq!(data.len(), area(width, height) * STRIDE, "picture of {width} x {height}, {STRIDE} numbers a pixel");
        assert!(STRIDE >= 3, "picture of {STRIDE} numbers a pixel");
        let mut rgb = vec![0; area(width, height) * 3];
        let mut bad = 0;
        for (to, from) in rgb.chunks_exact_mut(3).zip(data.as_chunks::<STRIDE>().0) {
            // All of them, so that they are converted side by side.
            let levels = from.map(|value| level((value + 1.0) / 2.0));
            to.copy_from_slice(&levels[..3]);
            bad += from[..3].iter().map(|value| u32::from(!value.is_finite())).sum::<u32>();
        }
        if bad > 0 {
            return Err(not_finite(format!("{bad} of {} that are NaN or infinite", area(width, height) * 3)));
        }
        Ok(Image { width, height, rgb })
    }

    /// The picture of [`crate::ops::levels::levels`]' words, one a pixel, [height, width].
    ///
    /// # Errors
    /// [`Error::Invalid`] if some are marked as not finite.
    ///
    /// # Panics
    /// If `words` is not of this size.
    pub fn from_levels(words: &[u32], width: u32, height: u32) -> Result<Image> {
        assert_eq!(words.len(), area(width, height), "picture of {width} x {height}, a word a pixel");
        let bad = words.iter().filter(|word| **word >> 24 != 0).count();
        if bad > 0 {
            return Err(not_finite(format!("{bad} pixels of {} with NaN or infinite numbers", words.len())));
        }
        let mut rgb = vec![0; area(width, height) * 3];
        for (to, word) in rgb.chunks_exact_mut(3).zip(words) {
            to.copy_from_slice(&word.to_le_bytes()[..3]);
        }
        Ok(Image { width, height, rgb })
    }

    /// A grey picture of `values` [height, width], 0 .. `max` to black .. white.
    pub fn from_gray(values: &[f32], width: u32, height: u32, max: f32) -> Image {
        assert_eq!(values.len(), area(width, height), "grey picture of {width} x {height}");
        let max = max.max(f32::MIN_POSITIVE);
        Image { width, height, rgb: values.iter().flat_map(|value| [level(value / max); 3]).collect() }
    }

    /// Enlarged or reduced by nearest neighbour.
    pub fn resize_nearest(&self, width: u32, height: u32) -> Image {
        let source = |at: u32, from: u32, to: u32| (u64::from(at) * u64::from(from) / u64::from(to)) as u32;
        let mut rgb = Vec::with_capacity(area(width, height) * 3);
        for y in 0..height {
            let row = source(y, self.height, height);
            rgb.extend((0..width).flat_map(|x| self.get(source(x, self.width, width), row)));
        }
        Image { width, height, rgb }
    }

    /// Where a pixel's bytes start.
    fn offset(&self, x: u32, y: u32) -> usize {
        assert!(x < self.width && y < self.height, "pixel {x}, {y} of {} x {}", self.width, self.height);
        (y as usize * self.width as usize + x as usize) * 3
    }

    /// The colour of a pixel.
    pub fn get(&self, x: u32, y: u32) -> [u8; 3] {
        let at = self.offset(x, y);
        [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
    }

    /// Set a pixel.
    pub fn set(&mut self, x: u32, y: u32, color: [u8; 3]) {
        let at = self.offset(x, y);
        self.rgb[at..at + 3].copy_from_slice(&color);
    }

    /// Put `other` with its top left corner at x, y; what lies outside is cut off.
    pub fn paste(&mut self, other: &Image, x: u32, y: u32) {
        let rows = other.height.min(self.height.saturating_sub(y));
        let columns = other.width.min(self.width.saturating_sub(x));
        if columns == 0 {
            return;
        }
        let bytes = columns as usize * 3;
        for row in 0..rows {
            let (from, to) = (other.offset(0, row), self.offset(x, y + row));
            self.rgb[to..to + bytes].copy_from_slice(&other.rgb[from..from + bytes]);
        }
    }

    /// Write text with its top left corner at x, y, in letters of 10 x 20 pixels; what lies outside is cut off. Letters beyond
    /// Latin-1 are question marks.
    pub fn draw_text(&mut self, x: u32, y: u32, text: &str, color: [u8; 3]) {
        let style = MonoTextStyle::new(&FONT_10X20, Rgb888::new(color[0], color[1], color[2]));
        if x >= self.width || y >= self.height {
            return;
        }
        let at = Point::new(x as i32, y as i32);
        let Ok(_) = Text::with_baseline(text, at, style, Baseline::Top).draw(&mut Canvas(self));
    }

    /// Pixels that [`Image::draw_text`] needs for a line of text.
    pub fn text_width(text: &str) -> u32 {
        FONT_10X20.character_size.width * text.chars().count() as u32
    }

    /// PNG with text chunks: (keyword, text), tEXt where the text is Latin-1, else iTXt.
    ///
    /// # Errors
    /// [`Error::Invalid`] if PNG cannot hold the picture (it is empty) or a keyword (1 to 79 letters of Latin-1).
    pub fn encode_png(&self, text: &[(&str, &str)]) -> Result<Vec<u8>> {
        let bad = |e: png::EncodingError| Error::invalid("PNG", "a picture and texts that PNG can hold", e);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        for (keyword, value) in text {
            // A NUL would end the text for some readers.
            let (keyword, value) = ((*keyword).to_owned(), value.replace('\0', " "));
            match value.chars().all(|letter| u32::from(letter) < 256) {
                true => encoder.add_text_chunk(keyword, value),
                false => encoder.add_itxt_chunk(keyword, value),
            }
            .map_err(bad)?;
        }
        let mut writer = encoder.write_header().map_err(bad)?;
        writer.write_image_data(&self.rgb).map_err(bad)?;
        writer.finish().map_err(bad)?;
        Ok(bytes)
    }
}

/// A picture as what the letters are drawn on.
struct Canvas<'a>(&'a mut Image);

impl OriginDimensions for Canvas<'_> {
    fn size(&self) -> Size {
        Size::new(self.0.width, self.0.height)
    }
}

impl DrawTarget for Canvas<'_> {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> std::result::Result<(), Self::Error> {
        for Pixel(at, color) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y))
                && x < self.0.width
                && y < self.0.height
            {
                self.0.set(x, y, [color.r(), color.g(), color.b()]);
            }
        }
        Ok(())
    }
}

/// (keyword, text) of a PNG's text chunks, those of Latin-1 (tEXt) first.
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

#[cfg(test)]
mod tests {
    use super::*;

    const WHITE: [u8; 3] = [255; 3];
    const BLACK: [u8; 3] = [0; 3];

    #[test]
    fn numbers_become_levels() {
        let image = Image::from_nhwc::<4>(&[-1.0, 0.0, 1.0, f32::NAN, -2.0, 2.0, 0.5, 9.0], 2, 1).expect("finite");
        assert_eq!(image.rgb, [0, 128, 255, 0, 255, 191]);
        let every: Vec<f32> = (0..=255).map(|n| n as f32 / 127.5 - 1.0).flat_map(|v| [v; 3]).collect();
        let image = Image::from_nhwc::<3>(&every, 256, 1).expect("finite");
        assert_eq!(image.rgb, (0..=255).flat_map(|n| [n; 3]).collect::<Vec<u8>>());
    }

    #[test]
    fn a_picture_that_is_not_finite_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error =
                Image::from_nhwc::<3>(&[0.0, 0.0, 0.0, 0.0, bad, 0.0], 2, 1).expect_err("not finite").to_string();
            assert!(error.contains("--precision f32") && error.ends_with("1 of 6 that are NaN or infinite"), "{error}");
        }
    }

    #[test]
    fn grey_is_scaled_by_its_maximum() {
        let image = Image::from_gray(&[0.0, 5.0, 10.0, 20.0], 2, 2, 10.0);
        assert_eq!(image.rgb.chunks_exact(3).map(|p| p[0]).collect::<Vec<u8>>(), [0, 128, 255, 255]);
        assert_eq!(Image::from_gray(&[0.0], 1, 1, 0.0).rgb, [0; 3]);
    }

    #[test]
    fn enlarging_repeats_pixels_and_reducing_undoes_it() {
        let image = Image { width: 3, height: 2, rgb: (0..18).collect() };
        let large = image.resize_nearest(12, 10);
        assert_eq!((large.width, large.height, large.rgb.len()), (12, 10, 360));
        for (x, y) in [(0, 0), (3, 4), (4, 0), (11, 9)] {
            assert_eq!(large.get(x, y), image.get(x / 4, y / 5), "{x}, {y}");
        }
        assert_eq!(large.resize_nearest(3, 2), image);
        assert!(image.resize_nearest(0, 4).rgb.is_empty());
    }

    #[test]
    fn what_is_pasted_outside_is_cut_off() {
        let mut image = Image::filled(4, 3, BLACK);
        let dot = Image::filled(2, 2, WHITE);
        for (x, y) in [(3, 2), (4, 0), (0, 3), (u32::MAX, u32::MAX)] {
            image.paste(&dot, x, y);
        }
        assert_eq!(image.get(3, 2), WHITE);
        assert_eq!(image.rgb.iter().filter(|&&v| v == 255).count(), 3);
        image.paste(&dot, 0, 1);
        assert_eq!([image.get(0, 0), image.get(1, 1), image.get(1, 2), image.get(2, 1)], [BLACK, WHITE, WHITE, BLACK]);
    }

    #[test]
    fn png_keeps_its_texts_and_pixels() {
        let long = "fox ".repeat(100_000);
        let texts = [("latin", "a fox, Füchslein\nSteps: 20"), ("not latin", "狐"), ("empty", ""), ("long", &long)];
        let image = Image { width: 3, height: 2, rgb: (0..18).collect() };
        let png = image.encode_png(&texts).expect("png");
        let read = read_png_text(&png).expect("png");
        assert_eq!(read.len(), texts.len());
        for (keyword, value) in texts {
            assert!(read.iter().any(|(k, v)| k == keyword && v == value), "{keyword}");
        }
        let mut reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().expect("png");
        let mut pixels = vec![0; reader.output_buffer_size().expect("small")];
        reader.next_frame(&mut pixels).expect("a frame");
        assert_eq!(pixels, image.rgb);
    }

    #[test]
    fn what_png_cannot_hold_is_an_error() {
        let image = Image::filled(1, 1, WHITE);
        assert!(image.encode_png(&[("", "no keyword")]).is_err());
        assert!(image.encode_png(&[("狐", "not Latin-1")]).is_err());
        assert!(Image::filled(0, 4, WHITE).encode_png(&[]).is_err());
        assert!(read_png_text(b"no picture").is_err());
        let png = image.encode_png(&[("a", "nul \0 nul")]).expect("png");
        assert_eq!(read_png_text(&png).expect("png"), [("a".to_owned(), "nul   nul".to_owned())]);
    }

    #[test]
    fn text_is_drawn_inside_its_box() {
        let (mut image, text) = (Image::filled(100, 40, WHITE), "with SÄG");
        image.draw_text(7, 9, text, BLACK);
        assert_eq!(Image::text_width(text), 80);
        let places = (0..40).flat_map(|y| (0..100).map(move |x| (x, y)));
        let drawn: Vec<(u32, u32)> = places.filter(|&(x, y)| image.get(x, y) == BLACK).collect();
        assert!(drawn.len() > 200 && drawn.len() < 80 * 20 / 2, "{}", drawn.len());
        assert!(drawn.iter().all(|&(x, y)| (7..87).contains(&x) && (9..29).contains(&y)), "{drawn:?}");
    }

    #[test]
    fn text_outside_is_cut_off() {
        let mut image = Image::filled(12, 8, WHITE);
        image.draw_text(5, 2, "a fox 狐\n\u{0}", BLACK);
        let before = image.clone();
        image.draw_text(u32::MAX, u32::MAX, "a fox", BLACK);
        image.draw_text(13, 0, "a fox", BLACK);
        assert_eq!(image, before);
    }
}
