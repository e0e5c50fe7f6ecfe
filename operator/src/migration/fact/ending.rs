//! Facts about ends: what failed, and how the target's reservation is given back afterwards.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{COMMITTED, PREPARED, STOPPED, SUCCEEDED};
use slackwater_api::{MigrationPhase, Reservation};

use super::Draft;
use crate::conditions::{self, Stamp, Status};

/// It is over, and badly. The caller has said what becomes of the reservation.
pub(super) fn failed(draft: &mut Draft, phase: MigrationPhase, reason: &str, message: &str, stamp: Stamp) {
    draft.status.phase = Some(phase);
    draft.status.completion_time = Some(Time(stamp.now));
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

/// Nobody can tell where the VM will run.
pub(super) fn in_doubt(draft: &mut Draft, reason: &str, message: &str, stamp: Stamp) {
    draft.status.phase = Some(MigrationPhase::InDoubt);
    draft.status.reservation = Some(Reservation::Kept);
    draft.set(SUCCEEDED, Status::Unknown, reason, message, stamp);
    draft.tell(true, "InDoubt", format!("{reason}: {message}"));
}

/// It was deleted before the source was asked for anything.
pub fn gave_up_before_asking(draft: &mut Draft, stamp: Stamp) {
    let message = format!(
        "The VMMigration was deleted before anything was asked of {}. VM {} runs on there.",
        draft.source(),
        draft.vm
    );
    draft.status.reservation = Some(Reservation::ReleasingNeverStarted);
    failed(draft, MigrationPhase::RolledBack, "Aborted", &message, stamp);
}

/// The target has given back what it reserved.
pub fn released(draft: &mut Draft, message: &str, stamp: Stamp) {
    draft.status.reservation = Some(Reservation::Released);
    // A failed reservation keeps its reason: that is what there is to learn from it.
    if !conditions::is(&draft.status.conditions, PREPARED, Status::False) {
        draft.set(PREPARED, Status::False, "Released", message, stamp);
    }
    draft.status.observed_generation = stamp.generation;
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
