//! Facts that the source's agent tells: how far the migration has come, and how it ended.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{COMMITTED, STOPPED, SUCCEEDED};
use slackwater_api::{
    MigrationPhase, Reservation, Timings, TransferredBytes, format_duration, parse_duration,
};
use slackwater_proto::node::{Finished, Outcome, Phase};

use super::doubt::doubt_cleared;
use super::{Draft, ending, show_trace};
use crate::conditions::{Stamp, Status};
use crate::inventory::camel_case_or;
use crate::migration::trace::{Trace, is_shown, phase_name};

/// A phase has not been shown yet. What has been is told again by an agent that is joined again, and changes nothing.
pub fn is_news(draft: &Draft, phase: Phase, node: &str) -> bool {
    !is_shown(&draft.status.timeline, &phase_name(phase.into()), node)
}

/// The migration has come to a phase that has not been shown. `true`: the status is worth writing now; progress in between is not.
pub fn phase(draft: &mut Draft, trace: &Trace, phase: Phase, stamp: Stamp) -> bool {
    if draft.status.completion_time.is_some() {
        return false;
    }
    show_trace(draft, trace);
    let summary = match phase {
        Phase::Connected | Phase::PreCopy => MigrationPhase::Copying,
        Phase::Pausing | Phase::Quiescing | Phase::Stopping | Phase::Capturing | Phase::Loaded => {
            MigrationPhase::Stopped
        }
        Phase::Committed | Phase::Starting | Phase::Started | Phase::Released => MigrationPhase::Starting,
        Phase::Unspecified | Phase::RollingBack | Phase::RolledBack => return false,
    };
    // A deleted migration keeps saying so until it has been committed all the same.
    if draft.status.phase != Some(MigrationPhase::Aborting) || summary == MigrationPhase::Starting {
        draft.status.phase = Some(summary);
    }
    match phase {
        Phase::PreCopy => {
            in_progress(draft, "State is being copied; the guest runs.", stamp);
            true
        }
        Phase::Capturing => {
            stopped(draft, stamp);
            in_progress(draft, "The guest stands still; the final state is on its way.", stamp);
            true
        }
        Phase::Committed => {
            committed(draft, stamp);
            let message = format!("The VM is being started on {}.", draft.target());
            in_progress(draft, &message, stamp);
            true
        }
        _ => false,
    }
}

pub(super) fn in_progress(draft: &mut Draft, message: &str, stamp: Stamp) {
    if draft.status.phase != Some(MigrationPhase::Aborting) {
        draft.set(SUCCEEDED, Status::Unknown, "InProgress", message, stamp);
    }
}

pub(super) fn stopped(draft: &mut Draft, stamp: Stamp) {
    let message = "Every vCPU and every device has been read back as stopped at the source.";
    if draft.set(STOPPED, Status::True, "SlackWater", message, stamp) {
        draft.tell(false, "Stopped", message.to_owned());
    }
}

pub(super) fn committed(draft: &mut Draft, stamp: Stamp) {
    let message = format!(
        "{} holds all of the VM, verified; {} has passed its point of no return.",
        draft.target(),
        draft.source()
    );
    if draft.set(COMMITTED, Status::True, "PointOfNoReturn", &message, stamp) {
        draft.tell(false, "Committed", message);
    }
}

/// The migration has ended, one way or the other.
pub fn finished(draft: &mut Draft, trace: &Trace, finished: &Finished, stamp: Stamp) {
    show_trace(draft, trace);
    show_figures(draft, trace, finished);
    let (vm, source) = (draft.vm.clone(), draft.source());
    let said = finished.message.trim_end_matches('.');
    let reason = |fallback| camel_case_or(&finished.reason, fallback);
    match finished.outcome() {
        Outcome::Succeeded => {
            stopped(draft, stamp);
            committed(draft, stamp);
            let blackout = measured(finished).map(|timings| Duration::from_nanos(timings.blackout_ns));
            succeeded(draft, blackout, stamp);
        }
        Outcome::RolledBack => {
            let message = format!(
                "VM {vm} runs on {source} again, with its devices. The migration was given up: {said}."
            );
            ending::rolled_back(draft, &reason("RolledBack"), &message, stamp);
        }
        Outcome::Refused => {
            let message = format!("{source} refuses to migrate VM {vm}: {said}. Nothing was touched there.");
            ending::rolled_back(draft, &reason("SourceRefused"), &message, stamp);
        }
        Outcome::Lost => {
            let message = format!("VM {vm} runs nowhere: {said}.");
            draft.status.reservation = Some(Reservation::Kept);
            ending::failed(draft, MigrationPhase::Lost, &reason("Lost"), &message, stamp);
        }
        // What the caller must find out otherwise.
        Outcome::Unspecified => {}
    }
}

/// `blackout` is what the source's agent has measured, if it is known.
pub(super) fn succeeded(draft: &mut Draft, blackout: Option<Duration>, stamp: Stamp) {
    let stood =
        blackout.map(|blackout| format!(" The guest stood still for {} at most.", format_duration(blackout)));
    let exceeded = blackout.and_then(|blackout| beyond_budget(draft, blackout));
    let words = [stood, exceeded.clone()].map(Option::unwrap_or_default).concat();
    let message = format!("VM {} runs on {}.{words}", draft.vm, draft.target());
    draft.status.phase = Some(MigrationPhase::Succeeded);
    draft.status.reservation = Some(Reservation::Used);
    draft.status.completion_time = Some(Time(stamp.now));
    draft.note_attempt("VMRunsAtTarget", &message);
    doubt_cleared(draft, stamp);
    if draft.set(SUCCEEDED, Status::True, "VMRunsAtTarget", &message, stamp) {
        if exceeded.is_some() {
            draft.tell(true, "BudgetExceeded", message.clone());
        }
        draft.tell(false, "Succeeded", message);
    }
}

/// What is to be said of a blackout that was longer than it was allowed.
fn beyond_budget(draft: &Draft, blackout: Duration) -> Option<String> {
    let budget = &draft.status.observed_spec.as_ref()?.downtime_budget;
    // One that cannot be read was refused.
    let exceeded = parse_duration(budget).is_ok_and(|allowed| blackout > allowed);
    exceeded.then(|| format!(" That is more than spec.downtimeBudget ({budget}) allows."))
}

fn show_figures(draft: &mut Draft, trace: &Trace, finished: &Finished) {
    let (source, target) = (draft.source(), draft.target());
    for (index, device) in draft.status.devices.iter_mut().enumerate() {
        device.states = trace.steps(device, &source, &target);
        device.bytes = finished.device_bytes.get(index).map(|bytes| whole(*bytes));
    }
    if let Some(timings) = measured(finished) {
        let text = |nanoseconds| format_duration(Duration::from_nanos(nanoseconds));
        draft.status.timings = Some(Timings {
            pre_copy: text(timings.pre_copy_ns),
            blackout: text(timings.blackout_ns),
            total: text(timings.total_ns),
        });
    }
    let devices = finished.device_bytes.iter().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
    draft.status.bytes = Some(TransferredBytes { devices: whole(devices), vmm: whole(finished.vmm_bytes) });
}

/// An agent whose node has been restarted in between has measured nothing.
fn measured(finished: &Finished) -> Option<slackwater_proto::node::Timings> {
    finished.timings.filter(|timings| timings.total_ns != 0)
}

/// The API has no unsigned numbers.
fn whole(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
