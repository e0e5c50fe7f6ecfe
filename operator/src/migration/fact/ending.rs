//! Facts about ends: what failed, and how the target's reservation is given back afterwards.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{ACCEPTED, COMMITTED, PREPARED, STOPPED, SUCCEEDED};
use slackwater_api::{MigrationPhase, Reservation};

use super::attempts::{failed_for_now, paused_before_the_next};
use super::doubt::doubt_cleared;
use super::{Draft, events, spec};
use crate::conditions::{self, Stamp, Status};
use crate::migration::resolver::Settlement;
use crate::migration::step::Wish;

/// An attempt is over, and badly. The caller has said what becomes of the reservation.
pub(super) fn failed(draft: &mut Draft, phase: MigrationPhase, reason: &str, message: &str, stamp: Stamp) {
    draft.note_attempt(reason, message);
    // Only a VM that runs on where it was can be tried again.
    if phase == MigrationPhase::RolledBack && draft.may_try_again() {
        doubt_cleared(draft, stamp);
        return failed_for_now(draft, reason, message, stamp);
    }
    draft.status.phase = Some(phase);
    draft.status.completion_time = Some(Time(stamp.now));
    doubt_cleared(draft, stamp);
    if draft.set(SUCCEEDED, Status::False, reason, message, stamp) {
        draft.tell(true, "Failed", format!("{reason}: {message}"));
    }
}

/// The VM runs at the source, and the source says that it will stay so: the target may forget about it.
pub(super) fn rolled_back(draft: &mut Draft, reason: &str, message: &str, stamp: Stamp) {
    let source = draft.source();
    draft.status.reservation = Some(Reservation::ReleasingAbortedAtSource);
    draft.set(STOPPED, Status::False, "GuestRuns", &format!("The guest runs on {source}."), stamp);
    draft.set(COMMITTED, Status::False, "GivenUp", &format!("{source} has given the migration up."), stamp);
    failed(draft, MigrationPhase::RolledBack, reason, message, stamp);
}

/// It was cancelled or deleted while nothing was under way: before it was planned, before the source was asked for anything,
/// or between two attempts.
pub fn gave_up_before_asking(draft: &mut Draft, stamp: Stamp) {
    const ABORTED: &str = "Aborted";
    let why = draft.why_given_up();
    match draft.status.reservation {
        None => {
            let message = format!("Before anything was asked of any agent, {why}.");
            draft.status.observed_spec.get_or_insert_with(|| spec::as_accepted(&draft.spec));
            draft.set(ACCEPTED, Status::False, ABORTED, &message, stamp);
            failed(draft, MigrationPhase::Refused, ABORTED, &message, stamp);
        }
        Some(Reservation::Requested) => {
            let message = format!(
                "Before anything was asked of {}, {why}. VM {} runs on there.",
                draft.source(),
                draft.vm
            );
            draft.status.reservation = Some(Reservation::ReleasingNeverStarted);
            failed(draft, MigrationPhase::RolledBack, ABORTED, &message, stamp);
        }
        Some(_) => {
            let message =
                format!("Between two attempts, {why}. VM {} runs on at {}.", draft.vm, draft.source());
            let attempts = draft.status.attempts.clone();
            draft.status.next_attempt_time = None;
            failed(draft, MigrationPhase::RolledBack, ABORTED, &message, stamp);
            // No attempt was under way that could have ended by this.
            draft.status.attempts = attempts;
        }
    }
}

/// It has ended by what the agents have journalled, and the source has not told more. `error`: why the source could not be
/// followed, if that is known.
pub fn settled(draft: &mut Draft, how: &Settlement, error: Option<&str>, stamp: Stamp) {
    let (vm, source, target) = (draft.vm.clone(), draft.source(), draft.target());
    let error = error.map(|error| error.trim_end_matches('.')).filter(|error| !error.is_empty());
    match how {
        Settlement::NeverBegan if draft.wish != Wish::Migrate => {
            let message = format!(
                "{source} had not begun with the migration when {}. VM {vm} runs on there.",
                draft.why_given_up()
            );
            rolled_back(draft, "Aborted", &message, stamp);
        }
        Settlement::NeverBegan => {
            let error = error.unwrap_or("it has no record of the migration");
            let message =
                format!("{source} has not begun to migrate VM {vm}: {error}. Nothing was touched there.");
            rolled_back(draft, "SourceRefused", &message, stamp);
        }
        Settlement::GivenUp(failure) => {
            let reason = failure.as_ref().map_or("RolledBack", |failure| failure.reason.as_str()).to_owned();
            let why = failure.as_ref().map(|failure| failure.message.trim_end_matches('.'));
            let message = format!(
                "{source} has journalled that it gave the migration up{}. VM {vm} stays there; the agent has not told more, so \
                 look whether it runs (`kubectl get assignedvms`).",
                why.map(|why| format!(": {why}")).unwrap_or_default()
            );
            rolled_back(draft, &reason, &message, stamp);
        }
        Settlement::RunsAtDestination => {
            events::stopped(draft, stamp);
            events::committed(draft, stamp);
            events::succeeded(draft, None, stamp);
        }
        Settlement::Lost(failure) => {
            let reason = failure.as_ref().map_or("Lost", |failure| failure.reason.as_str()).to_owned();
            let why = failure.as_ref().map_or("its end is journalled, without a reason", |failure| {
                failure.message.trim_end_matches('.')
            });
            let message = format!("VM {vm} runs neither on {source} nor on {target}: {why}.");
            draft.status.reservation = Some(Reservation::Kept);
            failed(draft, MigrationPhase::Lost, &reason, &message, stamp);
        }
    }
}

/// The target has given back what it reserved.
pub fn released(draft: &mut Draft, message: &str, stamp: Stamp) {
    draft.status.reservation = Some(Reservation::Released);
    // A failed reservation keeps its reason: that is what there is to learn from it.
    if !conditions::is(&draft.status.conditions, PREPARED, Status::False) {
        draft.set(PREPARED, Status::False, "Released", message, stamp);
    }
    draft.status.observed_generation = stamp.generation;
    if draft.status.completion_time.is_none() && draft.wish == Wish::Migrate {
        paused_before_the_next(draft, stamp);
    }
}

/// The target could not be asked to give back what it reserved; it is asked again.
pub fn release_failed(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "{} could not be asked to give back what it reserved: {error}. It is asked again until it answers; without word \
         from the source it gives the devices back by itself after {}.",
        draft.target(),
        crate::migration::request::silence_timeout()
    );
    draft.set(PREPARED, Status::Unknown, "Releasing", &message, stamp);
}

/// The target says that it must not give back what it reserved: the VM may have run there.
pub fn release_refused(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "{} keeps what it reserved: {error}. Yet {} has given the migration up. Look where VM {} runs, and end the other \
         copy before anything else.",
        draft.target(),
        draft.source(),
        draft.vm
    );
    draft.status.reservation = Some(Reservation::Kept);
    draft.set(PREPARED, Status::Unknown, "ReleaseRefused", &message, stamp);
    draft.tell(true, "ReleaseRefused", message);
}
