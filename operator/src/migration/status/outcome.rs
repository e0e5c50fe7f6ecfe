//! How a migration ended.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{COMMITTED, PREPARED, STOPPED, SUCCEEDED};
use slackwater_api::{
    MigrationPhase, Reservation, Timings, TransferredBytes, format_duration, parse_duration,
};
use slackwater_handover::Failure;
use slackwater_handover::resolver::Settlement;
use slackwater_proto::node::{self as proto, Finished, Outcome};

use super::Draft;
use crate::conditions::Status;
use crate::migration::step::Wish;
use crate::migration::trace::Trace;
use crate::reason::{self, camel_case_or};

/// The agent's reason for a VM that its guest or its owner has stopped: nothing resumes it.
const VM_STOPPED: &str = "VMStopped";

impl Draft {
    /// The source's agent has reported the end.
    pub fn finish(&mut self, trace: &Trace, finished: &Finished) {
        self.show_timeline(trace);
        self.show_figures(trace, finished);
        let (vm, source) = (self.vm.clone(), self.source());
        let why = finished.message.trim_end_matches('.');
        let reason = |fallback| camel_case_or(&finished.reason, fallback);
        match finished.outcome() {
            Outcome::Succeeded => {
                self.guest_stopped();
                self.source_committed();
                let blackout = measured(finished).map(|timings| Duration::from_nanos(timings.blackout_ns));
                let stateless = self.without_state(finished);
                self.succeed(blackout, stateless);
            }
            Outcome::RolledBack => {
                let reason = reason(reason::ROLLED_BACK);
                let message = if reason == VM_STOPPED {
                    format!("VM {vm} stays on {source}, as it is. The migration was given up: {why}.")
                } else {
                    format!(
                        "VM {vm} runs on {source} again, with its devices. The migration was given up: {why}."
                    )
                };
                self.end_rolled_back(&reason, &message);
            }
            Outcome::Refused => {
                let message =
                    format!("{source} refuses to migrate VM {vm}: {why}. Nothing was touched there.");
                self.end_rolled_back(&reason(reason::SOURCE_REFUSED), &message);
            }
            Outcome::Lost => {
                let message = format!("VM {vm} runs nowhere: {why}.");
                self.status.reservation = Some(Reservation::Kept);
                self.end_badly(MigrationPhase::Lost, &reason(reason::LOST), &message);
            }
            // The caller has to ask both ends.
            Outcome::Unspecified => {}
        }
    }

    /// The migration has ended by what the agents have journalled, and the source has reported no more than
    /// that. `why`: the reason and the message with which the source's events could not be followed, if that
    /// is known.
    pub fn settle(&mut self, how: &Settlement, why: Option<(&str, &str)>) {
        let (vm, source, target) = (self.vm.clone(), self.source(), self.target());
        let (reason, error) = why.unzip();
        let error = error.map(|error| error.trim_end_matches('.')).filter(|error| !error.is_empty());
        let reason_of = |failure: &Option<Failure>, fallback: &str| {
            failure.as_ref().map_or(fallback, |failure| failure.reason.as_str()).to_owned()
        };
        let why_of = |failure: &Option<Failure>| {
            failure.as_ref().map(|failure| failure.message.trim_end_matches('.').to_owned())
        };
        match how {
            Settlement::NeverBegan if self.wish != Wish::Migrate => {
                let message = format!(
                    "{source} had not begun with the migration when {}. VM {vm} runs on there.",
                    self.why_given_up()
                );
                self.end_rolled_back(reason::ABORTED, &message);
            }
            Settlement::NeverBegan => {
                let error = error.unwrap_or("it has no record of the migration");
                let message =
                    format!("{source} has not begun to migrate VM {vm}: {error}. Nothing was touched there.");
                self.end_rolled_back(reason.unwrap_or(reason::SOURCE_REFUSED), &message);
            }
            Settlement::GivenUp(failure) => {
                let why = why_of(failure).map(|why| format!(": {why}")).unwrap_or_default();
                let message = format!(
                    "{source} has journalled that it gave the migration up{why}. VM {vm} stays there; the agent has \
                     reported no more, so look whether it runs (`kubectl get assignedvms`)."
                );
                self.end_rolled_back(&reason_of(failure, reason::ROLLED_BACK), &message);
            }
            Settlement::RunsAtDestination => {
                self.guest_stopped();
                self.source_committed();
                self.succeed(None, None);
            }
            Settlement::SourceLost { why } => {
                let why = why.trim_end_matches('.');
                let message = format!(
                    "{target} never started VM {vm}, and never will. Whether the VM runs on {source} is not \
                     known: {source} cannot be asked ({why}). When it is back, its agent keeps the VM, and has \
                     it run on if it still can; if the node is gone for good, so is the VM."
                );
                self.status.reservation = Some(Reservation::Released);
                self.set(
                    PREPARED,
                    Status::False,
                    "Released",
                    &format!("{target} has given back what it reserved."),
                );
                let unknown = format!("{source} cannot be asked.");
                self.set(STOPPED, Status::Unknown, reason::SOURCE_LOST, &unknown);
                self.end_badly(MigrationPhase::SourceLost, reason::SOURCE_LOST, &message);
            }
            Settlement::Lost(failure) => {
                let why = why_of(failure);
                let why = why.as_deref().unwrap_or("its end is journalled, without a reason");
                let message = format!("VM {vm} runs neither on {source} nor on {target}: {why}.");
                self.status.reservation = Some(Reservation::Kept);
                self.end_badly(MigrationPhase::Lost, &reason_of(failure, reason::LOST), &message);
            }
        }
    }

    /// The status says that the migration was accepted, and not what it is.
    pub fn status_unreadable(&mut self) {
        let message = "The status is not one that the operator has written: what was accepted is missing. The agents \
                       may still hold something for this migration; restart the target's agent, then delete the \
                       object.";
        self.status.reservation = Some(Reservation::Kept);
        self.end_badly(MigrationPhase::InDoubt, "StatusUnreadable", message);
    }

    /// The attempt has ended, and not with success. The caller has set what becomes of the reservation.
    pub(super) fn end_badly(&mut self, phase: MigrationPhase, reason: &str, message: &str) {
        self.note_attempt(reason, message);
        // Only a VM that runs on where it was can be tried again.
        if phase == MigrationPhase::RolledBack && self.may_try_again() {
            self.clear_doubt();
            return self.attempt_failed(reason, message);
        }
        self.status.phase = Some(phase);
        self.status.completion_time = Some(Time(self.stamp.now));
        self.clear_doubt();
        if self.set(SUCCEEDED, Status::False, reason, message) {
            self.warn("Failed", format!("{reason}: {message}"));
        }
    }

    /// The VM runs at the source, and the source says that it stays there: the target may forget about it.
    pub(super) fn end_rolled_back(&mut self, reason: &str, message: &str) {
        let source = self.source();
        self.status.reservation = Some(Reservation::ReleasingAbortedAtSource);
        if reason == VM_STOPPED {
            let message = format!("The VM is on {source}, as its guest or its owner has left it.");
            self.set(STOPPED, Status::False, reason::LEFT_AS_IT_IS, &message);
        } else {
            self.set(STOPPED, Status::False, reason::GUEST_RUNS, &format!("The guest runs on {source}."));
        }
        self.set(COMMITTED, Status::False, "GivenUp", &format!("{source} has given the migration up."));
        self.end_badly(MigrationPhase::RolledBack, reason, message);
    }

    /// What to say about devices that have given no state at all; None if there are none.
    fn without_state(&self, finished: &Finished) -> Option<String> {
        let empty = |(_, bytes): &(_, &u64)| **bytes == 0;
        let devices = self.status.devices.iter().zip(&finished.device_bytes).filter(empty);
        let names: Vec<&str> = devices.map(|(device, _)| device.source.as_str()).collect();
        (!names.is_empty()).then(|| {
            format!(
                " These devices gave no state (0 bytes), and begin there as after a reset: {}.",
                names.join(", ")
            )
        })
    }

    /// `blackout` is what the source's agent has measured, if it is known; `stateless` a sentence about devices
    /// without state.
    fn succeed(&mut self, blackout: Option<Duration>, stateless: Option<String>) {
        let stood_still = blackout
            .map(|blackout| format!(" The guest stood still for {} at most.", format_duration(blackout)))
            .unwrap_or_default();
        let beyond_budget = blackout.and_then(|blackout| self.beyond_budget(blackout));
        let message = format!(
            "VM {} runs on {}.{stood_still}{}{}",
            self.vm,
            self.target(),
            beyond_budget.as_deref().unwrap_or_default(),
            stateless.as_deref().unwrap_or_default()
        );
        self.status.phase = Some(MigrationPhase::Succeeded);
        self.status.reservation = Some(Reservation::Used);
        self.status.completion_time = Some(Time(self.stamp.now));
        self.note_attempt(reason::VM_RUNS_AT_TARGET, &message);
        self.clear_doubt();
        if self.set(SUCCEEDED, Status::True, reason::VM_RUNS_AT_TARGET, &message) {
            if beyond_budget.is_some() {
                self.warn("BudgetExceeded", message.clone());
            }
            if let Some(stateless) = stateless {
                self.warn("DeviceWithoutState", stateless.trim_start().to_owned());
            }
            self.report("Succeeded", message);
        }
    }

    /// What to say about a blackout that was longer than `spec.downtimeBudget`.
    fn beyond_budget(&self, blackout: Duration) -> Option<String> {
        let budget = &self.status.observed_spec.as_ref()?.downtime_budget;
        // A spec whose budget cannot be read was refused.
        let exceeded = parse_duration(budget).is_ok_and(|allowed| blackout > allowed);
        exceeded.then(|| format!(" That is more than spec.downtimeBudget ({budget}) allows."))
    }

    fn show_figures(&mut self, trace: &Trace, finished: &Finished) {
        let (source, target) = (self.source(), self.target());
        let devices = self.status.devices.len();
        for (index, device) in self.status.devices.iter_mut().enumerate() {
            let steps = trace.steps(device, &source, &target, devices);
            device.states = steps.shown;
            let left_out = Some(steps.left_out).filter(|left_out| *left_out > 0);
            device.states_left_out = left_out.map(|left_out| i32::try_from(left_out).unwrap_or(i32::MAX));
            device.bytes = finished.device_bytes.get(index).map(|bytes| saturated(*bytes));
        }
        if let Some(timings) = measured(finished) {
            let text = |nanoseconds| format_duration(Duration::from_nanos(nanoseconds));
            self.status.timings = Some(Timings {
                pre_copy: text(timings.pre_copy_ns),
                blackout: text(timings.blackout_ns),
                total: text(timings.total_ns),
            });
        }
        let devices = finished.device_bytes.iter().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
        let bytes = TransferredBytes { devices: saturated(devices), vmm: saturated(finished.vmm_bytes) };
        self.status.bytes = Some(bytes);
    }
}

/// An agent whose node was restarted during the migration has measured nothing.
fn measured(finished: &Finished) -> Option<proto::Timings> {
    finished.timings.filter(|timings| timings.total_ns != 0)
}

/// The API has no unsigned numbers.
fn saturated(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
