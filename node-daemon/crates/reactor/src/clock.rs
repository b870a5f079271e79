//! `CLOCK_BOOTTIME`, the clock of every deadline (rule L2: it counts a suspended machine's time).

use rustix::time::{ClockId, clock_gettime};
use tercet_proto::Instant;

/// Now.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("boot time is not negative");
    let nanos = u64::try_from(time.tv_nsec).expect("nanoseconds are not negative");
    Instant(seconds * 1_000_000_000 + nanos)
}
