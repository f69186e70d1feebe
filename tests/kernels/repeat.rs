//! repeat against the images themselves.

use scumble::ops::repeat::repeat;

use crate::compare::{check, limit};
use crate::harness::everywhere;
use crate::values::normal;

#[test]
fn images_several_times_over() {
    everywhere("repeat", |place| {
        for dtype in place.activations() {
            for ([b, h, w, c], times) in [([1, 1, 1, 4], 2), ([2, 3, 5, 12], 2), ([1, 7, 3, 36], 3)] {
                let x = normal(5, [b, h, w, c], dtype);
                let mut run = place.start(dtype);
                let bound = run.bind(&x);
                let out = repeat(&mut run.g, bound, times);
                assert_eq!(out.dims, [b * times, h, w, c]);
                let got = run.finish(&[out]);
                let expected = x.values.repeat(times as usize);
                check(place, limit(dtype), &format!("{b}x{h}x{w}x{c} {times} times"), &got[0], &expected);
            }
        }
    });
}
