//! What becomes known about a migration, and what a VMMigration's status says of it.
//!
//! `(status, fact) -> (status, notices)`, without Kubernetes, gRPC or a clock. A notice becomes a Kubernetes event.
//! A fact that is told again changes nothing and gives no notice again: an agent that is joined again tells all of its
//! events from the start.

mod ending;
mod events;
#[cfg(test)]
mod tests;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{ACCEPTED, COMMITTED, PREPARED, STOPPED, SUCCEEDED};
use slackwater_api::{
    DeviceMigration, MigrationPhase, PeerToPeer, Reservation, VMMigration, VMMigrationSpec, VMMigrationStatus,
};

use super::trace::Trace;
use crate::conditions::{self, Stamp, Status};
use crate::plan::{Plan, Refusal};

pub use ending::{gave_up_before_asking, release_failed, release_refused, released};
pub use events::{finished, phase};

/// Something to tell the user as a Kubernetes event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Something is not as it should be.
    pub warning: bool,
    /// CamelCase.
    pub reason: &'static str,
    /// For a person.
    pub note: String,
}

/// A status under construction.
#[derive(Debug, Clone)]
pub struct Draft {
    /// namespace/name of the VM, for messages.
    pub vm: String,
    /// The status so far.
    pub status: VMMigrationStatus,
    /// What is to be told, oldest first.
    pub notices: Vec<Notice>,
}

impl Draft {
    /// Begins with what an object's status says.
    pub fn new(migration: &VMMigration) -> Self {
        let namespace = migration.metadata.namespace.as_deref().unwrap_or_default();
        Self {
            vm: format!("{namespace}/{}", migration.spec.vm_ref.name),
            status: migration.status.clone().unwrap_or_default(),
            notices: Vec::new(),
        }
    }

    fn set(&mut self, type_: &str, status: Status, reason: &str, message: &str, stamp: Stamp) -> bool {
        self.status.observed_generation = stamp.generation;
        conditions::set(&mut self.status.conditions, type_, status, reason, message, stamp)
    }

    fn is(&self, type_: &str, status: Status) -> bool {
        conditions::is(&self.status.conditions, type_, status)
    }

    fn tell(&mut self, warning: bool, reason: &'static str, note: String) {
        self.notices.push(Notice { warning, reason, note });
    }

    fn source(&self) -> String {
        self.status.source_node.clone().unwrap_or_default()
    }

    fn target(&self) -> String {
        self.status.target_node.clone().unwrap_or_default()
    }
}

/// The operator does not know the nodes well enough yet to judge.
pub fn waiting(draft: &mut Draft, message: &str, stamp: Stamp) {
    draft.status.phase = Some(MigrationPhase::Pending);
    draft.set(ACCEPTED, Status::Unknown, "WaitingForAgents", message, stamp);
    draft.set(SUCCEEDED, Status::Unknown, "WaitingForAgents", message, stamp);
}

/// It cannot work. Nothing was touched.
pub fn refused(draft: &mut Draft, spec: &VMMigrationSpec, refusal: &Refusal, stamp: Stamp) {
    let message = refusal.to_string();
    draft.status.observed_spec = Some(spec.clone());
    draft.status.phase = Some(MigrationPhase::Refused);
    draft.status.completion_time = Some(Time(stamp.now));
    draft.set(SUCCEEDED, Status::False, refusal.reason(), &message, stamp);
    if draft.set(ACCEPTED, Status::False, refusal.reason(), &message, stamp) {
        draft.tell(true, "Refused", format!("{}: {message}", refusal.reason()));
    }
}

/// It has been planned; nothing has been asked of any agent yet.
pub fn planned(draft: &mut Draft, spec: &VMMigrationSpec, plan: &Plan, stamp: Stamp) {
    let status = &mut draft.status;
    status.observed_spec = Some(spec.clone());
    status.source_node = Some(plan.source.clone());
    status.target_node = Some(plan.target.clone());
    status.target_address = Some(plan.target_address.clone());
    status.attempt = Some(status.attempt.unwrap_or_default() + 1);
    status.reservation = Some(Reservation::Requested);
    status.start_time = Some(Time(stamp.now));
    status.phase = Some(MigrationPhase::Preparing);
    status.devices = plan.devices.iter().map(device).collect();

    let pairs: Vec<String> = plan
        .devices
        .iter()
        .map(|pair| format!("{} -> {} ({})", pair.source, pair.target, pair.model))
        .collect();
    let mut message = format!("VM {} goes from {} to {}", draft.vm, plan.source, plan.target);
    if !pairs.is_empty() {
        message.push_str(&format!(", its devices {}", pairs.join(", ")));
    }
    message.push('.');
    let isolated = spec.peer_to_peer == PeerToPeer::AssumeIsolated && plan.devices.len() > 1;
    if isolated {
        message.push_str(" They are taken to be isolated from each other, since spec.peerToPeer says so.");
    }
    if draft.set(ACCEPTED, Status::True, "Planned", &message, stamp) {
        draft.tell(false, "Accepted", message);
        if isolated {
            let note = "spec.peerToPeer is AssumeIsolated: the devices of the VM need not be quiesced together. If they do \
                        talk to each other, their state can be torn.";
            draft.tell(true, "AssumeIsolated", note.to_owned());
        }
    }
    let reserving = format!("{} is asked to reserve the devices.", plan.target);
    draft.set(PREPARED, Status::Unknown, "Reserving", &reserving, stamp);
    draft.set(STOPPED, Status::False, "GuestRuns", &format!("The guest runs on {}.", plan.source), stamp);
    draft.set(COMMITTED, Status::False, "NotYet", "The migration can still be given up.", stamp);
    draft.set(SUCCEEDED, Status::Unknown, "InProgress", "The target is being made ready.", stamp);
}

fn device(pair: &crate::plan::Pair) -> DeviceMigration {
    DeviceMigration {
        source: pair.source.clone(),
        target: pair.target.clone(),
        driver: pair.driver.clone(),
        model: pair.model.clone(),
        features: pair.features.clone(),
        bytes: None,
        states: Vec::new(),
    }
}

/// The target has reserved. To be written before the source is asked for anything.
pub fn reserved(draft: &mut Draft, stamp: Stamp) {
    let devices: Vec<&str> = draft.status.devices.iter().map(|device| device.target.as_str()).collect();
    let holds = if devices.is_empty() { String::new() } else { format!("{} and ", devices.join(", ")) };
    let message = format!("{} holds {holds}a waiting VMM.", draft.target());
    draft.status.reservation = Some(Reservation::Held);
    if draft.set(PREPARED, Status::True, "TargetReserved", &message, stamp) {
        draft.tell(false, "Prepared", message);
    }
    let next = format!("{} is asked to migrate.", draft.source());
    draft.set(SUCCEEDED, Status::Unknown, "InProgress", &next, stamp);
}

/// The target has refused to reserve, or could not be asked. The source was never asked for anything.
pub fn reserve_failed(draft: &mut Draft, reason: &str, error: &str, stamp: Stamp) {
    let (source, target) = (draft.source(), draft.target());
    let message = format!(
        "{target} could not be made ready: {error}. VM {} runs on at {source}; nothing was touched there.",
        draft.vm
    );
    draft.status.reservation = Some(Reservation::ReleasingNeverStarted);
    draft.set(PREPARED, Status::False, reason, &format!("{target} could not be made ready: {error}."), stamp);
    ending::failed(draft, MigrationPhase::RolledBack, reason, &message, stamp);
}

/// An agent that is needed cannot be reached just now; it is tried again.
pub fn unreachable(draft: &mut Draft, message: &str, stamp: Stamp) {
    if draft.is(SUCCEEDED, Status::Unknown) {
        draft.set(SUCCEEDED, Status::Unknown, "AgentUnreachable", message, stamp);
    }
}

/// Somebody deleted the object while the migration ran.
pub fn aborting(draft: &mut Draft, stamp: Stamp) {
    draft.status.phase = Some(MigrationPhase::Aborting);
    let message =
        format!("The VMMigration was deleted; {} is asked to give the migration up.", draft.source());
    let told = conditions::find(&draft.status.conditions, SUCCEEDED).is_some_and(|c| c.reason == "Aborting");
    draft.set(SUCCEEDED, Status::Unknown, "Aborting", &message, stamp);
    if !told {
        draft.tell(false, "Aborting", message);
    }
}

/// It was deleted after the point of no return.
pub fn abort_too_late(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "The VMMigration was deleted too late to give it up ({error}). The VM goes on to {}; then the object is removed.",
        draft.target()
    );
    draft.status.phase = Some(MigrationPhase::Starting);
    draft.set(SUCCEEDED, Status::Unknown, "AbortTooLate", &message, stamp);
    draft.tell(true, "AbortTooLate", message);
}

/// The source has given the migration up on request (or never knew it), and has not told more.
pub fn aborted(draft: &mut Draft, stamp: Stamp) {
    let message = format!(
        "The migration was given up since the VMMigration was deleted. VM {} runs on at {}.",
        draft.vm,
        draft.source()
    );
    ending::rolled_back(draft, "Aborted", &message, stamp);
}

/// The source refuses to begin. It has not changed anything.
pub fn source_refused(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "{} refuses to migrate VM {}: {error}. The VM runs on there; nothing was touched.",
        draft.source(),
        draft.vm
    );
    ending::rolled_back(draft, "SourceRefused", &message, stamp);
}

/// The source cannot be asked to begin, and never was.
pub fn source_unreachable(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "{} could not be asked to migrate VM {}: {error}. Nothing was touched there.",
        draft.source(),
        draft.vm
    );
    draft.status.reservation = Some(Reservation::ReleasingNeverStarted);
    ending::failed(draft, MigrationPhase::RolledBack, "SourceNotReady", &message, stamp);
}

/// The status says that the migration was accepted, and not what it is.
pub fn unreadable(draft: &mut Draft, stamp: Stamp) {
    let message = "The status is not one that the operator has written: what was accepted is missing. The agents may still \
                   hold something for this migration; restart the target's agent, then delete the object.";
    draft.status.reservation = Some(Reservation::Kept);
    ending::failed(draft, MigrationPhase::InDoubt, "StatusUnreadable", message, stamp);
}

/// The source was busy with the migration, and refuses to be joined.
pub fn source_forgot(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "The agent of {} cannot tell any more what became of the migration: {error}. Look where VM {} runs (`kubectl get \
         assignedvm`), and keep the other copy from being started.",
        draft.source(),
        draft.vm
    );
    ending::in_doubt(draft, "SourceForgot", &message, stamp);
}

/// The spec is not what was accepted (or refused). API servers before 1.25 let that happen.
///
/// `true`: the status has been changed.
pub fn spec_changed(draft: &mut Draft, spec: &VMMigrationSpec, stamp: Stamp) -> bool {
    const IGNORED: &str = "SpecChangeIgnored";
    let Some(observed) = &draft.status.observed_spec else { return false };
    let accepted = conditions::find(&draft.status.conditions, ACCEPTED).cloned();
    let Some(accepted) = accepted else { return false };
    let status = if accepted.status == Status::True.as_str() { Status::True } else { Status::False };
    if observed == spec {
        return false;
    }
    if accepted.reason == IGNORED {
        return false;
    }
    let message = format!(
        "{} was changed afterwards, and that is ignored: a VMMigration does what it was created for. Delete it and create \
         another one. What was decided: {}",
        changed_fields(observed, spec).join(", "),
        accepted.message
    );
    draft.set(ACCEPTED, status, IGNORED, &message, stamp);
    draft.tell(true, IGNORED, message);
    true
}

fn changed_fields(observed: &VMMigrationSpec, spec: &VMMigrationSpec) -> Vec<&'static str> {
    [
        (observed.vm_ref != spec.vm_ref, "spec.vmRef"),
        (observed.target != spec.target, "spec.target"),
        (observed.peer_to_peer != spec.peer_to_peer, "spec.peerToPeer"),
        (observed.pre_commit_timeout != spec.pre_commit_timeout, "spec.preCommitTimeout"),
    ]
    .into_iter()
    .filter_map(|(changed, field)| changed.then_some(field))
    .collect()
}

/// Shows what the agents have told so far.
fn show_trace(draft: &mut Draft, trace: &Trace) {
    draft.status.timeline = trace.timeline();
}
