//! How long the parts of a migration took, on the source's clock. Pure.

use slackwater_proto::node::{Phase, Timings};

use crate::attempt::entry::Marks;

impl Marks {
    /// The attempt began.
    pub(super) fn begin(&mut self, now_ns: u64) {
        self.begun = Some(now_ns);
    }

    /// A phase was reached.
    pub(super) fn reach(&mut self, phase: Phase, now_ns: u64) {
        match phase {
            Phase::PreCopy => self.pre_copy = Some(now_ns),
            Phase::Pausing => self.pausing = Some(now_ns),
            Phase::Started | Phase::RolledBack => self.guest_runs_again = Some(now_ns),
            _ => {}
        }
    }

    /// What it took, if it ends now. A part that was never reached is 0; a blackout that has not ended lasts
    /// until now.
    pub(super) fn timings(&self, now_ns: u64) -> Timings {
        let between = |from: Option<u64>, to: Option<u64>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_sub(from),
            _ => 0,
        };
        Timings {
            pre_copy_ns: between(self.pre_copy, self.pausing.or(Some(now_ns))),
            blackout_ns: between(self.pausing, self.guest_runs_again.or(Some(now_ns))),
            total_ns: between(self.begun, Some(now_ns)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blackout_runs_from_the_pause_to_started_received() {
        let mut marks = Marks::default();
        marks.begin(100);
        for (phase, at) in [
            (Phase::PreCopy, 110),
            (Phase::Pausing, 130),
            (Phase::Capturing, 140),
            (Phase::Committed, 150),
            (Phase::Started, 190),
        ] {
            marks.reach(phase, at);
        }
        assert_eq!(marks.timings(200), Timings { pre_copy_ns: 20, blackout_ns: 60, total_ns: 100 });
    }

    #[test]
    fn a_migration_that_never_paused_the_guest_has_no_blackout() {
        let mut marks = Marks::default();
        marks.begin(100);
        marks.reach(Phase::PreCopy, 110);
        marks.reach(Phase::RolledBack, 150);
        assert_eq!(marks.timings(160), Timings { pre_copy_ns: 50, blackout_ns: 0, total_ns: 60 });
    }
}
