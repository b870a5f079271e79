//! Whether a member is in sync: what people, the operator and metrics are told of it.
//!
//! Of two secondaries one is always the slower, so under writes it is behind the commit at nearly
//! every moment, by an entry or two. In sync is therefore a matter of time: within `WITHIN` it has
//! what was committed. Each time it has reached the commit that was current when it was last asked,
//! the next one becomes its goal. No rule counts on it: what is committed (W4), who may follow (T5,
//! M1) goes by what has been acknowledged.

use std::time::Duration;

use tercet_proto::{Instant, Lsn};

/// How old what a member lacks may be.
pub(crate) const WITHIN: Duration = Duration::from_secs(1);

/// What is known of one member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct InSync {
    /// A commit that it has to reach, and since when that was one. None: it has acknowledged
    /// nothing yet.
    goal: Option<(Lsn, Instant)>,
    /// It reached the goal before this one in time.
    prompt: bool,
    /// What was told last.
    told: bool,
}

impl InSync {
    /// The commit is another by now; `matched` is what the member has acknowledged.
    pub fn committed(&mut self, commit: Lsn, matched: Lsn, now: Instant) {
        if let Some((goal, _)) = self.goal
            && matched >= goal
        {
            self.goal = Some((commit, now));
        }
    }

    /// The member has acknowledged up to `matched`.
    pub fn acknowledged(&mut self, matched: Lsn, commit: Lsn, now: Instant) {
        match self.goal {
            Some((goal, _)) if matched < goal => {}
            Some((_, since)) => {
                self.prompt = matched >= commit || now.since(since) <= WITHIN;
                self.goal = Some((commit, now));
            }
            None => {
                self.prompt = matched >= commit;
                self.goal = Some((commit, now));
            }
        }
    }

    /// Whether it is in sync now.
    pub fn holds(&self, matched: Lsn, commit: Lsn, now: Instant) -> bool {
        let in_time = |(_, since): (Lsn, Instant)| now.since(since) <= WITHIN;
        matched >= commit || (self.prompt && self.goal.is_some_and(in_time))
    }

    /// Whether that has to be told: it is not what was told last.
    pub fn changes(&mut self, holds: bool) -> bool {
        std::mem::replace(&mut self.told, holds) != holds
    }

    /// What was told last.
    pub fn told(&self) -> bool {
        self.told
    }

    /// What is told is kept, what it goes by is forgotten.
    #[cfg(feature = "model")]
    pub fn forget_pace(&mut self) {
        *self = Self { told: self.told, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A member that acknowledges each entry `late_ms` after its commit; one is committed each
    /// millisecond from `from_ms` to `to_ms`. What is told: the moments.
    fn told(
        of: &mut InSync,
        (from_ms, to_ms): (u64, u64),
        late_ms: impl Fn(u64) -> u64,
    ) -> Vec<bool> {
        let mut changes = Vec::new();
        let (mut matched, first) = (Lsn(from_ms), from_ms);
        for at_ms in from_ms..to_ms {
            let (now, commit) = (Instant(at_ms * MS), Lsn(at_ms + 1));
            of.committed(commit, matched, now);
            let acknowledged = (at_ms + 1).saturating_sub(late_ms(at_ms)).max(first);
            if Lsn(acknowledged) > matched {
                matched = Lsn(acknowledged);
                of.acknowledged(matched, commit, now);
            }
            let holds = of.holds(matched, commit, now);
            if of.changes(holds) {
                changes.push(holds);
            }
        }
        changes
    }

    fn fresh() -> InSync {
        let mut of = InSync::default();
        of.acknowledged(Lsn(1), Lsn(1), Instant(0));
        of
    }

    #[test]
    fn who_is_a_little_behind_all_the_time_is_in_sync_once_and_for_all() {
        assert_eq!(told(&mut fresh(), (1, 20_000), |_| 30), [true]);
        assert_eq!(told(&mut fresh(), (1, 20_000), |ms| ms % 400), [true]);
    }

    #[test]
    fn who_falls_behind_by_more_than_a_second_is_lagging_and_comes_back() {
        let mut of = fresh();
        // From the second second on it acknowledges nothing for three, then catches up.
        let late = |ms: u64| if (2_000..5_000).contains(&ms) { ms - 2_000 } else { 5 };
        assert_eq!(told(&mut of, (1, 20_000), late), [true, false, true]);
    }

    #[test]
    fn who_is_always_two_seconds_behind_is_lagging_all_the_time() {
        assert_eq!(told(&mut fresh(), (1, 20_000), |_| 2_000), [true, false]);
    }

    #[test]
    fn a_write_after_an_hour_of_none_takes_nobody_out_of_sync() {
        let mut of = fresh();
        told(&mut of, (1, 100), |_| 5);
        of.acknowledged(Lsn(100), Lsn(100), Instant(100 * MS));
        let later = Instant(3_600_000 * MS);
        of.committed(Lsn(101), Lsn(100), later);
        assert!(of.holds(Lsn(100), Lsn(101), later), "it has had no time yet");
        assert!(!of.holds(Lsn(100), Lsn(101), Instant(later.0 + 1_001 * MS)), "now it has");
    }

    #[test]
    fn who_has_acknowledged_nothing_is_not_in_sync() {
        assert!(!InSync::default().holds(Lsn(0), Lsn(1), Instant(0)));
    }
}
