//! The planner: lifetimes to whole-buffer slots. Pure: no device, no wgpu.
//!
//! Greedy by size (Pisarchyk & Lee 2020, "Efficient Memory Management for Deep Neural Net Inference", shared objects):
//! tensors from the largest to the smallest, each into the tightest slot that is free during its whole life.

/// When a tensor must keep its bytes: from the node that writes it to the last that reads it, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Bytes.
    pub bytes: u64,
    /// Index of the first node that touches it.
    pub first: usize,
    /// Index of the last node that touches it.
    pub last: usize,
}

/// Which slot holds each tensor, and how large each slot is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Slot of tensor i.
    pub slot_of: Vec<usize>,
    /// Bytes of slot j.
    pub slots: Vec<u64>,
}

impl Plan {
    /// Bytes of all slots together: known before anything is allocated.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().sum()
    }
}

/// Give every tensor a slot. Two tensors share one only if no node touches both: a dispatch may not bind one buffer as
/// input and output, so lives that meet in one node count as overlapping.
pub fn plan(lifetimes: &[Lifetime]) -> Plan {
    let mut order: Vec<usize> = (0..lifetimes.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lifetimes[i].bytes), lifetimes[i].first));
    let mut plan = Plan { slot_of: vec![0; lifetimes.len()], slots: Vec::new() };
    let mut tenants: Vec<Vec<usize>> = Vec::new();
    for i in order {
        let life = &lifetimes[i];
        let free =
            |slot: &Vec<usize>| slot.iter().all(|&j| lifetimes[j].last < life.first || life.last < lifetimes[j].first);
        // Slots were opened by larger tensors, so every free one is large enough; the last opened is the tightest.
        let slot = tenants.iter().rposition(free).unwrap_or_else(|| {
            plan.slots.push(life.bytes);
            tenants.push(Vec::new());
            tenants.len() - 1
        });
        tenants[slot].push(i);
        plan.slot_of[i] = slot;
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small deterministic generator (Knuth's MMIX constants), so that failures repeat.
    fn random(state: &mut u64, below: u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) % below
    }

    #[test]
    fn slots_never_hold_two_live_tensors_and_are_large_enough() {
        let mut state = 1;
        for _ in 0..200 {
            let count = 1 + random(&mut state, 60) as usize;
            let lives: Vec<Lifetime> = (0..count)
                .map(|_| {
                    let first = random(&mut state, 50) as usize;
                    Lifetime {
                        bytes: 1 + random(&mut state, 1000),
                        first,
                        last: first + random(&mut state, 12) as usize,
                    }
                })
                .collect();
            let plan = plan(&lives);
            for (i, a) in lives.iter().enumerate() {
                assert!(plan.slots[plan.slot_of[i]] >= a.bytes);
                for (j, b) in lives.iter().enumerate().skip(i + 1) {
                    let apart = a.last < b.first || b.last < a.first;
                    assert!(apart || plan.slot_of[i] != plan.slot_of[j], "{a:?} and {b:?} share a slot");
                }
            }
            let floor =
                (0..70).map(|n| lives.iter().filter(|l| l.first <= n && n <= l.last).map(|l| l.bytes).sum::<u64>());
            assert!(plan.bytes() >= floor.max().unwrap_or(0));
        }
    }

    #[test]
    fn a_chain_needs_two_slots() {
        let lives: Vec<Lifetime> = (0..10).map(|i| Lifetime { bytes: 64, first: i, last: i + 1 }).collect();
        assert_eq!(plan(&lives).slots, [64, 64]);
    }
}
