//! Per-block linearizability of what hosts saw.
//!
//! A block is a register. Reads and writes carry when they were invoked and answered; a write that
//! was never answered may or may not have taken effect, at most once, and no later than the
//! operation that settled it (rule H3). The search is Wing and Gong's with Lowe's memo: reads of
//! the present value are taken at once (that never hurts), writes branch. Stamps are unique but
//! for zeroes. A fused compare-and-write is a write that needs the value it expects, one that found
//! another a read of anything else.
//!
//! Not checked: order between blocks (snapshots check it, see `snapshots.rs`), and that a command of
//! several blocks is one step (the NVM command set does not promise it).

use std::collections::{BTreeMap, HashSet};

use crate::stamp::Stamp;

/// No answer, and nothing that settles it.
pub const NEVER: u64 = u64::MAX;

/// States a search may visit before it gives up; far above what a seed needs.
const STATES_MAX: usize = 2_000_000;

/// What an operation did to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Set it.
    Write(Stamp),
    /// Found this.
    Read(Stamp),
    /// Found `expected` and set `stamp`, in one step (L1).
    Swap {
        /// What it compared with.
        expected: Stamp,
        /// What it wrote.
        stamp: Stamp,
    },
    /// Found anything but this.
    Differs(Stamp),
}

impl Action {
    /// What it set, if it took effect.
    pub fn written(&self) -> Option<Stamp> {
        match *self {
            Self::Write(stamp) | Self::Swap { stamp, .. } => Some(stamp),
            Self::Read(_) | Self::Differs(_) => None,
        }
    }

    /// What it shows to have been there.
    fn found(&self) -> Option<Stamp> {
        match *self {
            Self::Read(stamp) => Some(stamp),
            Self::Swap { expected, .. } => Some(expected),
            Self::Write(_) | Self::Differs(_) => None,
        }
    }

    /// The value after it, where `value` was before; none when it cannot come there.
    fn after(&self, value: Stamp) -> Option<Stamp> {
        match *self {
            Self::Write(stamp) => Some(stamp),
            Self::Read(stamp) => (stamp == value).then_some(value),
            Self::Swap { expected, stamp } => (expected == value).then_some(stamp),
            Self::Differs(expected) => (expected != value).then_some(value),
        }
    }
}

/// One operation on one block.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// When the host began it, virtual nanoseconds.
    pub invoked: u64,
    /// When it was answered; for an unanswered write when it was settled, or `NEVER`.
    pub ended: u64,
    /// Whether it certainly took effect.
    pub answered: bool,
    /// What it did.
    pub action: Action,
    /// Number of the host operation, for the report.
    pub id: u64,
}

/// Histories of all blocks of all volumes.
#[derive(Default)]
pub struct Histories {
    blocks: BTreeMap<(usize, u64), Vec<Op>>,
    number_last: u64,
    /// Operations that were handed in.
    pub count: u64,
}

impl Histories {
    /// Adds an operation on block `block` of volume number `volume`.
    pub fn add(&mut self, volume: usize, block: u64, op: Op) {
        self.count += 1;
        self.blocks.entry((volume, block)).or_default().push(op);
    }

    /// Numbers operations and their stamps.
    pub fn next_number(&mut self) -> u64 {
        self.number_last += 1;
        self.number_last
    }

    /// What was done to a block.
    pub fn of_block(&self, volume: usize, block: u64) -> &[Op] {
        self.blocks.get(&(volume, block)).map_or(&[], Vec::as_slice)
    }

    /// Checks every block of the first `volumes` volumes.
    ///
    /// # Errors
    /// A block that has no linearization, in words.
    pub fn check(&self, volumes: usize) -> Result<(), String> {
        for ((volume, block), ops) in &self.blocks {
            if *volume >= volumes {
                continue;
            }
            check_block(ops).map_err(|why| format!("volume {volume} block {block}: {why}"))?;
        }
        Ok(())
    }
}

/// Checks one block's history.
///
/// # Errors
/// Why there is no linearization.
pub fn check_block(ops: &[Op]) -> Result<(), String> {
    let found: HashSet<Stamp> =
        ops.iter().filter(|op| op.answered).filter_map(|op| op.action.found()).collect();
    // What was never answered and never found may be left out, unless it may be what made a
    // compare differ.
    let compared = ops.iter().any(|op| matches!(op.action, Action::Differs(_)));
    let is_found = |op: &Op| op.action.written().is_some_and(|stamp| found.contains(&stamp));
    let mut ops: Vec<Op> =
        ops.iter().filter(|op| op.answered || compared || is_found(op)).copied().collect();
    for op in &mut ops {
        // A unique stamp that somebody found was written; zeroes may come from elsewhere.
        op.answered |= is_found(op) && op.action.written() != Some(Stamp::ZERO);
    }
    ops.sort_by_key(|op| (op.invoked, op.ended));
    Search::new(&ops).run()
}

/// Which operations are placed, as bits.
type Placed = Vec<u64>;

struct Search<'a> {
    ops: &'a [Op],
    memo: HashSet<(Placed, Stamp)>,
    best: usize,
    best_story: String,
}

#[derive(Clone)]
struct State {
    placed: Placed,
    /// Everything before this index is placed or optional and passed.
    from: usize,
    value: Stamp,
    count: usize,
    /// The latest invocation that is placed: what was settled before it can no longer happen.
    invoked_max: u64,
}

impl<'a> Search<'a> {
    fn new(ops: &'a [Op]) -> Self {
        Self { ops, memo: HashSet::new(), best: 0, best_story: String::new() }
    }

    fn run(mut self) -> Result<(), String> {
        let words = self.ops.len().div_ceil(64);
        let first =
            State { placed: vec![0; words], from: 0, value: Stamp::ZERO, count: 0, invoked_max: 0 };
        let mut stack = vec![first];
        while let Some(mut state) = stack.pop() {
            self.take_reads(&mut state);
            if self.done(&state) {
                return Ok(());
            }
            if !self.memo.insert((state.placed.clone(), state.value)) {
                continue;
            }
            if self.memo.len() > STATES_MAX {
                return Err("the search for a linearization was given up".into());
            }
            self.remember(&state);
            for index in self.candidates(&state) {
                if let Some(value) = self.ops[index].action.after(state.value) {
                    let mut next = state.clone();
                    self.place(&mut next, index);
                    next.value = value;
                    stack.push(next);
                }
            }
        }
        Err(format!("no linearization; the longest way ended where {}", self.best_story))
    }

    fn done(&self, state: &State) -> bool {
        (state.from..self.ops.len()).all(|i| is_placed(state, i) || !self.ops[i].answered)
    }

    fn place(&self, state: &mut State, index: usize) {
        state.placed[index / 64] |= 1 << (index % 64);
        state.count += 1;
        state.invoked_max = state.invoked_max.max(self.ops[index].invoked);
        while state.from < self.ops.len()
            && (is_placed(state, state.from) || self.is_past(state, state.from))
        {
            state.from += 1;
        }
    }

    /// Whether an optional operation can no longer take effect.
    fn is_past(&self, state: &State, index: usize) -> bool {
        !self.ops[index].answered && self.ops[index].ended < state.invoked_max
    }

    /// What may come next: invoked before every unplaced certain operation has ended.
    fn candidates(&self, state: &State) -> Vec<usize> {
        let mut bound = NEVER;
        let mut found = Vec::new();
        for (index, op) in self.ops.iter().enumerate().skip(state.from) {
            if op.invoked > bound {
                break;
            }
            if is_placed(state, index) || self.is_past(state, index) {
                continue;
            }
            found.push(index);
            if op.answered {
                bound = bound.min(op.ended);
            }
        }
        found.retain(|index| self.ops[*index].invoked <= bound);
        found
    }

    fn take_reads(&self, state: &mut State) {
        loop {
            let read =
                self.candidates(state).into_iter().find(|index| match self.ops[*index].action {
                    Action::Read(value) => value == state.value,
                    Action::Differs(other) => other != state.value && !self.shuts(state, *index),
                    Action::Write(_) | Action::Swap { .. } => false,
                });
            let Some(index) = read else { return };
            self.place(state, index);
        }
    }

    /// Whether an optional operation could not take effect any more once this one has: then it may
    /// have to come before, though nobody has found what it wrote.
    fn shuts(&self, state: &State, index: usize) -> bool {
        let invoked = self.ops[index].invoked;
        let open = |i: &usize| !is_placed(state, *i) && !self.is_past(state, *i);
        (state.from..self.ops.len())
            .filter(open)
            .any(|i| !self.ops[i].answered && self.ops[i].ended < invoked)
    }

    fn remember(&mut self, state: &State) {
        if state.count < self.best && !self.best_story.is_empty() {
            return;
        }
        self.best = state.count;
        let next: Vec<String> =
            self.candidates(state).into_iter().map(|index| story(&self.ops[index])).collect();
        self.best_story = format!("the block is {} but next come {}", state.value, next.join("; "));
    }
}

fn is_placed(state: &State, index: usize) -> bool {
    state.placed[index / 64] & (1 << (index % 64)) != 0
}

fn story(op: &Op) -> String {
    let what = match op.action {
        Action::Write(stamp) => format!("write {stamp}"),
        Action::Read(stamp) => format!("read {stamp}"),
        Action::Swap { expected, stamp } => format!("compare {expected}, write {stamp}"),
        Action::Differs(expected) => format!("compare {expected}, which differed"),
    };
    let end = match (op.answered, op.ended) {
        (_, NEVER) => "never answered".to_owned(),
        (true, end) => format!("{:.6} s", seconds(end)),
        (false, end) => format!("unanswered, settled {:.6} s", seconds(end)),
    };
    format!("#{} {what} [{:.6} s, {end}]", op.id, seconds(op.invoked))
}

/// Virtual nanoseconds as seconds.
pub fn seconds(at: u64) -> f64 {
    at as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(invoked: u64, ended: u64, action: Action) -> Op {
        Op { invoked, ended, answered: ended != NEVER, action, id: 0 }
    }

    fn write(invoked: u64, ended: u64, stamp: u64) -> Op {
        op(invoked, ended, Action::Write(Stamp(stamp)))
    }

    fn read(invoked: u64, ended: u64, stamp: u64) -> Op {
        op(invoked, ended, Action::Read(Stamp(stamp)))
    }

    #[test]
    fn a_read_of_an_older_value_after_a_newer_one_was_read_is_caught() {
        let ok = [write(1, 2, 7), write(3, 9, 8), read(4, 5, 7), read(6, 7, 8)];
        check_block(&ok).unwrap();
        let bad = [write(1, 2, 7), write(3, 9, 8), read(4, 5, 8), read(6, 7, 7)];
        check_block(&bad).unwrap_err();
    }

    #[test]
    fn an_acknowledged_write_must_be_read() {
        check_block(&[write(1, 2, 7), read(3, 4, 0)]).unwrap_err();
        check_block(&[write(1, 5, 7), read(3, 4, 0)]).unwrap();
    }

    #[test]
    fn an_unanswered_write_may_appear_late_but_not_after_it_was_read_as_absent() {
        check_block(&[write(1, NEVER, 7), read(3, 4, 0), read(5, 6, 7)]).unwrap();
        check_block(&[write(1, NEVER, 7), read(3, 4, 7), read(5, 6, 0)]).unwrap_err();
        let settled = Op { answered: false, ..write(1, 4, 7) };
        check_block(&[settled, read(3, 4, 0), read(5, 6, 0)]).unwrap();
        check_block(&[settled, read(2, 3, 0), read(5, 6, 7)]).unwrap();
        check_block(&[settled, read(5, 6, 0), read(7, 8, 7)]).unwrap_err();
    }

    #[test]
    fn a_write_that_is_done_twice_around_another_is_caught() {
        let twice = [write(1, 2, 7), write(3, 4, 8), read(5, 6, 8), read(7, 8, 7)];
        check_block(&twice).unwrap_err();
    }

    #[test]
    fn zeroes_may_be_written_many_times() {
        let ops = [write(1, 2, 7), write(3, 4, 0), read(5, 6, 0), write(7, 8, 9), write(9, 10, 0)];
        check_block(&ops).unwrap();
        let unanswered = [write(1, 2, 7), write(3, NEVER, 0), read(5, 6, 7), read(8, 9, 0)];
        check_block(&unanswered).unwrap();
        check_block(&[write(1, 2, 7), read(5, 6, 7), read(8, 9, 0)]).unwrap_err();
    }

    fn swap(invoked: u64, ended: u64, expected: u64, stamp: u64) -> Op {
        op(invoked, ended, Action::Swap { expected: Stamp(expected), stamp: Stamp(stamp) })
    }

    fn differs(invoked: u64, ended: u64, expected: u64) -> Op {
        op(invoked, ended, Action::Differs(Stamp(expected)))
    }

    #[test]
    fn of_two_swaps_of_one_value_one_succeeds() {
        check_block(&[write(1, 2, 7), swap(3, 9, 7, 8), differs(4, 9, 7)]).unwrap();
        check_block(&[write(1, 2, 7), swap(3, 9, 7, 8), swap(4, 9, 7, 9)]).unwrap_err();
        check_block(&[write(1, 2, 7), swap(3, 9, 7, 8), swap(4, 9, 8, 9)]).unwrap();
        check_block(&[write(1, 2, 7), differs(3, 4, 7)]).unwrap_err();
    }

    #[test]
    fn an_unanswered_swap_that_nobody_found_may_be_what_made_a_compare_differ() {
        let lost = swap(3, NEVER, 7, 8);
        check_block(&[write(1, 2, 7), lost, differs(4, 5, 7)]).unwrap();
        check_block(&[write(1, 2, 7), lost, differs(4, 5, 7), read(6, 7, 7)]).unwrap_err();
        let settled = Op { answered: false, ..swap(3, 4, 7, 8) };
        let other = differs(6, 9, 6); // as good before the lost one as after it
        check_block(&[write(1, 2, 7), settled, other, differs(8, 9, 7)]).unwrap();
        check_block(&[write(1, 2, 7), settled, read(6, 7, 7), differs(8, 9, 7)]).unwrap_err();
        check_block(&[write(1, 2, 7), lost, write(4, 5, 9), differs(6, 7, 7)]).unwrap();
    }

    #[test]
    fn concurrent_writes_go_in_either_order() {
        let ops = [write(1, 9, 7), write(2, 9, 8), read(10, 11, 7), read(12, 13, 7)];
        check_block(&ops).unwrap();
        let flip = [write(1, 9, 7), write(2, 9, 8), read(10, 11, 7), read(12, 13, 8)];
        check_block(&flip).unwrap_err();
    }
}
