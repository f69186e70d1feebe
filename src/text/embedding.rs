//! A textual inversion (Gal et al. 2022): vectors that stand for tokens, from a safetensors file.

use std::collections::BTreeMap;
use std::fmt;

use super::shown;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// A textual inversion: n vectors for each of the text encoders that it was made for, told apart by their width.
#[derive(Clone, PartialEq)]
pub struct Embedding {
    name: String,
    rows: usize,
    /// By width, [rows, width].
    vectors: BTreeMap<usize, Vec<f32>>,
}

impl Embedding {
    /// From a file of one of the kinds in use: `emb_params`; `clip_l` and `clip_g` for SDXL; or one tensor of any name for
    /// each width. All are \[n, width\], or \[width\] for n of 1. `name` is for messages.
    ///
    /// # Errors
    /// [`Error::File`] if it holds anything else, or a value that is not finite.
    pub fn new(name: &str, weights: &Weights) -> Result<Embedding> {
        let bad = |problem: String| {
            Error::file(
                weights.path(),
                problem,
                "give a textual inversion for Stable Diffusion 1, 2 or XL as .safetensors",
            )
        };
        let known: &[&[&str]] = &[&["emb_params"], &["clip_l", "clip_g"]];
        let known = known.iter().map(|names| names.iter().copied().filter(|name| weights.shape(name).is_some()));
        let found = known.map(Iterator::collect::<Vec<_>>).find(|names| !names.is_empty());
        let mut names = found.unwrap_or_else(|| weights.names().collect());
        names.sort_unstable();
        let (mut rows, mut vectors) = (None, BTreeMap::new());
        for tensor in names {
            let shape = weights.shape(tensor).unwrap_or_default().to_vec();
            let (n, width) = match shape[..] {
                [width] if width > 0 => (1, width),
                [n, width] if n > 0 && width > 0 => (n, width),
                _ => return Err(bad(format!("no embedding: tensor {tensor} is {shape:?}, expected [vectors, width]"))),
            };
            if vectors.contains_key(&width) {
                return Err(bad(format!("no embedding: it has several tensors {width} wide, expected one")));
            }
            let others = *rows.get_or_insert(n);
            if others != n {
                return Err(bad(format!("no embedding: tensor {tensor} has {n} vectors, another has {others}")));
            }
            let values = weights.f32(tensor, &shape)?;
            if !values.iter().all(|value| value.is_finite()) {
                return Err(bad(format!("damaged: tensor {tensor} has values that are not finite")));
            }
            vectors.insert(width, values);
        }
        let rows = rows.ok_or_else(|| bad("no embedding: it has no tensors".into()))?;
        Ok(Embedding { name: name.to_owned(), rows, vectors })
    }

    /// Its name, as in a prompt.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The tokens that it takes, n.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The widths of the text encoders that it is for, ascending.
    pub fn widths(&self) -> impl Iterator<Item = usize> {
        self.vectors.keys().copied()
    }

    /// The vectors [n, width] for a text encoder of this width, if it was made for such a one.
    pub fn rows_of_width(&self, width: usize) -> Option<&[f32]> {
        self.vectors.get(&width).map(Vec::as_slice)
    }

    /// The vectors for a text encoder of this width, one for each token.
    ///
    /// # Errors
    /// [`Error::Invalid`], which says what the embedding is for, if it has none.
    pub fn for_encoder(&self, width: usize) -> Result<std::slice::ChunksExact<'_, f32>> {
        let vectors = self.rows_of_width(width).ok_or_else(|| {
            let widths: Vec<usize> = self.widths().collect();
            let all: Vec<String> = widths.iter().map(usize::to_string).collect();
            let made_for = family(&widths).map_or(String::new(), |name| format!(", an embedding for {name}"));
            let model = family(&[width]).map_or(String::new(), |name| format!(" ({name})"));
            let expected = format!("vectors {width} wide, as this text encoder{model}");
            Error::invalid(
                format!("embedding {}", shown(&self.name)),
                expected,
                all.join(" and ") + " wide" + &made_for,
            )
        })?;
        Ok(vectors.chunks_exact(width))
    }
}

/// The models whose text encoders have these widths.
fn family(widths: &[usize]) -> Option<&'static str> {
    match widths {
        [768] => Some("Stable Diffusion 1"),
        [1024] => Some("Stable Diffusion 2"),
        [768, 1280] | [1280] => Some("SDXL"),
        _ => None,
    }
}

impl fmt::Debug for Embedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<usize> = self.widths().collect();
        f.debug_struct("Embedding")
            .field("name", &self.name)
            .field("rows", &self.rows)
            .field("widths", &widths)
            .finish()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::files::Bytes;

    impl Embedding {
        /// Vectors of widths, all 0.5.
        pub(in crate::text) fn of(name: &str, rows: usize, widths: &[usize]) -> Embedding {
            let vectors = widths.iter().map(|&width| (width, vec![0.5; rows * width])).collect();
            Embedding { name: name.into(), rows, vectors }
        }
    }

    /// A safetensors file: name, type, shape, bytes.
    pub(in crate::text) fn file(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert((*name).into(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
            data.extend(bytes);
        }
        let header = serde_json::to_vec(&header).expect("a header");
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn parse(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Result<Embedding> {
        Embedding::new("x", &Weights::new("x.safetensors".into(), Bytes::Owned(file(tensors)))?)
    }

    #[test]
    fn every_kind_of_file_is_read() {
        let one = parse(&[("emb_params", "F32", &[2, 3], f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))]).expect("A1111's");
        assert_eq!((one.rows(), one.rows_of_width(3)), (2, Some(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0][..])));
        assert_eq!(one.rows_of_width(2), None);
        let rows: Vec<&[f32]> = one.for_encoder(3).expect("3 wide").collect();
        assert_eq!(rows, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        // Of several tensors, the known names count.
        let step = ("step", "I64", &[1][..], vec![0; 8]);
        assert_eq!(parse(&[("emb_params", "F32", &[3], f32s(&[0.0; 3])), step]).expect("with a step").rows(), 1);
        let half = parse(&[("<fox>", "F16", &[2], vec![0x00, 0x3c, 0x00, 0xc0])]).expect("diffusers'");
        assert_eq!(half.rows_of_width(2), Some(&[1.0, -2.0][..]));
        let brain = parse(&[("<fox>", "BF16", &[1, 2], vec![0x80, 0x3f, 0x00, 0xc0])]).expect("diffusers'");
        assert_eq!(brain.rows_of_width(2), Some(&[1.0, -2.0][..]));
        let (l, g) =
            (("clip_l", "F32", &[2, 3][..], f32s(&[1.0; 6])), ("clip_g", "F32", &[2, 5][..], f32s(&[2.0; 10])));
        let both = parse(&[g.clone(), l.clone()]).expect("SDXL's");
        assert_eq!((both.rows(), both.widths().collect::<Vec<_>>()), (2, vec![3, 5]));
        assert_eq!(both.rows_of_width(5), Some(&[2.0; 10][..]));
        assert_eq!(format!("{both:?}"), r#"Embedding { name: "x", rows: 2, widths: [3, 5] }"#);
        let t5 = ("t5xxl", "F32", &[7, 9][..], f32s(&[1.0; 63]));
        assert_eq!(parse(&[g, l, t5]).expect("SD3's").widths().collect::<Vec<_>>(), [3, 5]);
    }

    #[test]
    fn what_is_no_embedding_is_refused() {
        let zeros = |n: usize| vec![0; 4 * n];
        let no = |tensors: &[(&str, &str, &[usize], Vec<u8>)], expected: &str| {
            let error = parse(tensors).expect_err(expected).to_string();
            assert!(error.starts_with("x.safetensors: ") && error.contains(expected), "{error}");
        };
        no(&[], "it has no tensors");
        no(&[("a", "F32", &[2], zeros(2)), ("b", "F32", &[3, 4], zeros(12))], "tensor b has 3 vectors, another has 1");
        no(
            &[("a", "F32", &[2], zeros(2)), ("b", "F32", &[2], zeros(2))],
            "it has several tensors 2 wide, expected one",
        );
        no(
            &[("clip_l", "F32", &[2], zeros(2)), ("clip_g", "F32", &[2, 3], zeros(6))],
            "tensor clip_l has 1 vectors, another has 2",
        );
        no(&[("conv", "F32", &[1, 1, 1], zeros(1))], "tensor conv is [1, 1, 1], expected [vectors, width]");
        no(&[("a", "F32", &[], zeros(1))], "tensor a is []");
        no(&[("a", "F32", &[0, 4], zeros(0))], "tensor a is [0, 4]");
        no(&[("a", "U8", &[2], vec![0; 2])], "has type U8");
        no(&[("a", "F32", &[2], f32s(&[1.0, f32::NAN]))], "not finite");
        no(&[("a", "F16", &[1], vec![0x00, 0x7c])], "not finite");
    }

    #[test]
    fn the_wrong_encoder_is_told() {
        let wrong = |widths: &[usize], width| {
            Embedding::of("fox", 1, widths).for_encoder(width).expect_err("wrong").to_string()
        };
        assert_eq!(
            wrong(&[768, 1280], 1024),
            "embedding fox: expected vectors 1024 wide, as this text encoder (Stable Diffusion 2), \
             found 768 and 1280 wide, an embedding for SDXL"
        );
        assert_eq!(
            wrong(&[768], 1280),
            "embedding fox: expected vectors 1280 wide, as this text encoder (SDXL), \
             found 768 wide, an embedding for Stable Diffusion 1"
        );
        assert_eq!(wrong(&[5], 64), "embedding fox: expected vectors 64 wide, as this text encoder, found 5 wide");
    }
}
