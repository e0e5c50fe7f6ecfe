//! The node's two clocks, read together.

use rustix::time::{ClockId, Timespec, clock_gettime};
use slackwater_proto::transfer;

/// CLOCK_MONOTONIC in nanoseconds: the clock of the kernel's own trace. Comparable only on one node, in one
/// boot.
#[must_use]
pub fn monotonic_ns() -> u64 {
    // Never negative: it counts from the boot.
    u64::try_from(nanoseconds(clock_gettime(ClockId::Monotonic))).unwrap_or_default()
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
}

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Clock {
    /// As [`monotonic_ns`] reads it.
    pub monotonic_ns: u64,
    /// The wall clock, in nanoseconds since the Unix epoch.
    pub unix_ns: i64,
}

impl Clock {
    /// Reads both clocks now, the monotonic one first.
    pub fn now() -> Self {
        Self { monotonic_ns: monotonic_ns(), unix_ns: nanoseconds(clock_gettime(ClockId::Realtime)) }
    }
}

impl From<Clock> for transfer::Clock {
    fn from(clock: Clock) -> Self {
        Self { monotonic_ns: clock.monotonic_ns, unix_ns: clock.unix_ns }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn both_clocks_run_forward_and_the_wall_clock_is_the_systems() {
        let (first, second) = (Clock::now(), Clock::now());
        assert!(second.monotonic_ns >= first.monotonic_ns && first.monotonic_ns > 0);
        let system = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let apart = system.abs_diff(first.unix_ns.try_into().unwrap());
        assert!(apart < 60_000_000_000, "{apart} ns apart");
    }
}
