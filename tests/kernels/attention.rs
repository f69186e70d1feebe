//! attention against softmax(Q Kᵀ / √d) V, written out.

use scumble::gpu::DType;
use scumble::ops::attention::{Attention, attention};

use crate::compare::{check, limit};
use crate::harness::{Place, everywhere};
use crate::values::{Draws, Host, normal};

/// Attention with the host tensors it reads: what the ops' `Attention` says, in plain numbers.
pub struct Case {
    pub q: Host,
    pub kv: Host,
    pub offsets: [u32; 3],
    pub heads: u32,
    pub head_dim: u32,
    pub repeat: u32,
    pub causal: bool,
}

impl Case {
    /// Self-attention of `batch` images over fused [q, k, v].
    pub fn fused(batch: u32, tokens: u32, heads: u32, head_dim: u32, dtype: DType) -> Case {
        let width = heads * head_dim;
        let qkv = normal(41, [batch, 1, tokens, 3 * width], dtype);
        Case { q: qkv.clone(), kv: qkv, offsets: [0, width, 2 * width], heads, head_dim, repeat: 1, causal: false }
    }

    /// Cross-attention of `batch` images to `keys` tokens of batch / repeat prompts.
    pub fn cross(batch: u32, tokens: u32, keys: u32, heads: u32, head_dim: u32, repeat: u32, dtype: DType) -> Case {
        let width = heads * head_dim;
        let q = normal(42, [batch, 1, tokens, width], dtype);
        let kv = normal(43, [batch / repeat, 1, keys, 2 * width], dtype);
        Case::to_prompts(q, kv, heads)
    }

    /// Attention of these queries [B, 1, T, heads · d] to prompts, `kv` [P, 1, S, 2 · heads · d].
    pub fn to_prompts(q: Host, kv: Host, heads: u32) -> Case {
        let (width, repeat) = (q.dims[3], q.dims[0] / kv.dims[0]);
        Case { q, kv, offsets: [0, 0, width], heads, head_dim: width / heads, repeat, causal: false }
    }

    fn queries(&self) -> usize {
        self.q.dims[2] as usize
    }

    pub fn keys(&self) -> usize {
        self.kv.dims[2] as usize
    }

    /// The head's channels of a token of `host`, from channel `offset`.
    fn head<'a>(&self, host: &'a Host, token: usize, offset: u32, head: usize) -> &'a [f64] {
        &host.values[token * host.channels() + offset as usize + head * self.head_dim as usize..]
            [..self.head_dim as usize]
    }

    /// softmax(Q Kᵀ / √d) of one query, [keys]; zero for keys that it may not see.
    fn row(&self, batch: usize, head: usize, query: usize) -> Vec<f64> {
        let q = self.head(&self.q, batch * self.queries() + query, self.offsets[0], head);
        let end = if self.causal { query + 1 } else { self.keys() };
        let score = |key: usize| {
            let k = self.head(&self.kv, batch / self.repeat as usize * self.keys() + key, self.offsets[1], head);
            q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / f64::from(self.head_dim).sqrt()
        };
        let scores: Vec<f64> = (0..end).map(score).collect();
        let highest = scores.iter().copied().fold(f64::MIN, f64::max);
        let mut weights: Vec<f64> = scores.iter().map(|s| (s - highest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
        weights.resize(self.keys(), 0.0);
        weights
    }

    /// softmax(Q Kᵀ / √d) V as [batch, queries, heads, head_dim], and the column sums of the head-mean softmax as
    /// [batch, keys].
    pub fn reference(&self) -> (Vec<f64>, Vec<f64>) {
        let (batches, heads, d) = (self.q.dims[0] as usize, self.heads as usize, self.head_dim as usize);
        let mut out = vec![0.0; batches * self.queries() * heads * d];
        let mut mass = vec![0.0; batches * self.keys()];
        for batch in 0..batches {
            for query in 0..self.queries() {
                for head in 0..heads {
                    let at = ((batch * self.queries() + query) * heads + head) * d;
                    for (key, weight) in self.row(batch, head, query).into_iter().enumerate() {
                        let v = self.head(
                            &self.kv,
                            batch / self.repeat as usize * self.keys() + key,
                            self.offsets[2],
                            head,
                        );
                        out[at..at + d].iter_mut().zip(v).for_each(|(sum, v)| *sum += weight * v);
                        mass[batch * self.keys() + key] += weight / heads as f64;
                    }
                }
            }
        }
        (out, mass)
    }

    /// For the op.
    pub fn bind(&self, run: &mut crate::harness::Run) -> Attention {
        let [q_offset, k_offset, v_offset] = self.offsets;
        let q = run.bind(&self.q);
        // Fused: one tensor, bound twice, as the networks do.
        let kv = if self.offsets[1] > 0 { q } else { run.bind(&self.kv) };
        let Case { heads, head_dim, repeat: kv_repeat, causal, .. } = *self;
        Attention { q, q_offset, kv, k_offset, v_offset, heads, head_dim, kv_repeat, causal }
    }
}

fn check_case(place: &Place, case: &Case) -> bool {
    let mut run = place.start(case.q.dtype);
    let bound = case.bind(&mut run);
    let out = attention(&mut run.g, &bound);
    if !run.suits(place) {
        return false;
    }
    let got = run.finish(&[out]);
    let text = format!(
        "{:?} q {:?} kv {:?} heads {} x {} causal {}",
        case.q.dtype, case.q.dims, case.kv.dims, case.heads, case.head_dim, case.causal
    );
    check(place, limit(case.q.dtype), &text, &got[0], &case.reference().0);
    true
}

#[test]
fn every_head_dim() {
    everywhere("attention", |place| {
        for head_dim in [4, 8, 12, 32, 40, 64, 80, 96, 160] {
            check_case(place, &Case::fused(1, 37, 2, head_dim, DType::F32));
        }
    });
}

/// The VAE's one wide head.
#[test]
fn a_head_dim_of_512() {
    everywhere("attention", |place| _ = check_case(place, &Case::fused(1, 19, 1, 512, DType::F32)));
}

#[test]
fn every_type() {
    everywhere("attention", |place| {
        for dtype in place.activations() {
            check_case(place, &Case::fused(2, 33, 2, 40, dtype));
            check_case(place, &Case::cross(2, 20, 77, 2, 32, 1, dtype));
        }
    });
}

#[test]
fn token_counts_beside_the_blocks() {
    everywhere("attention", |place| {
        for tokens in [1, 2, 3, 31, 32, 33, 63, 64, 65, 97, 130] {
            check_case(place, &Case::fused(2, tokens, 3, 8, DType::F32));
        }
    });
}

#[test]
fn causal() {
    everywhere("attention", |place| {
        for tokens in [1, 6, 32, 33, 77] {
            check_case(place, &Case { causal: true, ..Case::fused(2, tokens, 2, 8, DType::F32) });
        }
    });
}

#[test]
fn cross_attention_to_prompts() {
    everywhere("attention", |place| {
        for keys in [1, 7, 77, 154] {
            check_case(place, &Case::cross(2, 45, keys, 2, 8, 1, DType::F32));
        }
    });
}

#[test]
fn images_share_a_prompts_keys() {
    everywhere("attention", |place| {
        check_case(place, &Case::cross(4, 9, 7, 2, 8, 2, DType::F32));
        check_case(place, &Case::cross(3, 9, 77, 2, 8, 3, DType::F32));
    });
}

/// Heads that fill matrices and heads that do not; queries and keys beside the blocks; scores that grow from block to block, so
/// that rows are rescaled, once and often.
#[test]
fn matrix_units() {
    everywhere("attention", |place| {
        if !place.takes(&[DType::F16]) {
            return;
        }
        for head_dim in [8, 12, 40, 64, 80, 160] {
            place.must_run(check_case(place, &Case::fused(2, 37, 2, head_dim, DType::F16)));
        }
        for tokens in [16, 32, 33, 65, 130] {
            place.must_run(check_case(place, &Case::fused(1, tokens, 2, 40, DType::F16)));
        }
        for keys in [1, 7, 77, 154] {
            place.must_run(check_case(place, &Case::cross(4, 45, keys, 2, 40, 2, DType::F16)));
        }
        let mut case = Case::fused(1, 96, 2, 8, DType::F16);
        for (i, value) in case.q.values.iter_mut().enumerate() {
            let (token, channel) = (i / 48, i % 48);
            let growth = if channel < 32 { 1.0 + token as f64 / 16.0 } else { 1.0 };
            *value = half::f16::from_f64(*value * growth).to_f64();
        }
        case.kv = case.q.clone();
        place.must_run(check_case(place, &case));
    });
}

/// Keys that several workgroups share, in every number of shares: blocks that shares do not divide, keys beside blocks, several images of a prompt.
#[test]
fn matrix_units_that_share_keys() {
    everywhere("attention", |place| {
        if !place.takes(&[DType::F16]) || place.variant != "coop" {
            return;
        }
        for case in [Case::fused(2, 70, 2, 40, DType::F16), Case::cross(4, 45, 77, 2, 64, 2, DType::F16)] {
            let mut merged = 0;
            for trial in 0..4 {
                let mut run = place.start(DType::F16);
                run.g.trial = Some(trial);
                let bound = case.bind(&mut run);
                let out = attention(&mut run.g, &bound);
                assert!(run.forced(place), "a case for matrix units did not run on them");
                merged += run.g.nodes().iter().filter(|node| node.variant == "merge").count();
                let got = run.finish(&[out]);
                let text = format!("{:?} {} x {} way {trial}", case.q.dims, case.heads, case.head_dim);
                check(place, limit(DType::F16), &text, &got[0], &case.reference().0);
            }
            assert_eq!(merged, 3, "two, three and four shares of the keys");
        }
    });
}

/// The VAE's head on matrix units: f32 activations, f16 operands; whole tiles and ragged ones, one image and two.
#[test]
fn a_wide_head_of_f32_activations() {
    everywhere("attention", |place| {
        if !place.takes(&[DType::F16]) {
            return;
        }
        for (batch, tokens) in [(1, 64), (2, 96)] {
            let case = Case::fused(batch, tokens, 1, 192, DType::F32);
            let mut run = place.start(DType::F32);
            run.g.operands = DType::F16;
            let bound = case.bind(&mut run);
            let out = attention(&mut run.g, &bound);
            assert!(
                place.variant != "products" || run.forced(place),
                "{batch} x {tokens} fits the wide head's products"
            );
            let got = run.finish(&[out]);
            check(place, limit(DType::F16), &format!("{batch} x {tokens}"), &got[0], &case.reference().0);
        }
    });
}

/// Many wide heads of few tokens as products; a prompt's keys for several images.
#[test]
fn matrix_units_for_wide_heads() {
    everywhere("attention", |place| {
        if !place.takes(&[DType::F16]) || place.variant != "products" {
            return;
        }
        let cases = [
            Case::fused(2, 64, 2, 160, DType::F16),
            Case::fused(1, 96, 3, 96, DType::F16),
            Case::cross(4, 45, 96, 2, 160, 2, DType::F16),
        ];
        for case in cases {
            assert!(check_case(place, &case), "fits the products");
        }
    });
}

/// Scores so large that exp without the running maximum overflows, and so small that all weights underflow.
#[test]
fn large_scores() {
    everywhere("attention", |place| {
        let mut case = Case::fused(1, 40, 1, 8, DType::F32);
        // q and k ten times as large: scores of some hundreds.
        for (i, v) in case.q.values.iter_mut().enumerate() {
            *v *= if i % 24 < 16 { 16.0 } else { 1.0 };
        }
        case.kv = case.q.clone();
        check_case(place, &case);
    });
}

#[test]
fn ragged_shapes() {
    everywhere("attention", |place| {
        for mut draw in Draws::cases(3) {
            let dtype = draw.pick(&place.activations().collect::<Vec<_>>());
            let (heads, head_dim) = (draw.of(1, 5), draw.pick(&[8, 40, 64, 160]));
            let (batch, tokens) = (draw.of(1, 3), draw.of(1, 150));
            let case = match draw.of(0, 1) {
                0 => Case::fused(batch, tokens, heads, head_dim, dtype),
                _ => Case::cross(2 * batch, tokens, draw.of(1, 200), heads, head_dim, draw.pick(&[1, 2]), dtype),
            };
            check_case(place, &case);
        }
    });
}
