//! Time as the state machines see it: nanoseconds of `CLOCK_BOOTTIME` (rule L2), handed in with each
//! event. Never a wall clock.

use std::ops::{Add, Sub};
use std::time::Duration;

/// Nanoseconds of this node's `CLOCK_BOOTTIME`. Compared only with instants of the same node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// How long after `earlier` this is; zero when it is not after.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).expect("a duration below 584 years");
        Self(self.0.checked_add(nanos).expect("an instant below 584 years"))
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}
