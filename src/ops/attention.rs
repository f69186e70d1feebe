//! attention: softmax(Q Kᵀ / √d) V, streaming over the keys, and on request the attention mass per key that SAG needs.

mod products;

use super::product::mat_types;
use super::tiles::{PAIR, UNITS};
use super::{Variant, candidates, choose, source, vec4_of};
use crate::gpu::Caps;
use crate::gpu::graph::{DType, Graph, Node, Tensor, linear_grid};
use crate::gpu::kernel::{Kernel, Source, Value};

/// The kernels' dims, in the order of their `Dims` without the scale.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Images of q.
    pub batch: u32,
    /// Heads.
    pub heads: u32,
    /// Query tokens of an image.
    pub queries: u32,
    /// Key tokens of an image.
    pub keys: u32,
    /// Head dim / 4.
    pub d4: u32,
    /// Queries of a workgroup on matrix units; 0 where size and types do not suit them.
    pub coop: u32,
    /// Workgroups that share the keys there.
    pub shares: u32,
    /// Is it one head too wide for that, of a size that products on matrix units take?
    pub products: bool,
}

static PORTABLE: Source = source!("attention/portable.wgsl", "lib/linear.wgsl");
static REGISTER: Source = source!("attention/register.wgsl", "lib/keys_each.wgsl");
static SUBGROUP: Source = source!("attention/register.wgsl", "lib/keys_shared.wgsl");
static COOP: Source = source!("attention/coop.wgsl", "lib/row.wgsl", "lib/halves.wgsl");
static TILE: Source = source!("attention/tile.wgsl");
static WIDE: Source = source!("attention/wide.wgsl");
static MERGE: Source = source!("attention/merge.wgsl", "lib/linear.wgsl");
static MASS: Source = source!("attention/mass.wgsl", "lib/linear.wgsl");
static MASS_WORKGROUP: Source = source!("attention/mass_workgroup.wgsl");

/// The variants, the fastest first.
pub static VARIANTS: &[Variant<Dims>] = &[
    Variant {
        name: "subgroup",
        source: &SUBGROUP,
        needs: |caps| caps.is_cpu() && caps.subgroup_of(8),
        fits: |d| d.queries <= 8 * 65_535 && d.heads * d.d4.div_ceil(8) <= 65_535 && d.batch <= 65_535,
        grid: |d| [d.queries.div_ceil(8), d.heads * d.d4.div_ceil(8), d.batch],
    },
    Variant {
        name: "register",
        source: &REGISTER,
        needs: |caps| caps.is_cpu(),
        fits: |d| d.queries <= 8 * 65_535 && d.heads * d.d4.div_ceil(8) <= 65_535 && d.batch <= 65_535,
        grid: |d| [d.queries.div_ceil(8), d.heads * d.d4.div_ceil(8), d.batch],
    },
    Variant {
        name: "coop",
        source: &COOP,
        needs: |caps| caps.coop().is_some(),
        fits: |d| d.coop > 0,
        grid: |d| [d.queries.div_ceil(d.coop), d.heads, d.batch * d.shares],
    },
    Variant {
        name: "products",
        source: &products::SCORES,
        needs: |caps| caps.coop().is_some(),
        fits: |d| d.products,
        // Three kernels for each part of the queries: see `products`.
        grid: |_| [1, 1, 1],
    },
    Variant {
        name: "tile",
        source: &TILE,
        needs: |caps| !caps.is_cpu() && caps.workgroup_memory >= 16 << 10,
        // A thread holds an eighth of a head: wider ones leave registers.
        fits: |d| d.d4 <= 40 && d.queries <= 64 * 65_535 && d.heads <= 65_535 && d.batch <= 65_535,
        grid: |d| [d.queries.div_ceil(64), d.heads, d.batch],
    },
    Variant {
        name: "wide",
        source: &WIDE,
        needs: |caps| !caps.is_cpu() && caps.workgroup_memory >= 16 << 10,
        fits: |d| d.queries <= 32 * 65_535 && d.heads <= 65_535 && d.batch <= 65_535,
        grid: |d| [d.queries.div_ceil(32), d.heads, d.batch],
    },
    Variant {
        name: "portable",
        source: &PORTABLE,
        needs: |_| true,
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.batch * d.heads) * u64::from(d.queries), 64),
    },
];

/// The variants of the mass per key, the fastest first.
pub static MASS_VARIANTS: &[Variant<Dims>] = &[
    Variant {
        name: "workgroup",
        source: &MASS_WORKGROUP,
        needs: |caps| !caps.is_cpu() && caps.invocations >= 256,
        fits: |d| d.keys <= 4 * 65_535 && d.batch <= 65_535,
        // Four keys each.
        grid: |d| [d.keys.div_ceil(4), d.batch, 1],
    },
    Variant {
        name: "portable",
        source: &MASS,
        needs: |_| true,
        fits: |_| true,
        grid: |d| linear_grid(u64::from(d.batch) * u64::from(d.keys), 64),
    },
];

/// What attends to what. `q` [B, 1, queries, ..] from channel `q_offset` on; `kv` [B / repeat, 1, keys, ..] with keys from
/// channel `k_offset` and values from `v_offset` on; each heads · d channels wide.
#[derive(Clone, Copy)]
pub struct Attention {
    /// Queries.
    pub q: Tensor,
    /// First channel of the queries.
    pub q_offset: u32,
    /// Keys and values.
    pub kv: Tensor,
    /// First channel of the keys.
    pub k_offset: u32,
    /// First channel of the values.
    pub v_offset: u32,
    /// Heads.
    pub heads: u32,
    /// Channels of a head, a multiple of 4.
    pub head_dim: u32,
    /// Images of q that share one row of kv (a prompt's keys serve its whole batch).
    pub kv_repeat: u32,
    /// A query sees only keys up to its own position (CLIP).
    pub causal: bool,
}

impl Attention {
    /// Self-attention over fused [q, k, v] channels: `qkv` [B, 1, T, 3 · heads · d].
    pub fn fused(qkv: Tensor, heads: u32) -> Self {
        let width = qkv.channels() / 3;
        Attention {
            q: qkv,
            q_offset: 0,
            kv: qkv,
            k_offset: width,
            v_offset: 2 * width,
            heads,
            head_dim: width / heads,
            kv_repeat: 1,
            causal: false,
        }
    }

    /// Attention of `q` [B, 1, T, heads · d] to fused [k, v] channels: `kv` [B / repeat, 1, keys, 2 · heads · d].
    pub fn cross(q: Tensor, kv: Tensor, heads: u32) -> Self {
        let width = q.channels();
        Attention {
            q,
            q_offset: 0,
            kv,
            k_offset: 0,
            v_offset: width,
            heads,
            head_dim: width / heads,
            kv_repeat: q.batch() / kv.batch(),
            causal: false,
        }
    }

    fn dims(&self) -> Dims {
        let (queries, keys) = (self.q.tokens(), self.kv.tokens());
        Dims {
            batch: self.q.batch(),
            heads: self.heads,
            queries,
            keys,
            d4: self.head_dim / 4,
            coop: 0,
            shares: 1,
            products: false,
        }
    }

    /// The `Dims` of the kernels, word by word.
    fn words(&self, dims: &Dims) -> Vec<u32> {
        let scale = 1.0 / f64::from(self.head_dim).sqrt();
        vec![
            dims.batch,
            dims.heads,
            dims.queries,
            dims.keys,
            self.q.channels() / 4,
            self.q_offset / 4,
            self.kv.channels() / 4,
            self.k_offset / 4,
            self.v_offset / 4,
            self.kv_repeat,
            (scale as f32).to_bits(),
        ]
    }
}

/// Record attention; the result is [B, H, W, heads · d] of q's B, H, W.
pub fn attention(g: &mut Graph, a: &Attention) -> Tensor {
    record(g, a, None)
}

/// Record attention and, for the first `batch` images, the mass per key: the column sums of the head-mean softmax,
/// [batch, 1, 1, keys rounded up to 4] f32, rows packed (keys floats an image).
pub fn attention_with_mass(g: &mut Graph, a: &Attention, batch: u32) -> (Tensor, Tensor) {
    let mut dims = a.dims();
    let rows = dims.batch * dims.heads * dims.queries;
    let lse = g.activation_f32("attention lse", [1, 1, 1, rows.next_multiple_of(4)]);
    let out = record(g, a, Some(lse));
    dims.batch = batch;
    let variant = choose(g, "attention_mass", MASS_VARIANTS, &dims);
    let mass = g.activation_f32("attention mass", [1, 1, 1, (batch * dims.keys).next_multiple_of(4)]);
    g.push(Node {
        op: "attention_mass",
        variant: variant.name,
        kernel: Kernel {
            source: variant.source,
            libs: vec![],
            head: vec![("elem4", vec4_of(a.q.dtype)), ("D4", Value::U32(dims.d4))],
        },
        reads: vec![a.q, a.kv, lse],
        writes: vec![mass],
        dims: a.words(&dims),
        step: false,
        grid: (variant.grid)(&dims),
        flops: 2
            * u64::from(batch * dims.heads)
            * u64::from(dims.queries)
            * u64::from(dims.keys)
            * u64::from(a.head_dim),
    });
    (out, mass)
}

fn record(g: &mut Graph, a: &Attention, lse: Option<Tensor>) -> Tensor {
    let dims = a.dims();
    assert!(a.head_dim.is_multiple_of(4), "attention: head dim {} is no multiple of 4", a.head_dim);
    assert_eq!(
        a.q.batch(),
        a.kv.batch() * a.kv_repeat,
        "attention: q {:?}, kv {:?} x {}",
        a.q.dims,
        a.kv.dims,
        a.kv_repeat
    );
    assert_eq!(a.q.dtype, a.kv.dtype, "attention: types of q and kv");
    // The log-sums that are asked for are of all keys.
    let cuts = if lse.is_some() { coop_cut(g.caps(), a, 1).into_iter().collect() } else { coop_cuts(g.caps(), a) };
    let coop = cuts.first().map_or(0, |cut| cut.wm * cut.subgroups);
    let mut dims = Dims { coop, products: lse.is_none() && products::suits(g, a), ..dims };
    let rows = candidates(g, "attention", VARIANTS, &dims);
    let key = format!(
        "attention {:?} {}x{}x{} {}x{}",
        a.q.dtype, dims.batch, dims.heads, a.head_dim, dims.queries, dims.keys
    );
    let mut ways = Vec::new();
    for row in rows {
        if row.name == "coop" {
            ways.extend(cuts.iter().map(|cut| (row, Some(cut))));
        } else {
            ways.push((row, None));
        }
    }
    let name = |(row, cut): &(&Variant<Dims>, Option<&Cut>)| match cut {
        Some(Cut { shares: shares @ 2.., .. }) => format!("{}, {shares} shares", row.name),
        _ => row.name.to_owned(),
    };
    let (variant, cut) = ways[g.pick(key, ways.iter().map(name).collect())];
    let [b, h, w, _] = a.q.dims;
    let out = g.activation("attention", [b, h, w, a.heads * a.head_dim]);
    if variant.name == "products" {
        products::record(g, a, &dims, out);
        g.picked();
        return out;
    }
    if let Some(cut) = cut {
        (dims.coop, dims.shares) = (cut.wm * cut.subgroups, cut.shares);
    }
    let shares = dims.shares;
    let own = dims.batch * dims.heads * dims.queries;
    let (parts, lse_tensor) = if shares > 1 {
        let parts = g.activation_f32("attention to a share of the keys", [shares * b, h, w, out.channels()]);
        (parts, g.activation_f32("lse of shares", [1, 1, 1, (shares * own).next_multiple_of(4)]))
    } else {
        // The kernel declares lse; where nobody asked, it binds four floats that it does not write.
        (out, lse.unwrap_or_else(|| g.activation_f32("no lse", [1, 1, 1, 4])))
    };
    let with_lse = Value::Bool(lse.is_some() || shares > 1);
    let mut head = vec![("elem4", vec4_of(a.q.dtype)), ("D4", Value::U32(dims.d4)), ("WITH_LSE", with_lse)];
    match cut {
        Some(cut) => {
            head.extend(coop_head(cut, a));
            head.push(("out4", vec4_of(parts.dtype)));
        }
        None => head.push(("CAUSAL", Value::Bool(a.causal))),
    }
    g.push(Node {
        op: "attention",
        variant: variant.name,
        kernel: Kernel { source: variant.source, libs: vec![], head },
        reads: vec![a.q, a.kv],
        writes: vec![parts, lse_tensor],
        dims: a.words(&dims),
        step: false,
        grid: (variant.grid)(&dims),
        flops: 4
            * u64::from(dims.batch * dims.heads)
            * u64::from(dims.queries)
            * u64::from(dims.keys)
            * u64::from(a.head_dim),
    });
    if shares > 1 {
        g.push(Node {
            op: "attention",
            variant: "merge",
            kernel: Kernel {
                source: &MERGE,
                libs: vec![],
                head: vec![("elem4", vec4_of(out.dtype)), ("SHARES", Value::U32(shares))],
            },
            reads: vec![parts, lse_tensor],
            writes: vec![out],
            dims: vec![dims.batch * dims.queries, dims.queries, dims.heads, dims.d4],
            step: false,
            grid: linear_grid(out.len() / 4, 64),
            flops: 2 * u64::from(shares) * out.len(),
        });
    }
    g.picked();
    out
}

/// How the coop variant shares queries and keys: the matrices' edge and the subgroups' lanes, rows of a pass and of a subgroup, subgroups of a
/// workgroup, and workgroups for the same queries.
struct Cut {
    edge: u32,
    lanes: u32,
    rows: u32,
    wm: u32,
    subgroups: u32,
    shares: u32,
    /// Blocks of keys between barriers of the workgroup.
    stage: u32,
}

/// Channels of a head, in whole matrices, above which registers allow half the queries, and the kernel's loop stays one.
const NARROW: u32 = 80;
/// Workgroups that may share the keys.
const SHARES: [u32; 4] = [1, 2, 3, 4];

/// The ways to share the keys, the fastest by estimate first; none where sizes, types or the device do not suit.
fn coop_cuts(caps: &Caps, a: &Attention) -> Vec<Cut> {
    // Parts of large pictures' attention would take much memory, for a GPU that is full without them; wide heads have few keys, and gain
    // nothing.
    let few = |cut: &Cut| {
        let enough = cut.shares <= a.kv.tokens().div_ceil(cut.edge * cut.stage);
        enough && a.head_dim <= NARROW && cut.workgroups(a) <= 8 * u64::from(UNITS)
    };
    let cuts = SHARES.into_iter().filter_map(|shares| coop_cut(caps, a, shares));
    let mut cuts: Vec<Cut> = cuts.filter(|cut| cut.shares == 1 || few(cut)).collect();
    if !caps.is_cpu() {
        cuts.sort_by_key(|cut| cut.time(a));
    }
    cuts
}

impl Cut {
    fn workgroups(&self, a: &Attention) -> u64 {
        u64::from(a.q.tokens().div_ceil(self.wm * self.subgroups) * a.heads * self.shares) * u64::from(a.q.batch())
    }

    /// Nanoseconds on an H200, as measured there (benches/NOTES.md): of a key, for as many subgroups as a multiprocessor has together; then the
    /// start and end of a workgroup, and the merge. Many subgroups that share the keys' memory are faster.
    fn time(&self, a: &Attention) -> u64 {
        let &Cut { edge, wm, subgroups, shares, .. } = self;
        let (beside, of_key) = if subgroups > 4 { (1, 26) } else { (2, 35) };
        let rounds = self.workgroups(a).div_ceil(u64::from(UNITS * beside));
        let key = u64::from(wm * subgroups * beside * a.head_dim.next_multiple_of(edge)) * of_key / 10_000;
        let merge = 3000 + u64::from(a.q.rows()) * u64::from(a.heads * a.head_dim * shares) * 8 / 5000;
        let keys = u64::from(a.kv.tokens().div_ceil(shares));
        rounds * (keys * key + 15_000) + if shares > 1 { merge } else { 0 }
    }
}

/// The cut that was fastest on an H200 (benches/NOTES.md) where so many workgroups share the keys; none where sizes, types or the device do not
/// suit.
fn coop_cut(caps: &Caps, a: &Attention, shares: u32) -> Option<Cut> {
    let [edge, lanes] = caps.coop()?;
    let padded = a.head_dim.next_multiple_of(edge);
    if lanes < edge || padded > 160 || a.q.dtype != DType::F16 || a.causal || a.q.tokens() < 16 {
        return None;
    }
    // Every lane has a group of four.
    let rows = edge * lanes.div_ceil(edge * edge / 4);
    // A row of keys and values, as the kernel has it.
    let row = ((a.head_dim / 4).next_multiple_of(2) + padded / 4) / 4 * 4 + 2;
    let memory = |subgroups: u32, stage: u32| 2 * stage * edge * row * 8 + subgroups * rows * (edge + 8) * 6;
    let fits = |subgroups: u32| memory(subgroups, 1) <= caps.workgroup_memory && subgroups * lanes <= caps.invocations;
    let groups = |subgroups: u32| a.q.tokens().div_ceil(2 * rows * subgroups) * a.heads * a.q.batch() * shares;
    // Many subgroups for the same keys, where that leaves a quarter of the multiprocessors idle at most and their registers suffice.
    let many = |most: u32, subgroups: u32| padded <= most && 4 * groups(subgroups) >= 3 * UNITS && fits(subgroups);
    let (wm, subgroups) = if caps.is_cpu() {
        // There a barrier of a subgroup is the workgroup's, and subgroups part ways where rows are rescaled.
        (rows, 1)
    } else if many(48, 16) {
        (2 * rows, 16)
    } else if many(64, 12) {
        (2 * rows, 12)
    } else if padded <= NARROW && groups(4) > UNITS {
        (2 * rows, 4)
    } else {
        (rows, 4)
    };
    // Fewer barriers, where every stage is whole, as many workgroups fit on a multiprocessor, and the registers suffice.
    let most = if subgroups == 4 { PAIR } else { caps.workgroup_memory };
    let two = a.kv.tokens().is_multiple_of(2 * edge) && padded <= 48 && memory(subgroups, 2) <= most;
    let stage = 1 + u32::from(two);
    fits(subgroups).then_some(Cut { edge, lanes, rows, wm, subgroups, shares, stage })
}

fn coop_head(cut: &Cut, a: &Attention) -> Vec<(&'static str, Value)> {
    let &Cut { edge, lanes, rows, wm, subgroups, shares, stage } = cut;
    let padded = a.head_dim.next_multiple_of(edge);
    let values = [
        ("EDGE", edge),
        ("LANES", lanes),
        ("DP", padded),
        ("WM", wm),
        ("ROWS", rows),
        ("SUBGROUPS", subgroups),
        ("SHARES", shares),
        ("STAGE", stage),
        ("STAYS", u32::from(padded > NARROW)),
    ];
    let mut head: Vec<_> = values.map(|(name, value)| (name, Value::U32(value))).to_vec();
    let eights = [a.head_dim, a.kv.channels(), a.k_offset, a.v_offset].iter().all(|n| n.is_multiple_of(8));
    head.push(("KV_FOURS", Value::U32(1 + u32::from(eights))));
    head.push(("kv4", if eights { Value::Type("vec4<u32>") } else { vec4_of(a.kv.dtype) }));
    head.push(("RAGGED", Value::Bool(!a.kv.tokens().is_multiple_of(edge * stage))));
    head.extend(mat_types(edge));
    head
}

/// Element types that the networks use; tests run all of them.
pub const TYPES: &[DType] = &[DType::F32, DType::F16];
