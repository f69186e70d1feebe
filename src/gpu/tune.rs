//! Choice by measurement: an op that has several ways to run asks here which is fastest on this device. The built-in answer is the
//! op's own estimate; [`Gpu::tune`] measures a whole recording with every way in turn, in place, and keeps what won.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

use web_time::{Duration, Instant};

use super::buffer::Buffer;
use super::device::Gpu;
use super::graph::{DType, Graph};
use super::run::{Program, Steps};
use super::wait::lock;
use crate::error::{Error, Result};

/// Ways of one op that are tried, the best by estimate first: each costs a compilation.
const TRIALS: usize = 8;
/// Runs of a recording with each way; the fastest counts.
const RUNS: usize = 5;
/// A card's clock falls while kernels are compiled and is slow to rise: so long it works before a measurement.
const WARM: Duration = Duration::from_millis(300);

/// What an op was asked for, in how many ways it could have run, and its dispatches.
pub(super) struct Pick {
    key: String,
    ways: Vec<String>,
    taken: usize,
    nodes: Range<usize>,
}

impl Pick {
    /// Nodes were put between its own and others; `ahead` says where each is now.
    pub(super) fn move_nodes(&mut self, ahead: impl Fn(usize) -> usize) {
        let Range { start, end } = self.nodes;
        self.nodes = if start == end { ahead(start)..ahead(start) } else { ahead(start)..ahead(end - 1) + 1 };
    }

    /// Only so many nodes are left.
    pub(super) fn cut_nodes(&mut self, most: usize) {
        self.nodes = self.nodes.start.min(most)..self.nodes.end.min(most);
    }
}

/// What tuning found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tuned {
    /// Choices measured now; none where all were known.
    pub choices: usize,
    /// Milliseconds of the recording's tuned ops by estimate, and by the choices.
    pub before_ms: f64,
    /// See `before_ms`.
    pub after_ms: f64,
}

/// Hears how many trials are done, of how many; breaks to cancel.
pub type Observe<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;

/// A recording to tune.
pub struct Subject<'a> {
    /// Element type of its activations.
    pub dtype: DType,
    /// Records it, always alike.
    pub record: &'a dyn Fn(&mut Graph),
    /// Buffers for its arguments.
    pub arguments: &'a [&'a Buffer],
    /// Scalars, of which the first slot is used.
    pub steps: &'a Steps,
}

impl Graph {
    /// Which of `ways` to run, best by estimate first: the tuned one for `key` if it is among them, else the first.
    /// [`Graph::picked`] is called when its dispatches are recorded.
    pub fn pick(&mut self, key: String, ways: Vec<String>) -> usize {
        let known = || self.gpu.tuned_way(&key).and_then(|way| ways.iter().position(|name| *name == way));
        let taken = match self.trial {
            Some(trial) => trial.min(ways.len() - 1),
            None => known().unwrap_or(0),
        };
        let at = self.nodes.len();
        self.picks.push(Pick { key, ways, taken, nodes: at..at });
        taken
    }

    /// The nodes of every op that was picked, in order; what was put between them is none of them.
    #[cfg(test)]
    pub(crate) fn picked_nodes(&self) -> impl Iterator<Item = Range<usize>> {
        self.picks.iter().map(|pick| pick.nodes.clone())
    }

    /// Was what was recorded last picked? Then what is recorded next may do a part of its work, more in one way than in another: see
    /// [`Graph::picked_together`].
    pub fn after_pick(&self) -> bool {
        self.picks.last().is_some_and(|pick| !pick.nodes.is_empty() && pick.nodes.end == self.nodes.len())
    }

    /// What was picked before, if nothing stands between, is timed with the last, which should have had one way. Where nothing is, does nothing.
    pub fn picked_together(&mut self) {
        if let [.., before, last] = &mut self.picks[..]
            && before.nodes.end == last.nodes.start
        {
            before.nodes.end = last.nodes.end;
        }
    }

    /// The dispatches since the last [`Graph::pick`] are that op's.
    pub fn picked(&mut self) {
        if let Some(pick) = self.picks.last_mut() {
            pick.nodes.end = self.nodes.len();
        }
    }
}

/// The fastest way of each key so far: its milliseconds and name.
type Best = BTreeMap<String, (f64, String)>;

impl Gpu {
    /// Measure a recording with every way of its ops that is not known yet, and keep the fastest. `observe` hears how many
    /// trials are done, of how many, and may break to cancel.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; [`Error::Invalid`] on a device without timestamps; as [`Program::new`]; [`Error::File`] if the choices cannot be kept.
    pub async fn tune(&self, subject: &Subject<'_>, observe: &mut Observe<'_>) -> Result<Tuned> {
        let g = self.trial(subject, None);
        let unknown = |g: &Graph| g.picks.iter().any(|pick| pick.ways.len() > 1 && self.tuned_way(&pick.key).is_none());
        if !unknown(&g) {
            return Ok(Tuned::default());
        }
        if !self.caps().timestamps {
            return Err(Error::invalid("--autotune", "a device that tells the time (timestamps)", &self.caps().name));
        }
        let trials = g.picks.iter().map(|pick| pick.ways.len()).max().unwrap_or(1).min(TRIALS);
        let (mut best, mut first) = (Best::new(), 0.0);
        for trial in 0..trials {
            let g = self.trial(subject, Some(trial));
            let times = self.times_by_key(g, subject).await?;
            if trial == 0 {
                first = times.values().map(|(ms, _)| ms).sum();
            }
            for (key, found) in times {
                let known = best.entry(key).or_insert_with(|| found.clone());
                if found.0 < known.0 {
                    *known = found;
                }
            }
            if observe(trial + 1, trials).is_break() {
                return Err(Error::Cancelled);
            }
        }
        let tuned = Tuned { choices: best.len(), before_ms: first, after_ms: best.values().map(|(ms, _)| ms).sum() };
        let mut choices = lock(&self.inner.choices);
        choices.extend(best.into_iter().map(|(key, (_, way))| (key, way)));
        if let Some(cache) = &self.inner.cache {
            cache.save_choices(&mut choices)?;
        }
        Ok(tuned)
    }

    /// How many choices tuning has made so far.
    pub(crate) fn tuned(&self) -> usize {
        lock(&self.inner.choices).len()
    }

    /// The way that was measured to be the fastest for `key`.
    fn tuned_way(&self, key: &str) -> Option<String> {
        lock(&self.inner.choices).get(key).cloned()
    }

    fn trial(&self, subject: &Subject<'_>, trial: Option<usize>) -> Graph {
        let mut g = Graph::new(self, subject.dtype);
        g.trial = trial;
        (subject.record)(&mut g);
        g
    }

    /// The milliseconds of all ops of each key, in the way that this trial takes, and the way.
    async fn times_by_key(&self, mut g: Graph, subject: &Subject<'_>) -> Result<Best> {
        let picks = std::mem::take(&mut g.picks);
        let mut program = Program::new(self, g).await?;
        program.prepare(subject.arguments).await?;
        let since = Instant::now();
        let mut cold = true;
        while std::mem::take(&mut cold) || (!self.caps().is_cpu() && since.elapsed() < WARM) {
            program.time(subject.arguments, subject.steps, 1).await?;
        }
        let mut fastest = BTreeMap::new();
        for _ in 0..RUNS {
            let mut step = self.record(true);
            step.run(&program, subject.arguments, subject.steps, 0);
            let times = step.times().await?;
            let mut sums = Best::new();
            for pick in picks.iter().filter(|pick| pick.ways.len() > 1) {
                let own = program.nodes()[pick.nodes.clone()].iter().zip(&times[pick.nodes.clone()]);
                let ms: f64 = own.filter(|(node, _)| node.op != "touch").map(|(_, ms)| ms).sum();
                sums.entry(pick.key.clone()).or_insert_with(|| (0.0, pick.ways[pick.taken].clone())).0 += ms;
            }
            for (key, found) in sums {
                let known: &mut (f64, String) = fastest.entry(key).or_insert_with(|| found.clone());
                known.0 = known.0.min(found.0);
            }
        }
        Ok(fastest)
    }
}
