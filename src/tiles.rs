//! A network on an image in tiles that share the norms' statistics, so that the result is the whole's: how it is cut, what each
//! tile sees, what is found out for all.

use crate::denoiser::Step;
use crate::error::Result;
use crate::gpu::{Buffer, DType, Gpu, Graph, Statistics, Tensor, Tile};
use crate::pipeline::run_once;

/// A tile along one axis, in units of the side where it is cut: what it sees, and which part of that is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    from: u32,
    to: u32,
    own_from: u32,
    own_to: u32,
}

/// `size` cut into tiles of at most `tile`, each seeing `margin` more on either side as far as there is any.
fn spans(size: u32, tile: u32, margin: u32) -> Vec<Span> {
    let count = size.div_ceil(tile.max(1));
    let edge = |i: u32| (u64::from(size) * u64::from(i) / u64::from(count)) as u32;
    let span = |i: u32| {
        let (own_from, own_to) = (edge(i), edge(i + 1));
        Span { from: own_from.saturating_sub(margin), to: (own_to + margin).min(size), own_from, own_to }
    };
    (0..count).map(span).collect()
}

impl Span {
    /// All of an axis, which is its own.
    fn whole(size: u32) -> Span {
        Span { from: 0, to: size, own_from: 0, own_to: size }
    }

    /// In units `align` times smaller, cut at `size`.
    fn scaled(self, align: u32, size: u32) -> Span {
        let at = |n: u32| (n * align).min(size);
        Span { from: at(self.from), to: at(self.to), own_from: at(self.own_from), own_to: at(self.own_to) }
    }

    /// Its own part, counted from where it begins.
    fn own(self) -> [u32; 2] {
        [self.own_from - self.from, self.own_to - self.from]
    }
}

/// An image on the host, [h, w, c].
pub(crate) struct Plane {
    pub h: u32,
    pub w: u32,
    pub c: u32,
    pub data: Vec<f32>,
}

impl Plane {
    fn zeros(h: u32, w: u32, c: u32) -> Plane {
        Plane { h, w, c, data: vec![0.0; (h * w * c) as usize] }
    }

    /// Rows `y` and columns `x`.
    fn cut(&self, y: Span, x: Span) -> Plane {
        let mut out = Plane { h: y.to - y.from, w: x.to - x.from, c: self.c, data: Vec::new() };
        for row in y.from..y.to {
            let at = ((row * self.w + x.from) * self.c) as usize;
            out.data.extend_from_slice(&self.data[at..at + (out.w * self.c) as usize]);
        }
        out
    }

    /// Put the part of `tile` that is its own, both scaled by `up / down`, where it belongs.
    fn paste(&mut self, tile: &Plane, y: Span, x: Span, up: u32, down: u32) {
        let scale = |n: u32| n * up / down;
        let width = ((scale(x.own_to) - scale(x.own_from)) * self.c) as usize;
        for row in scale(y.own_from)..scale(y.own_to) {
            let from = (((row - scale(y.from)) * tile.w + scale(x.own_from) - scale(x.from)) * self.c) as usize;
            let to = ((row * self.w + scale(x.own_from)) * self.c) as usize;
            self.data[to..to + width].copy_from_slice(&tile.data[from..from + width]);
        }
    }
}

/// A network, or a part of one, on one image [1, h, w, C].
pub(crate) type Network<'a> = &'a dyn Fn(&mut Graph, Tensor) -> Tensor;

/// Mean and squared deviations of each channel, and how many pixels they are of: pooled over tiles (Chan et al. 1979).
struct Pooled {
    pixels: u32,
    /// [C] each, f64: a picture has millions of pixels.
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Pooled {
    fn new(channels: usize) -> Pooled {
        Pooled { pixels: 0, mean: vec![0.0; channels], squares: vec![0.0; channels] }
    }

    /// Add the chunks of a tile's norm, [chunks, C/4, 2, 4].
    fn add(&mut self, sums: &[f32], pixels: u32, chunk: u32) {
        let channels = self.mean.len();
        for (i, of_chunk) in sums.chunks_exact(channels * 2).enumerate() {
            let n = chunk.min(pixels - i as u32 * chunk);
            let total = f64::from(self.pixels + n);
            for c in 0..channels {
                let at = c / 4 * 8 + c % 4;
                let delta = f64::from(of_chunk[at]) - self.mean[c];
                self.mean[c] += delta * f64::from(n) / total;
                self.squares[c] +=
                    f64::from(of_chunk[at + 4]) + delta * delta * f64::from(self.pixels) * f64::from(n) / total;
            }
            self.pixels += n;
        }
    }

    /// As one chunk's sums, [1, C/4, 2, 4].
    fn sums(&self) -> Vec<f32> {
        let group = |c: usize| [&self.mean[c..c + 4], &self.squares[c..c + 4]].concat();
        (0..self.mean.len()).step_by(4).flat_map(group).map(|v| v as f32).collect()
    }
}

/// A tile and where its numbers are: on the device between the passes, or brought there for each.
struct Piece {
    y: Span,
    x: Span,
    held: Option<Buffer>,
}

impl Piece {
    async fn buffer(&self, gpu: &Gpu, image: &Plane) -> Result<Buffer> {
        match &self.held {
            Some(buffer) => Ok(buffer.clone()),
            None => gpu.upload("image", &image.cut(self.y, self.x).data).await,
        }
    }

    /// A recording that begins with this tile.
    fn start(&self, gpu: &Gpu, c: u32, buffer: &Buffer, given: &[(Buffer, u32)]) -> (Graph, Tensor) {
        let mut g = Graph::new(gpu, DType::F32);
        let size = [self.y.to - self.y.from, self.x.to - self.x.from];
        let image = g.bind("image", buffer, [1, size[0], size[1], c], DType::F32);
        let mut known = std::collections::VecDeque::new();
        for (buffer, pixels) in given {
            let c4 = (buffer.bytes() / 32) as u32;
            known.push_back((g.bind("group norm sums", buffer, [1, 1, c4, 8], DType::F32), *pixels));
        }
        g.statistics = Statistics::Tile(Tile { given: known, size, own: [self.y.own(), self.x.own()], next: None });
        (g, image)
    }
}

/// Run a network on one image.
pub(crate) async fn run(gpu: &Gpu, image: &Plane, network: Network<'_>) -> Result<Plane> {
    run_piece(gpu, image, &Piece { y: Span::whole(image.h), x: Span::whole(image.w), held: None }, network, &[]).await
}

/// Run a network on a tile, its norms' statistics given.
async fn run_piece(
    gpu: &Gpu,
    image: &Plane,
    piece: &Piece,
    network: Network<'_>,
    given: &[(Buffer, u32)],
) -> Result<Plane> {
    let buffer = piece.buffer(gpu, image).await?;
    let (mut g, x) = piece.start(gpu, image.c, &buffer, given);
    let out = network(&mut g, x);
    let result = gpu.storage("result", out.bytes()).await?;
    g.keep(out, &result);
    run_once(gpu, g, &Step { c_in: 1.0, ..Default::default() }, None).await?;
    drop(buffer);
    let data = result.read(out.len() as usize).await?;
    Ok(Plane { h: out.height(), w: out.width(), c: out.channels(), data })
}

/// The sums of the first norm that is not given, of a tile's own part: (sums, pixels, pixels of a chunk); none if all are given.
async fn next_sums(
    gpu: &Gpu,
    image: &Plane,
    piece: &Piece,
    network: Network<'_>,
    given: &[(Buffer, u32)],
) -> Result<Option<(Vec<f32>, u32, u32)>> {
    let buffer = piece.buffer(gpu, image).await?;
    let (mut g, x) = piece.start(gpu, image.c, &buffer, given);
    network(&mut g, x);
    let Statistics::Tile(Tile { next: Some(sums), .. }) = std::mem::take(&mut g.statistics) else { return Ok(None) };
    // What follows needs these sums of all tiles first.
    g.truncate(sums.nodes);
    let result = gpu.storage("group norm sums", sums.tensor.bytes()).await?;
    g.keep(sums.tensor, &result);
    run_once(gpu, g, &Step { c_in: 1.0, ..Default::default() }, None).await?;
    Ok(Some((result.read(sums.tensor.len() as usize).await?, sums.pixels, sums.chunk)))
}

/// Where and how tiles are cut.
pub(crate) struct Cut {
    /// Side of a tile without its margins, and how far beyond it sees.
    pub tile: u32,
    pub margin: u32,
    /// Edges are multiples of this.
    pub align: u32,
    /// The result's side for one of the image's, up / down.
    pub up: u32,
    pub down: u32,
    /// Do the tiles stay on the device between the passes?
    pub held: bool,
}

/// Run the part of a network that sees no further than the margin on an image in tiles.
pub(crate) async fn tiled(gpu: &Gpu, image: Plane, network: Network<'_>, cut: &Cut) -> Result<Plane> {
    let &Cut { tile, margin, align, up, down, held } = cut;
    let along = |size: u32| -> Vec<Span> {
        let all = spans(size.div_ceil(align), (tile / align).max(1), margin.div_ceil(align));
        all.into_iter().map(|span| span.scaled(align, size)).collect()
    };
    let mut pieces = Vec::new();
    for y in along(image.h) {
        for x in along(image.w) {
            let mut piece = Piece { y, x, held: None };
            if held {
                piece.held = Some(piece.buffer(gpu, &image).await?);
            }
            pieces.push(piece);
        }
    }
    // The statistics of one norm after the other: each is exact, since those before it are.
    let mut given: Vec<(Buffer, u32)> = Vec::new();
    loop {
        let mut pooled: Option<Pooled> = None;
        for piece in &pieces {
            let Some((sums, pixels, chunk)) = next_sums(gpu, &image, piece, network, &given).await? else { break };
            let chunks = pixels.div_ceil(chunk) as usize;
            pooled.get_or_insert_with(|| Pooled::new(sums.len() / chunks / 2)).add(&sums, pixels, chunk);
        }
        let Some(norm) = pooled else { break };
        given.push((gpu.upload("group norm sums", &norm.sums()).await?, norm.pixels));
    }
    let mut out: Option<Plane> = None;
    for piece in &pieces {
        let made = run_piece(gpu, &image, piece, network, &given).await?;
        let out = out.get_or_insert_with(|| Plane::zeros(image.h * up / down, image.w * up / down, made.c));
        out.paste(&made, piece.y, piece.x, up, down);
    }
    match out {
        Some(out) => Ok(out),
        None => unreachable!("an image has a tile"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_everything_once_and_see_their_margins() {
        for (size, tile, margin) in [(64, 32, 8), (65, 32, 16), (7, 32, 3), (100, 33, 0), (5, 1, 2)] {
            let all = spans(size, tile, margin);
            assert_eq!((all[0].own_from, all[all.len() - 1].own_to), (0, size));
            assert!(all.windows(2).all(|pair| pair[0].own_to == pair[1].own_from));
            for s in all {
                assert!(s.own_to > s.own_from && s.own_to - s.own_from <= tile);
                assert_eq!((s.from, s.to), (s.own_from.saturating_sub(margin), (s.own_to + margin).min(size)));
            }
        }
    }

    #[test]
    fn pooled_statistics_are_those_of_the_whole() {
        let values: Vec<f32> = (0..4 * 30).map(|i| (i as f32 * 0.7).sin() * 3.0 + i as f32).collect();
        let sums = |pixels: &[f32]| {
            let n = pixels.len() / 4;
            let mean: Vec<f32> = (0..4).map(|c| pixels.iter().skip(c).step_by(4).sum::<f32>() / n as f32).collect();
            let squares: Vec<f32> =
                (0..4).map(|c| pixels.iter().skip(c).step_by(4).map(|v| (v - mean[c]).powi(2)).sum::<f32>()).collect();
            [mean, squares].concat()
        };
        let mut pooled = Pooled::new(4);
        pooled.add(&[sums(&values[..48]), sums(&values[48..64])].concat(), 16, 12);
        pooled.add(&sums(&values[64..]), 14, 16);
        assert_eq!(pooled.pixels, 30);
        for (found, expected) in pooled.sums().iter().zip(sums(&values)) {
            assert!((found - expected).abs() < 1e-3 * expected.abs(), "{found} {expected}");
        }
    }
}
