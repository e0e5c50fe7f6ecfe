//! The node's two clocks, read together.

use rustix::time::{ClockId, clock_gettime};
use slackwater_proto::transfer;

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Clock {
    /// CLOCK_MONOTONIC, in nanoseconds. Comparable only with others of the same node and boot.
    pub monotonic_ns: u64,
    /// The wall clock, in nanoseconds since the Unix epoch.
    pub unix_ns: i64,
}

impl Clock {
    /// Reads both clocks now, the monotonic one first.
    pub fn now() -> Self {
        let nanoseconds = |clock| {
            let now = clock_gettime(clock);
            now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
        };
        Self {
            // Never negative: it counts from the boot.
            monotonic_ns: u64::try_from(nanoseconds(ClockId::Monotonic)).unwrap_or_default(),
            unix_ns: nanoseconds(ClockId::Realtime),
        }
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
