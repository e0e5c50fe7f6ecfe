//! Whether QEMU's copying converges within the budget. Pure: samples in, decisions out.
//!
//! QEMU stops the VM only when it expects to need no longer than `downtime-limit` for what is left. It makes
//! pass after pass over RAM until then, without an end. A migration has exceeded its limit after 3 passes
//! over RAM, if the last pass has not lowered the estimate by a quarter, and
//!
//! - the estimate has stayed above the limit for 5 s, or
//! - QEMU has not stopped the VM within 30 s, whatever the estimate says: then QEMU counts something that it
//!   does not report (a driver that does not report the size of its state counts as 100 GiB).
//!
//! ```text
//!   limit = budget ──▶ copying ── exceeded ──▶ Abort: given up
//!                         ▲                └──▶ Proceed: limit = twice what is expected
//!                         └─────────── begins anew ────────────┘
//! ```

use std::time::Duration;

use super::qmp::MigrationStatus;
use super::qmp::commands::MigrationInfo;
use crate::vmm::budget::{Budget, BudgetExceeded, Estimate, OnExceeded};

/// How long the estimate must have been above the limit.
const HELD: Duration = Duration::from_secs(5);
/// How many passes over RAM there must have been.
const PASSES: u64 = 3;
/// How long QEMU may go on although the estimate allows it to stop the VM.
const STUCK: Duration = Duration::from_secs(30);
/// The shortest time between two reported estimates.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// What QEMU reckons with for a device whose driver does not say how large its state is
/// (`VFIO_MIG_STOP_COPY_SIZE` in its hw/vfio/migration.c): 100 GiB.
const UNKNOWN_BYTES: u64 = 100 << 30;
/// The greatest `downtime-limit` that QEMU accepts.
const GREATEST_LIMIT: Duration = Duration::from_millis(2_000_000);

/// The state of the copying at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sample {
    /// Since the copying began.
    pub(super) elapsed: Duration,
    /// How often the dirty log was read: before the first pass, and after each pass.
    pub(super) syncs: u64,
    /// Bytes of RAM that are still to be sent.
    pub(super) ram_bytes: u64,
    /// QEMU's own estimate for RAM, if there is one. It does not include the devices' state.
    pub(super) ram_downtime: Option<Duration>,
    /// Bytes of device state, by the drivers' estimates.
    pub(super) device_bytes: u64,
    /// Devices whose drivers do not say how large their state is.
    pub(super) unknown_devices: u64,
}

impl Sample {
    /// From the answer to `query-migrate`; None while QEMU does not copy.
    pub(super) fn from_info(
        info: &MigrationInfo,
        budget: Budget,
        elapsed: Duration,
        device_bytes: u64,
        unknown_devices: u64,
    ) -> Option<Self> {
        let ram = info.ram.filter(|_| info.status == Some(MigrationStatus::Active))?;
        // Until QEMU has measured how fast pages are written, it reports its own limit.
        let measured = |downtime: &Duration| ram.dirty_pages_rate > 0 && *downtime != budget.downtime;
        Some(Self {
            elapsed,
            syncs: ram.dirty_sync_count,
            ram_bytes: ram.remaining_bytes,
            ram_downtime: info.expected_downtime_ms.map(Duration::from_millis).filter(measured),
            device_bytes,
            unknown_devices,
        })
    }

    /// The first pass over RAM is not complete.
    pub(super) fn in_first_pass(&self) -> bool {
        self.syncs < 2
    }

    /// How long the guest would be stopped. None in the first pass: most of the rest then was never sent.
    fn downtime(&self, bandwidth_bytes_per_second: u64) -> Option<Duration> {
        if self.in_first_pass() {
            return None;
        }
        let ram = self.ram_downtime.unwrap_or_else(|| time_for(self.ram_bytes, bandwidth_bytes_per_second));
        let unknown = self.unknown_devices.saturating_mul(UNKNOWN_BYTES);
        let devices = self.device_bytes.saturating_add(unknown);
        Some(ram.saturating_add(time_for(devices, bandwidth_bytes_per_second)))
    }
}

/// In whole milliseconds, as QEMU counts.
fn time_for(bytes: u64, bytes_per_second: u64) -> Duration {
    let milliseconds = u128::from(bytes).saturating_mul(1000).div_ceil(u128::from(bytes_per_second.max(1)));
    Duration::from_millis(u64::try_from(milliseconds).unwrap_or(u64::MAX))
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    GoOn,
    /// Raise QEMU's limit to this.
    Raise(Duration),
    /// End the migration.
    GiveUp(BudgetExceeded),
}

/// The result of a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// An estimate to report.
    pub(super) report: Option<Estimate>,
    /// What to do.
    pub(super) verdict: Verdict,
}

/// The course of one copying.
#[derive(Clone, Debug)]
pub(super) struct Convergence {
    budget: Budget,
    /// QEMU's `downtime-limit`.
    limit: Duration,
    /// The last reported estimate, and when it was.
    reported: Option<(Duration, Duration)>,
    under_this_limit: Window,
}

/// The samples since the limit was set.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    /// The time and the syncs of its first sample.
    began: Option<(Duration, u64)>,
    /// Since when every estimate was above the limit.
    above_since: Option<Duration>,
    /// The lowest estimate, and the syncs at which it was seen; lower ones count from a quarter below it.
    lowest: Option<(Duration, u64)>,
}

impl Convergence {
    pub(super) fn new(budget: Budget) -> Self {
        Self { budget, limit: budget.downtime, reported: None, under_this_limit: Window::default() }
    }

    /// Adds a sample that is later than all before, on a wire with this bandwidth.
    pub(super) fn step(&mut self, sample: Sample, bandwidth_bytes_per_second: u64) -> Step {
        let estimate = sample.downtime(bandwidth_bytes_per_second);
        let Some(downtime) = estimate else { return Step { report: None, verdict: Verdict::GoOn } };
        let verdict = if self.under_this_limit.exceeded(sample, downtime, self.limit) {
            self.exceeded(sample, downtime, bandwidth_bytes_per_second)
        } else {
            Verdict::GoOn
        };
        let raised = matches!(verdict, Verdict::Raise(_));
        // What is not known is left out.
        let is_news = sample.unknown_devices == 0 && self.is_news(downtime, sample.elapsed);
        let report = (raised || is_news).then(|| {
            self.reported = Some((downtime, sample.elapsed));
            Estimate { downtime, allowed: (self.limit > self.budget.downtime).then_some(self.limit) }
        });
        Step { report, verdict }
    }

    fn exceeded(&mut self, sample: Sample, downtime: Duration, bandwidth_bytes_per_second: u64) -> Verdict {
        // QEMU has not stopped the VM, so it expects at least its limit.
        let expected = downtime.max(self.limit);
        if self.budget.on_exceeded == OnExceeded::Abort {
            let (passes, elapsed) = (sample.syncs.saturating_sub(1), sample.elapsed);
            let exceeded = BudgetExceeded {
                budget: self.budget,
                expected,
                passes,
                bandwidth_bytes_per_second,
                elapsed,
                without_size: Vec::new(),
            };
            return Verdict::GiveUp(exceeded);
        }
        self.under_this_limit = Window::default();
        let limit = expected.saturating_mul(2).min(GREATEST_LIMIT);
        if limit <= self.limit {
            return Verdict::GoOn;
        }
        self.limit = limit;
        Verdict::Raise(limit)
    }

    /// It differs by more than a tenth from the last reported estimate, and that was a while ago.
    fn is_news(&self, downtime: Duration, elapsed: Duration) -> bool {
        self.reported.is_none_or(|(reported, when)| {
            reported.abs_diff(downtime) > reported / 10 && elapsed.saturating_sub(when) >= REPORT_EVERY
        })
    }
}

impl Window {
    fn exceeded(&mut self, sample: Sample, downtime: Duration, limit: Duration) -> bool {
        let (began, first_sync) = *self.began.get_or_insert((sample.elapsed, sample.syncs));
        let above_since = match downtime > limit {
            true => Some(*self.above_since.get_or_insert(sample.elapsed)),
            false => None,
        };
        self.above_since = above_since;
        let (lowest, lowest_at) = *self.lowest.get_or_insert((downtime, sample.syncs));
        let lowered = downtime < lowest.saturating_sub(lowest / 4);
        if lowered {
            self.lowest = Some((downtime, sample.syncs));
        }
        let since = |then: Duration| sample.elapsed.saturating_sub(then);
        // The sample that has no estimate was the first pass.
        let passes = sample.syncs.saturating_sub(first_sync.saturating_sub(1));
        let going_down = lowered || sample.syncs == lowest_at;
        let held = above_since.is_some_and(|then| since(then) >= HELD);
        passes >= PASSES && !going_down && (held || since(began) >= STUCK)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::vmm::qemu::qmp::commands::RamInfo;

    const MIB: u64 = 1 << 20;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn budget(milliseconds: u64, on_exceeded: OnExceeded) -> Budget {
        Budget { downtime: ms(milliseconds), on_exceeded, bandwidth_bytes_per_second: 100 * MIB, channels: 0 }
    }

    fn sample(second: u64, syncs: u64, downtime: u64) -> Sample {
        let (elapsed, ram_downtime) = (Duration::from_secs(second), Some(ms(downtime)));
        Sample { elapsed, syncs, ram_downtime, ..Sample::default() }
    }

    /// Steps once a second with these syncs and estimates, up to the first verdict other than to go on.
    fn run(budget: Budget, samples: impl IntoIterator<Item = (u64, u64)>) -> Option<(u64, Verdict)> {
        let mut convergence = Convergence::new(budget);
        (0..).zip(samples).find_map(|(second, (syncs, downtime))| {
            let verdict = convergence.step(sample(second, syncs, downtime), 50 * MIB).verdict;
            (verdict != Verdict::GoOn).then_some((second, verdict))
        })
    }

    #[test]
    fn a_migration_that_stays_above_the_budget_is_given_up_after_five_seconds_with_its_estimate() {
        let (second, verdict) = run(budget(300, OnExceeded::Abort), (2..).map(|syncs| (syncs, 412))).unwrap();
        assert_eq!(second, 5);
        let Verdict::GiveUp(exceeded) = verdict else { panic!("{verdict:?}") };
        assert_eq!(
            exceeded.to_string(),
            "the guest would stand still for about 412ms, and its downtimeBudget is 300ms; 6 passes over its RAM \
             in 5s have not \
             changed that. A larger downtimeBudget, onBudgetExceeded: Proceed, or more bandwidth would let it move \
             (it is reckoned \
             with 52428800 bytes per second; the agent's --migration-bandwidth allows 104857600)"
        );
    }

    #[test]
    fn nothing_is_decided_before_three_passes_however_long_they_take() {
        let slow = (0..300_u64).map(|second| (1 + second / 100, 412));
        assert_eq!(run(budget(300, OnExceeded::Abort), slow), None);
        let slow = (0..400_u64).map(|second| (1 + second / 100, 412));
        assert_eq!(run(budget(300, OnExceeded::Abort), slow).unwrap().0, 300);
    }

    #[test]
    fn the_first_pass_says_nothing_about_the_blackout() {
        let mut convergence = Convergence::new(budget(300, OnExceeded::Abort));
        for second in 0..1000 {
            let step = convergence.step(sample(second, 1, 60_000), 50 * MIB);
            assert_eq!(step, Step { report: None, verdict: Verdict::GoOn });
        }
    }

    #[test]
    fn a_copying_that_improves_with_each_pass_is_left_alone() {
        let halving = (0..12_u64).map(|pass| (2 + pass, 1_000_000 >> pass));
        assert_eq!(run(budget(300, OnExceeded::Abort), halving), None);
    }

    #[test]
    fn an_estimate_within_the_budget_is_accepted_unless_qemu_does_not_stop_the_vm() {
        let at_the_budget = |seconds: u64| (0..seconds).map(|second| (2 + second, 300));
        assert_eq!(run(budget(300, OnExceeded::Abort), at_the_budget(30)), None);
        let (second, verdict) = run(budget(300, OnExceeded::Proceed), at_the_budget(31)).unwrap();
        assert_eq!((second, verdict), (30, Verdict::Raise(ms(600))));
    }

    #[test]
    fn an_estimate_that_falls_below_the_budget_from_time_to_time_has_not_stayed_above_it() {
        let falling = (0..29_u64).map(|second| (2 + second, if second % 4 == 3 { 200 } else { 412 }));
        assert_eq!(run(budget(300, OnExceeded::Abort), falling), None);
    }

    #[test]
    fn the_limit_is_raised_to_twice_the_estimate_and_again_while_that_does_not_suffice() {
        let mut convergence = Convergence::new(budget(300, OnExceeded::Proceed));
        let mut raised = Vec::new();
        for second in 0..25 {
            let expected = if second < 6 { 412 } else { 5_000 };
            let step = convergence.step(sample(second, 2 + second, expected), 50 * MIB);
            if let Verdict::Raise(limit) = step.verdict {
                assert_eq!(step.report, Some(Estimate { downtime: ms(expected), allowed: Some(limit) }));
                raised.push((second, limit));
            }
        }
        assert_eq!(raised, [(5, ms(824)), (11, ms(10_000))]);
    }

    #[test]
    fn a_limit_that_qemu_would_refuse_is_not_set() {
        let mut convergence = Convergence::new(budget(60_000, OnExceeded::Proceed));
        let raised: Vec<_> = (0..40)
            .map(|second| convergence.step(sample(second, 2 + second, 1_999_000), 50 * MIB).verdict)
            .filter(|verdict| *verdict != Verdict::GoOn)
            .collect();
        assert_eq!(raised, [Verdict::Raise(GREATEST_LIMIT)]);
    }

    #[test]
    fn an_estimate_is_reported_when_it_has_changed_by_more_than_a_tenth() {
        let mut convergence = Convergence::new(budget(300, OnExceeded::Abort));
        let reported: Vec<_> = [100, 109, 110, 111, 100, 99, 0, 0, 1]
            .into_iter()
            .zip(0..)
            .filter_map(|(downtime, second)| convergence.step(sample(second, 2, downtime), 50 * MIB).report)
            .map(|estimate| estimate.downtime.as_millis())
            .collect();
        assert_eq!(reported, [100, 111, 99, 0, 1]);
    }

    #[test]
    fn the_devices_state_counts_and_ram_counts_by_its_bytes_without_an_estimate_of_qemu() {
        let sample = Sample { syncs: 2, ram_bytes: 50 * MIB, device_bytes: 64 * MIB, ..Sample::default() };
        assert_eq!(sample.downtime(100 * MIB), Some(ms(1140)));
        let with_estimate = Sample { ram_downtime: Some(ms(20)), ..sample };
        assert_eq!(with_estimate.downtime(100 * MIB), Some(ms(660)));
        assert_eq!(time_for(u64::MAX, 0), ms(u64::MAX));
    }

    #[test]
    fn a_device_of_unknown_size_counts_as_qemu_counts_it_and_no_estimate_is_reported() {
        let mut convergence = Convergence::new(budget(300, OnExceeded::Abort));
        let mut given_up = None;
        for second in 0..10 {
            let sample = Sample { unknown_devices: 1, ..sample(second, 2 + second, 10) };
            let step = convergence.step(sample, 1 << 30);
            assert_eq!(step.report, None);
            if let Verdict::GiveUp(exceeded) = step.verdict {
                given_up = given_up.or(Some((second, exceeded.expected)));
            }
        }
        assert_eq!(given_up, Some((5, ms(100_010))));
        // As much as QEMU needs at once, and not in steps of half a minute.
        let samples = (0..6).map(|second| Sample { unknown_devices: 1, ..sample(second, 2 + second, 10) });
        let mut convergence = Convergence::new(budget(300, OnExceeded::Proceed));
        let verdicts: Vec<_> = samples.map(|sample| convergence.step(sample, 1 << 30).verdict).collect();
        assert_eq!(verdicts.last(), Some(&Verdict::Raise(ms(200_020))));
    }

    #[test]
    fn qemus_own_estimate_counts_once_it_has_measured_and_only_while_it_copies() {
        let info = |text: serde_json::Value| serde_json::from_value::<MigrationInfo>(text).unwrap();
        let ram = json!({"remaining": 8192, "dirty-pages-rate": 7, "dirty-sync-count": 4});
        let active = info(json!({"status": "active", "expected-downtime": 412, "ram": ram}));
        let read =
            |info: &MigrationInfo| Sample::from_info(info, budget(300, OnExceeded::Abort), ms(1), 36, 0);
        let expected = Sample {
            elapsed: ms(1),
            syncs: 4,
            ram_bytes: 8192,
            ram_downtime: Some(ms(412)),
            device_bytes: 36,
            unknown_devices: 0,
        };
        assert_eq!(read(&active), Some(expected));
        let unmeasured = RamInfo { dirty_pages_rate: 0, ..active.ram.unwrap() };
        let silent = [
            MigrationInfo { ram: Some(unmeasured), ..active.clone() },
            MigrationInfo { expected_downtime_ms: Some(300), ..active.clone() },
            MigrationInfo { expected_downtime_ms: None, ..active.clone() },
        ];
        for info in silent {
            assert_eq!(read(&info).unwrap().ram_downtime, None, "{info:?}");
        }
        for status in ["setup", "pre-switchover", "device", "completed"] {
            let info = info(json!({"status": status, "expected-downtime": 412, "ram": ram}));
            assert_eq!(read(&info), None, "{status}");
        }
    }
}
