//! How a writer waits for another one: it spins a little, gives its core away, then sleeps, and all
//! of it for a bounded time.
//!
//! The checkers have no clock: there each wait is a yield, and patience is a number of them.

use std::time::Duration;

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod chosen {
    use std::time::{Duration, Instant};

    /// Attempts with the core kept: about as long as a change takes.
    const SPINS: u32 = 64;
    /// Attempts with the core given away, before it sleeps between them.
    const YIELDS: u32 = 512;
    /// A sleep; also how often the clock is asked.
    const NAP: Duration = Duration::from_micros(50);

    /// See the module.
    pub(crate) struct Patience {
        limit: Duration,
        since: Option<Instant>,
        attempts: u32,
    }

    impl Patience {
        pub(crate) fn new(limit: Duration) -> Self {
            Self { limit, since: None, attempts: 0 }
        }

        /// Waits a little; false when the time is over.
        pub(crate) fn wait(&mut self) -> bool {
            self.attempts = self.attempts.saturating_add(1);
            if self.attempts < SPINS {
                std::hint::spin_loop();
                return true;
            }
            let since = *self.since.get_or_insert_with(Instant::now);
            if self.attempts < SPINS + YIELDS {
                std::thread::yield_now();
            } else {
                std::thread::sleep(NAP);
            }
            since.elapsed() < self.limit // a limit may be longer than a clock can count
        }
    }
}

#[cfg(any(feature = "loom", feature = "shuttle"))]
mod chosen {
    use std::time::Duration;

    #[cfg(feature = "loom")]
    use loom::thread::yield_now;
    #[cfg(feature = "shuttle")]
    use shuttle::thread::yield_now;

    /// See the module.
    pub(crate) struct Patience {
        attempts: u64,
    }

    impl Patience {
        pub(crate) fn new(limit: Duration) -> Self {
            Self { attempts: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX) }
        }

        /// Lets others run; false when there were enough attempts.
        pub(crate) fn wait(&mut self) -> bool {
            yield_now();
            self.attempts = self.attempts.saturating_sub(1);
            self.attempts > 0
        }
    }
}

pub(crate) use chosen::Patience;

/// How long a writer that finds no room waits for a replica that is copying: that takes well under
/// a microsecond, if its thread has a core.
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) const COPYING: Duration = Duration::from_millis(5);
#[cfg(any(feature = "loom", feature = "shuttle"))]
pub(crate) const COPYING: Duration = Duration::from_nanos(2);
