//! levels: the same bytes as the host makes of the same numbers, and a mark where they are not finite.

use scumble::gpu::DType;
use scumble::image::Image;
use scumble::ops::levels::levels;

use crate::harness::everywhere;
use crate::values::normal;

/// Small words are numbers below the smallest normal one: none is lost.
fn words(floats: &[f64]) -> Vec<u32> {
    floats.iter().map(|&float| (float as f32).to_bits()).collect()
}

#[test]
fn bytes_of_pictures() {
    everywhere("levels", |place| {
        for [h, w] in [[8, 8], [5, 12], [64, 72]] {
            let mut x = normal(1, [1, h, w, 4], DType::F32);
            // Every level's middle and edges come by, and what is cut off.
            let count = x.values.len();
            let at = |i: usize| f64::from((2.2 * i as f32 / count as f32) - 1.1);
            x.values.iter_mut().enumerate().filter(|(i, _)| i % 2 == 0).for_each(|(i, value)| *value = at(i));
            let floats: Vec<f32> = x.values.iter().map(|&v| v as f32).collect();
            let mut run = place.start(DType::F32);
            let input = run.bind(&x);
            let out = levels(&mut run.g, input);
            let words = words(&run.finish(&[out])[0]);
            let want = Image::from_nhwc::<4>(&floats, w, h).expect("a picture");
            assert_eq!(Image::from_levels(&words, w, h).expect("a picture"), want, "{h} x {w}");
        }
    });
}

#[test]
fn numbers_that_are_not_finite() {
    everywhere("levels", |place| {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut x = normal(1, [1, 4, 4, 4], DType::F32);
            x.values[4 * 9 + 1] = bad;
            // The fourth channel is of no use.
            x.values[4 * 3 + 3] = bad;
            let mut run = place.start(DType::F32);
            let input = run.bind(&x);
            let out = levels(&mut run.g, input);
            let words = words(&run.finish(&[out])[0]);
            let marked: Vec<usize> = (0..words.len()).filter(|&i| words[i] >> 24 != 0).collect();
            assert_eq!(marked, [9], "{bad}");
            let error = Image::from_levels(&words, 4, 4).expect_err("not finite").to_string();
            assert!(error.contains("finite"), "{error}");
        }
    });
}
