//! The reference of what matmul and conv2d do to their sums: act(acc + bias) + residual.

use scumble::gpu::{DType, Gpu, Tensor};
use scumble::ops::{Activation, BiasRows, Epilogue, Param};

use crate::harness::Run;
use crate::values::{Host, normal};

/// Which bias a case has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    None,
    /// The layer's own.
    Own,
    /// One row for `rows` output rows, from channel `offset` of wider rows.
    Rows {
        rows: u32,
        offset: u32,
    },
}

/// An epilogue's form.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub activation: Activation,
    pub bias: Bias,
    pub residual: bool,
    pub f32_out: bool,
}

/// Bias and nothing else.
pub const PLAIN: Form = Form { activation: Activation::None, bias: Bias::Own, residual: false, f32_out: false };

/// A form with its host tensors, for an output of `rows` of `columns` sums.
pub struct HostEpilogue {
    form: Form,
    rows: usize,
    columns: usize,
    bias: Host,
    residual: Host,
}

impl HostEpilogue {
    /// `dtype` is the residual's.
    pub fn new(form: Form, rows: u32, columns: u32, dtype: DType) -> HostEpilogue {
        let (count, width) = match form.bias {
            Bias::Rows { rows: each, offset } => (rows.div_ceil(each), offset + columns + 8),
            _ => (1, columns),
        };
        HostEpilogue {
            form,
            rows: rows as usize,
            columns: columns as usize,
            bias: normal(71, [1, 1, count, width], DType::F32),
            residual: normal(72, [1, 1, rows, columns], dtype),
        }
    }

    /// The layer's own bias.
    pub fn own(&self, gpu: &Gpu) -> Option<Param> {
        (self.form.bias == Bias::Own).then(|| self.bias.param(gpu))
    }

    /// For the op, its output of dims `out`.
    pub fn bind(&self, run: &mut Run, out: [u32; 4]) -> Epilogue {
        let bias_rows = match self.form.bias {
            Bias::Rows { rows, offset } => Some(BiasRows { tensor: run.bind(&self.bias), offset, rows }),
            _ => None,
        };
        let residual = self.form.residual.then(|| {
            let flat: Tensor = run.bind(&self.residual);
            run.g.view(flat, out)
        });
        Epilogue { activation: self.form.activation, residual, bias_rows, f32_out: self.form.f32_out, normed: None }
    }

    /// The definition, of sums [rows, columns].
    pub fn reference(&self, sums: &[f64]) -> Vec<f64> {
        let bias = |row: usize, column: usize| match self.form.bias {
            Bias::None => 0.0,
            Bias::Own => self.bias.values[column],
            Bias::Rows { rows, offset } => {
                self.bias.values[row / rows as usize * self.bias.channels() + offset as usize + column]
            }
        };
        let biased = |row: usize, column: usize| sums[row * self.columns + column] + bias(row, column);
        let mut out = Vec::new();
        for row in 0..self.rows {
            if self.form.activation == Activation::Geglu {
                // Four values, then their four gates, in turn.
                let pairs = (0..self.columns / 8).flat_map(|i| (0..4).map(move |j| (i * 8 + j, i * 8 + 4 + j)));
                out.extend(pairs.map(|(value, gate)| biased(row, value) * gelu(biased(row, gate))));
                continue;
            }
            for column in 0..self.columns {
                let residual = if self.form.residual { self.residual.values[row * self.columns + column] } else { 0.0 };
                out.push(activate(self.form.activation, biased(row, column)) + residual);
            }
        }
        out
    }
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None | Activation::Geglu => x,
        Activation::Silu => silu(x),
        Activation::Gelu => gelu(x),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
    }
}

/// x σ(x)
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// x Φ(x)
fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))
}

/// Abramowitz & Stegun 7.1.6, all terms positive: erf x = 2/√π e^(-x²) Σ 2^n x^(2n+1) / (1·3·…·(2n+1)).
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[test]
fn the_reference_erf_is_exact() {
    // Values of Abramowitz & Stegun, table 7.1.
    for (x, expected) in [(0.0, 0.0), (0.5, 0.5204998778130465), (1.0, 0.8427007929497149), (-2.0, -0.9953222650189527)]
    {
        assert!((erf(x) - expected).abs() < 1e-15, "erf({x}) = {}", erf(x));
    }
}
