//! The bandwidth of the wire between the nodes, measured while a VM is copied. Pure: counts in, bytes per
//! second out.
//!
//! QEMU stops the VM when `avail-switchover-bandwidth` would carry what is left within the budget. A number
//! that is too high for the wire exceeds the budget unnoticed; one that is too low never lets it switch. So
//! the number is measured:
//!
//! - in the first pass over RAM, before anything was measured: next to nothing, because nothing is known and
//!   everything is still to be sent;
//! - while the stream has more to give than the transport takes: what the transport takes;
//! - after the first pass, if the transport always took all at once: the wire was never the slower part, and
//!   the allowed bandwidth is assumed.

use std::time::Duration;

use crate::vmm::budget::Budget;

/// The assumed bandwidth in the first pass, in bytes per second. With it the rest exceeds every budget at the
/// beginning, unless there is very little of it.
const FIRST_PASS: u64 = 1 << 20;
/// Shorter intervals are not measured.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(400);

/// The counts at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    /// Since the copying began.
    pub(super) elapsed: Duration,
    /// Bytes that the transport has accepted.
    pub(super) bytes: u64,
    /// How long the streams have waited for the transport, all together.
    pub(super) waited: Duration,
    /// QEMU is still in its first pass.
    pub(super) first_pass: bool,
}

/// The measurement of the wire.
#[derive(Clone, Debug)]
pub(super) struct Throughput {
    /// The most that it may use.
    allowed: u64,
    /// The number of streams that share it.
    streams: u32,
    last: Counted,
    /// The wire was the slower part in the interval before.
    was_full: bool,
    measured: Option<u64>,
    assumed: u64,
}

impl Throughput {
    pub(super) fn new(budget: &Budget) -> Self {
        let allowed = budget.bandwidth_bytes_per_second;
        let assumed = FIRST_PASS.min(allowed);
        Self {
            allowed,
            // With several, the main one has next to nothing to carry.
            streams: budget.channels.max(1).into(),
            last: Counted::default(),
            was_full: false,
            measured: None,
            assumed,
        }
    }

    /// The bytes per second to assume.
    pub(super) fn bytes_per_second(&self) -> u64 {
        self.assumed
    }

    /// Adds counts that are later than all before. `true`: QEMU should get the new value.
    pub(super) fn step(&mut self, now: Counted) -> bool {
        self.measure(now);
        let known = match self.measured {
            Some(measured) => measured.clamp(1, self.allowed),
            None if now.first_pass => self.assumed,
            None => self.allowed,
        };
        let news = self.assumed.abs_diff(known) > self.assumed / 10;
        if news {
            self.assumed = known;
        }
        news
    }

    fn measure(&mut self, now: Counted) {
        let took = now.elapsed.saturating_sub(self.last.elapsed);
        if took < SHORTEST_INTERVAL {
            return;
        }
        let bytes = u128::from(now.bytes.saturating_sub(self.last.bytes));
        let rate = bytes.saturating_mul(1000) / took.as_millis().max(1);
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        let full = now.waited.saturating_sub(self.last.waited) >= took * self.streams / 2;
        // The first full interval also filled the buffers on the way, so it shows more than the wire carries.
        if full && self.was_full {
            self.measured = Some(self.measured.map_or(rate, |before| before / 2 + rate / 2));
        } else if !full {
            // It carries at least this much: a wire that stalled for a while does not stay slow.
            self.measured = self.measured.map(|before| before.max(rate));
        }
        self.was_full = full;
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn wire(allowed: u64, channels: u8) -> Throughput {
        Throughput::new(&Budget { bandwidth_bytes_per_second: allowed, channels, ..Budget::default() })
    }

    /// One (bytes, waited ms) for each half second; the first `first` of them are in the first pass.
    fn run(throughput: &mut Throughput, intervals: &[(u64, u64)], first: usize) -> Vec<u64> {
        let mut now = throughput.last;
        let mut assumed = Vec::new();
        for (number, (bytes, waited_ms)) in intervals.iter().enumerate() {
            now.elapsed += Duration::from_millis(500);
            now.bytes += bytes;
            now.waited += Duration::from_millis(*waited_ms);
            now.first_pass = number < first;
            throughput.step(now);
            assumed.push(throughput.bytes_per_second());
        }
        assumed
    }

    #[test]
    fn in_the_first_pass_next_to_nothing_is_assumed_until_the_wire_is_measured() {
        let mut wire = wire(1 << 30, 0);
        assert_eq!(run(&mut wire, &[(0, 0), (90 * MIB, 100), (90 * MIB, 249)], 3), [MIB, MIB, MIB]);
    }

    #[test]
    fn a_wire_that_is_slower_than_qemu_is_measured_without_what_filled_the_buffers() {
        let mut wire = wire(1 << 30, 0);
        let slow = [(12 * MIB, 400), (4 * MIB, 500), (4 * MIB, 500), (6 * MIB, 450)];
        assert_eq!(run(&mut wire, &slow, 4), [MIB, 8 * MIB, 8 * MIB, 10 * MIB]);
        // A trickle later changes nothing.
        assert_eq!(run(&mut wire, &[(MIB / 4, 10), (0, 0)], 0), [10 * MIB, 10 * MIB]);
        // A free flow shows that it carries at least as much.
        assert_eq!(run(&mut wire, &[(40 * MIB, 10), (MIB, 10)], 0), [80 * MIB, 80 * MIB]);
    }

    #[test]
    fn a_wire_that_was_never_full_has_the_allowed_bandwidth_after_the_first_pass() {
        let mut wire = wire(1 << 30, 0);
        assert_eq!(run(&mut wire, &[(90 * MIB, 10), (MIB, 0)], 1), [MIB, 1 << 30]);
    }

    #[test]
    fn no_more_is_assumed_than_is_allowed() {
        let mut wire = wire(3 * MIB, 0);
        assert_eq!(run(&mut wire, &[(9 * MIB, 500), (9 * MIB, 500)], 2), [MIB, 3 * MIB]);
        let slower = Throughput::new(&Budget { bandwidth_bytes_per_second: 200_000, ..Budget::default() });
        assert_eq!(slower.bytes_per_second(), 200_000);
    }

    #[test]
    fn a_wire_that_carries_nothing_is_not_divided_by() {
        let mut wire = wire(1 << 30, 0);
        assert_eq!(run(&mut wire, &[(0, 500), (0, 500)], 2), [MIB, 1]);
        assert!(!wire.step(wire.last), "no time has passed");
    }

    #[test]
    fn several_streams_are_full_when_they_wait_for_half_of_their_time_together() {
        let mut four = wire(1 << 30, 4);
        assert_eq!(run(&mut four, &[(9 * MIB, 900), (9 * MIB, 900)], 2), [MIB, MIB]);
        assert_eq!(run(&mut four, &[(9 * MIB, 1000), (9 * MIB, 1000)], 2), [MIB, 18 * MIB]);
    }

    #[test]
    fn small_changes_are_not_passed_on() {
        let mut wire = wire(100 * MIB, 0);
        run(&mut wire, &[(9 * MIB, 500), (10 * MIB, 500)], 2);
        assert_eq!(wire.bytes_per_second(), 20 * MIB);
        assert_eq!(run(&mut wire, &[(11 * MIB, 500), (16 * MIB, 500)], 2), [20 * MIB, 26 * MIB + MIB / 2]);
    }
}
