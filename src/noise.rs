//! Seed to normals, bit for bit what PyTorch's CPU generator gives (x86-64 with AVX2), so that a seed means what it means in
//! ComfyUI.
//!
//! MT19937 (Matsumoto & Nishimura 1998), Box-Muller in blocks of 16, logarithm and sine as Cephes' polynomials in PyTorch's
//! order of fused multiply-adds. `f32::mul_add` rounds once on every target, so every target draws the same numbers; only
//! draws of fewer than 16, which take the platform's f64 logarithm and sine, may differ in the last bit.

/// MT19937's words of state, and the distance at which the twist mixes them.
const N: usize = 624;
const M: usize = 397;

/// PyTorch's CPU generator.
#[derive(Clone, Debug)]
pub struct Generator {
    state: [u32; N],
    next: usize,
    /// The second normal of the last pair that a small draw computed; it waits for the next small draw.
    cached: Option<f64>,
}

impl Generator {
    /// `torch.Generator().manual_seed(seed)`. As there, only the low 32 bits matter.
    pub fn new(seed: u64) -> Self {
        let mut state = [seed as u32; N];
        for j in 1..N {
            let s = state[j - 1];
            state[j] = 1_812_433_253u32.wrapping_mul(s ^ (s >> 30)).wrapping_add(j as u32);
        }
        Generator { state, next: N, cached: None }
    }

    /// The next tempered word.
    fn u32(&mut self) -> u32 {
        if self.next == N {
            for j in 0..N {
                let y = (self.state[j] & 0x8000_0000) | (self.state[(j + 1) % N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[j] = self.state[(j + M) % N] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// In [0, 1), 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.u32() & 0x00ff_ffff) as f32 * 2f32.powi(-24)
    }

    /// In [0, 1), 53 bits, the high word drawn first.
    fn uniform_f64(&mut self) -> f64 {
        let bits = (u64::from(self.u32()) << 32) | u64::from(self.u32());
        (bits & ((1 << 53) - 1)) as f64 * 2f64.powi(-53)
    }

    /// One call of `torch.randn(numel, generator=…)`: standard normals [numel], row-major for any shape of that many.
    ///
    /// As in PyTorch, two draws equal one draw of both only where the first is a multiple of 16 and the second at least 16.
    pub fn randn(&mut self, numel: usize) -> Vec<f32> {
        if numel < 16 {
            return (0..numel).map(|_| self.normal() as f32).collect();
        }
        let mut data: Vec<f32> = (0..numel).map(|_| self.uniform_f32()).collect();
        data.as_chunks_mut::<16>().0.iter_mut().for_each(box_muller);
        if !numel.is_multiple_of(16) {
            // The last 16 are drawn afresh, over some that were normal already.
            if let Some(tail) = data.last_chunk_mut::<16>() {
                tail.fill_with(|| self.uniform_f32());
                box_muller(tail);
            }
        }
        data
    }

    /// Small draws: f64 Box-Muller, two normals at a time.
    fn normal(&mut self) -> f64 {
        if let Some(cached) = self.cached.take() {
            return cached;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = 2.0 * std::f64::consts::PI * u1;
        self.cached = Some(radius * theta.sin());
        radius * theta.cos()
    }
}

/// `torch.randn(numel, generator=torch.Generator().manual_seed(seed))`: the noise [numel] of a seed.
pub fn randn(seed: u64, numel: usize) -> Vec<f32> {
    Generator::new(seed).randn(numel)
}

/// Sixteen uniforms to sixteen normals: the first eight give radii, the last eight angles.
fn box_muller(d: &mut [f32; 16]) {
    for j in 0..8 {
        let radius = (-2.0 * ln(1.0 - d[j])).sqrt();
        let (sin, cos) = sin_cos(std::f32::consts::TAU * d[j + 8]);
        d[j] = radius * cos;
        d[j + 8] = radius * sin;
    }
}

/// Cephes' logf, for the normal numbers above 0.
#[allow(clippy::excessive_precision)] // The digits are Cephes'.
fn ln(x: f32) -> f32 {
    const P: [f32; 9] = [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ];
    let bits = x.to_bits();
    let mut e = (bits >> 23) as f32 - 127.0 + 1.0;
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let mut m = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        e -= 1.0;
        m += mantissa;
    }
    let z = m * m;
    let mut y = P[1..].iter().fold(P[0], |y, &p| y.mul_add(m, p));
    y *= m;
    y = y.mul_add(z, e * -2.12194440e-4);
    y = (-0.5f32).mul_add(z, y);
    e.mul_add(0.693359375, m + y)
}

/// Cephes' sinf and cosf for x ≥ 0.
#[allow(clippy::excessive_precision)] // The digits are Cephes'.
fn sin_cos(x: f32) -> (f32, f32) {
    let j = ((x * 1.27323954473516) as u32 + 1) & !1;
    let f = j as f32;
    let mut t = f.mul_add(-0.78515625, x);
    t = f.mul_add(-2.4187564849853515625e-4, t);
    t = f.mul_add(-3.77489497744594108e-8, t);
    let z = t * t;
    let mut c = 2.443315711809948e-5f32.mul_add(z, -1.388731625493765e-3);
    c = c.mul_add(z, 4.166664568298827e-2);
    c = (c * z).mul_add(z, -(z * 0.5)) + 1.0;
    let mut s = (-1.9515295891e-4f32).mul_add(z, 8.3321608736e-3);
    s = s.mul_add(z, -1.6666654611e-1);
    s = (s * z).mul_add(t, t);
    let (sin, cos) = if j & 2 == 0 { (s, c) } else { (c, s) };
    let negative_cos = j.wrapping_sub(2) & 4 == 0;
    (if j & 4 != 0 { -sin } else { sin }, if negative_cos { -cos } else { cos })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    /// SHA-256 of the little-endian bytes: `sha256(t.numpy().tobytes())`.
    fn sha(values: &[f32]) -> String {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The goldens of this module are PyTorch 2.15.0's on x86-64 with AVX2; PyTorch 1.12.1 gives the same latents.
    #[test]
    fn latents_are_bit_equal_to_pytorch() {
        let goldens = [
            (42, 4 * 64 * 64, "e97f3de04c7c6ba86354db4402b91d4402ede9c72aabed29a96dd7d635a798ba"),
            (0, 4 * 64 * 64, "24efac55b39e95b2d74d8fb5b3a8e8a8e808bd04129f260c4cdbb225bb952a4d"),
            (42, 4 * 128 * 128, "23c72e908d9e3fbe50836a02f09ccde0acfcf28c00dec75b986c49dadf0c115e"),
            (42, 2 * 4 * 64 * 64, "2d20b77660fde17ac30bb287198be94fc36668f27ef670bdfe44234ea211f4cb"),
            (123_456_789, 4 * 61 * 63, "418221da8dfd03144f36b8d3d69fc723e768c49159306cbbd6b9a6a8ec0d39af"),
            (99, 4 * 512 * 512, "0bc6e6110cdf8192f82169f8be33e9531de448b03415c3611230de745451ed62"),
            (1, 16, "978a88ebb9e4ed7a6de9479f473b585d96ab8597281bbefe29121626a4142d63"),
            (1, 17, "9e976497df1a5075f4c5b44202da15cf3e2b518883881af8a93fe23e525271d4"),
            (u64::MAX, 64, "21db4d05293093bd7f58ab1bf71d245ea170bcb9c0c9ac662e28ecab45e5517e"),
        ];
        for (seed, numel, expected) in goldens {
            assert_eq!(sha(&randn(seed, numel)), expected, "seed {seed}, {numel} values");
        }
    }

    #[test]
    fn the_first_and_last_of_seed_42_are_pytorchs() {
        let noise = randn(42, 4 * 64 * 64);
        let first = [1.926_915_3, 1.487_284_1, 0.900_717_2, -2.105_521, 0.678_418_46, -1.234_544_9];
        assert_eq!(noise[..6], first);
        assert_eq!(noise[4 * 64 * 64 - 4..], [-0.811_143_8, -0.635_750_5, 0.972_809_73, -0.293_406_1]);
        let sum: f64 = noise.iter().map(|&v| f64::from(v)).sum();
        assert!((sum - 149.764_800_439_130_34).abs() < 1e-9, "{sum}");
    }

    #[test]
    fn small_draws_take_the_scalar_path() {
        assert_eq!(randn(42, 5), [0.336_690_37, 0.128_809_4, 0.234_462_37, 0.230_333_03, -1.122_856_4]);
        let mut generator = Generator::new(13);
        let many: Vec<f32> = (0..20_000).flat_map(|_| generator.randn(15)).collect();
        assert_eq!(sha(&many), "0e1b6875a24aeea2b42bbf0ee12c092afeb8f201d96e27975fa875f01e233a63");
        assert!(randn(42, 0).is_empty());
    }

    #[test]
    fn a_generator_goes_on_where_it_was() {
        let mut generator = Generator::new(3);
        let both: Vec<f32> = [generator.randn(32), generator.randn(32)].concat();
        assert_eq!(both, randn(3, 64));
        // Ragged: (1, 4, 5, 7) twice.
        let mut generator = Generator::new(7);
        assert_eq!(sha(&generator.randn(140)), "98a05a3319eafb083831abd5d8736c6869694da77082b96a82fc88c957a52c0c");
        assert_eq!(sha(&generator.randn(140)), "848d6e1fd412b7cea221d011e01b83ad520caa649cfc276900885e4afb841953");
        let mut generator = Generator::new(11);
        let thousands: Vec<f32> = (0..1000).flat_map(|_| generator.randn(1000)).collect();
        assert_eq!(sha(&thousands), "8a30d9b7a02a188198f07ab74597b14d82b433c4ee7cf4e8485624c9b014a88e");
    }

    /// The second normal of a small draw waits through a large one.
    #[test]
    fn small_and_large_draws_mix_as_in_pytorch() {
        let mut generator = Generator::new(5);
        let goldens = [
            (3, "dbee14b10f13c408e5fc93dd29e4cf27462cbd4d883fbd2d63f16083dd98fc34"),
            (20, "9913734a02cc0dfc92f5533cf659c1636ffc92d94918dce356fddf4a35a5f6d7"),
            (2, "59712f4b6f882fd0758c24ded0567d649a3a968323c31f3949c65c4d0479810e"),
            (15, "63bb62f1eaed53e60b35b697857f0eb30470c530a831de3cb08507431c821773"),
            (1, "ee8d69222f0ad721b815b503f4d906974f0749120131944b7ddc75c48e21aba0"),
            (16, "5a36c442fd2f428d16aa8b12cf9c4a21d2a4fd5dc7e3850d23c9caa0b2d71e37"),
            (4, "44984cb8442261082f8d22f0fb37ff925feff6f5f1ee390d981964f7eaf26c81"),
        ];
        for (call, (numel, expected)) in goldens.into_iter().enumerate() {
            assert_eq!(sha(&generator.randn(numel)), expected, "call {call}, {numel} values");
        }
    }

    #[test]
    fn seeds_equal_modulo_2_to_the_32_are_the_same() {
        assert_eq!(randn(7, 64), randn(7 + (1 << 32), 64));
    }
}
