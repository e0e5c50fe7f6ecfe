//! Clocks. Every node has its own CLOCK_MONOTONIC, and so has this machine. Events in two nodes can be
//! ordered only as far as the difference of their clocks is known.

use rustix::time::{ClockId, clock_gettime};

/// A reading of a node's clock, taken from this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    /// The middle of the exchange, nanoseconds of this machine's CLOCK_MONOTONIC.
    pub host_ns: i64,
    /// The node's CLOCK_MONOTONIC less this machine's, in nanoseconds.
    pub offset_ns: i64,
    /// By how much `offset_ns` may be wrong, either way: half of the exchange.
    pub error_ns: i64,
}

/// The relation between a node's clock and this machine's, over the time from a first to a last reading: an
/// emulated clock may run a little faster or slower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockRelation {
    first: ClockReading,
    last: ClockReading,
}

impl ClockReading {
    /// From the times at which the question was sent and the answer received, and the answer.
    #[must_use]
    pub fn from_exchange(sent_ns: i64, node_ns: i64, received_ns: i64) -> Self {
        let error_ns = (received_ns - sent_ns + 1) / 2;
        let host_ns = sent_ns + error_ns;
        Self { host_ns, offset_ns: node_ns - host_ns, error_ns }
    }
}

impl ClockRelation {
    /// From a reading before and one after the events to date.
    #[must_use]
    pub fn between(first: ClockReading, last: ClockReading) -> Self {
        Self { first, last }
    }

    /// Clocks that are the same: for traces of one node, and for tests.
    #[must_use]
    pub fn exact() -> Self {
        let reading = ClockReading { host_ns: 0, offset_ns: 0, error_ns: 0 };
        Self { first: reading, last: reading }
    }

    /// The earliest and the latest time on this machine's clock at which the node's clock showed `node_ns`.
    #[must_use]
    pub fn host_interval(&self, node_ns: u64) -> (i64, i64) {
        let node_ns = i64::try_from(node_ns).unwrap_or(i64::MAX);
        let (first, last) = (self.first, self.last);
        // The offset is taken to change evenly from the first reading to the last, and to stay as it is
        // outside.
        let (begin, end) = (first.host_ns + first.offset_ns, last.host_ns + last.offset_ns);
        let offset = if end <= begin {
            first.offset_ns
        } else {
            let passed = i128::from(node_ns.clamp(begin, end) - begin);
            let drift = i128::from(last.offset_ns - first.offset_ns);
            first.offset_ns + i64::try_from(drift * passed / i128::from(end - begin)).unwrap_or(0)
        };
        let error = self.error_ns();
        (node_ns - offset - error, node_ns - offset + error)
    }

    /// The bound on the error of [`Self::host_interval`], nanoseconds either way.
    #[must_use]
    pub fn error_ns(&self) -> i64 {
        self.first.error_ns.max(self.last.error_ns)
    }

    /// By how much the node's clock gained on this machine's between the readings, nanoseconds.
    #[must_use]
    pub fn drift_ns(&self) -> i64 {
        self.last.offset_ns - self.first.offset_ns
    }
}

/// CLOCK_MONOTONIC of the machine on which this runs, in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_half_of_the_exchange() {
        let reading = ClockReading::from_exchange(1000, 5100, 1200);
        assert_eq!(reading, ClockReading { host_ns: 1100, offset_ns: 4000, error_ns: 100 });
    }

    #[test]
    fn a_drifting_clock_is_followed_between_the_readings() {
        let first = ClockReading { host_ns: 0, offset_ns: 1000, error_ns: 10 };
        let last = ClockReading { host_ns: 100_000, offset_ns: 1200, error_ns: 30 };
        let relation = ClockRelation::between(first, last);
        assert_eq!(relation.host_interval(1000), (-30, 30));
        assert_eq!(relation.host_interval(101_200), (99_970, 100_030));
        let (early, late) = relation.host_interval(51_100);
        assert_eq!((early, late), (49_970, 50_030));
        assert_eq!(relation.drift_ns(), 200);
    }
}
