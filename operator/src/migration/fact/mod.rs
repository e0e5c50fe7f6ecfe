//! What becomes known about a migration, and what a VMMigration's status says of it.
//!
//! `(status, fact) -> (status, notices)`, without Kubernetes, gRPC or a clock. A notice becomes a Kubernetes event.
//! A fact that is told again changes nothing and gives no notice again: an agent that is joined again tells all of its
//! events from the start.

mod attempts;
mod doubt;
mod ending;
mod estimate;
mod events;
mod resolve;
mod spec;
#[cfg(test)]
mod tests;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{
    ACCEPTED, COMMITTED, IN_DOUBT, PREPARED, RESOLVE_ACCEPTED, STOPPED, SUCCEEDED,
};
use slackwater_api::{
    DeviceMigration, MigrationPhase, PeerToPeer, Reservation, VMMigration, VMMigrationSpec, VMMigrationStatus,
};

use super::step::Wish;
use super::trace::Trace;
use crate::conditions::{self, Stamp, Status};
use crate::plan::{Plan, Refusal};

pub use attempts::{no_plan_this_time, paused_before_the_next};
pub use doubt::{Doubtful, doubt_cleared, in_doubt};
pub use ending::{gave_up_before_asking, release_failed, release_refused, released, settled};
pub use estimate::estimated;
pub use events::{finished, is_news, phase};
pub use resolve::{Refused, end, judge, resolve_accepted, resolve_refused, unjudged};
pub use spec::spec_changed;

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
    /// What its user wants, as far as that is known.
    pub wish: Wish,
    /// The spec as it was when this began.
    spec: VMMigrationSpec,
}

/// What the user wants of an object.
pub fn wish_of(migration: &VMMigration) -> Wish {
    let observed = migration.status.as_ref().and_then(|status| status.observed_spec.as_ref());
    if migration.metadata.deletion_timestamp.is_some() {
        Wish::Delete
    } else if migration.spec.cancel || observed.is_some_and(|spec| spec.cancel) {
        // It cannot be taken back, and an API server before 1.25 lets it be.
        Wish::Cancel
    } else {
        Wish::Migrate
    }
}

impl Draft {
    /// Begins with what an object's status says.
    pub fn new(migration: &VMMigration) -> Self {
        let namespace = migration.metadata.namespace.as_deref().unwrap_or_default();
        Self {
            vm: format!("{namespace}/{}", migration.spec.vm_ref.name),
            status: migration.status.clone().unwrap_or_default(),
            notices: Vec::new(),
            wish: wish_of(migration),
            spec: migration.spec.clone(),
        }
    }

    fn set(&mut self, type_: &str, status: Status, reason: &str, message: &str, stamp: Stamp) -> bool {
        self.status.observed_generation = stamp.generation;
        conditions::set(&mut self.status.conditions, type_, status, reason, message, stamp)
    }

    fn is(&self, type_: &str, status: Status) -> bool {
        conditions::is(&self.status.conditions, type_, status)
    }

    /// The condition InDoubt is True.
    pub fn is_in_doubt(&self) -> bool {
        self.is(IN_DOUBT, Status::True)
    }

    /// The source is known to have passed its point of no return.
    pub fn is_committed(&self) -> bool {
        self.is(COMMITTED, Status::True)
    }

    /// An administrator's word has been accepted.
    pub fn is_resolved(&self) -> bool {
        self.is(RESOLVE_ACCEPTED, Status::True)
    }

    /// Why it is given up, for a sentence.
    fn why_given_up(&self) -> &'static str {
        match self.wish {
            Wish::Delete => "the VMMigration was deleted",
            _ => "spec.cancel was set to true",
        }
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
    draft.status.observed_spec = Some(spec::as_accepted(spec));
    draft.status.phase = Some(MigrationPhase::Refused);
    draft.status.completion_time = Some(Time(stamp.now));
    draft.set(SUCCEEDED, Status::False, refusal.reason(), &message, stamp);
    if draft.set(ACCEPTED, Status::False, refusal.reason(), &message, stamp) {
        draft.tell(true, "Refused", format!("{}: {message}", refusal.reason()));
    }
}

/// It has been planned, for the first time or again; nothing has been asked of any agent yet.
pub fn planned(draft: &mut Draft, spec: &VMMigrationSpec, plan: &Plan, stamp: Stamp) {
    let attempt = draft.status.attempt.unwrap_or_default() + 1;
    let status = &mut draft.status;
    status.observed_spec.get_or_insert_with(|| spec::as_accepted(spec));
    status.source_node = Some(plan.source.clone());
    status.target_node = Some(plan.target.clone());
    status.target_address = Some(plan.target_address.clone());
    status.attempt = Some(attempt);
    status.reservation = Some(Reservation::Requested);
    status.start_time.get_or_insert(Time(stamp.now));
    status.phase = Some(MigrationPhase::Preparing);
    status.devices = plan.devices.iter().map(device).collect();
    // All else is of an attempt that has ended.
    status.next_attempt_time = None;
    status.timeline.clear();
    status.estimate = None;
    status.timings = None;
    status.bytes = None;
    status.conditions.retain(|condition| condition.type_ != IN_DOUBT);

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
    let accepted = draft.set(ACCEPTED, Status::True, "Planned", &message, stamp);
    if attempt > 1 {
        draft.tell(false, "NextAttempt", format!("Attempt {attempt} of {}: {message}", spec.attempts));
    } else if accepted {
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

/// The VM cannot be taken from where it was a moment ago. Nobody was asked for anything.
pub fn source_not_ready(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "VM {} cannot be taken from {}: {error}. Nothing was touched there.",
        draft.vm,
        draft.source()
    );
    draft.status.reservation = Some(Reservation::ReleasingNeverStarted);
    draft.set(PREPARED, Status::False, "SourceNotReady", &message, stamp);
    ending::failed(draft, MigrationPhase::RolledBack, "SourceNotReady", &message, stamp);
}

/// An agent that is needed cannot be reached just now; it is tried again.
pub fn unreachable(draft: &mut Draft, message: &str, stamp: Stamp) {
    // What is in doubt has more to say than this.
    if draft.is(SUCCEEDED, Status::Unknown) && !draft.is_in_doubt() {
        draft.set(SUCCEEDED, Status::Unknown, "AgentUnreachable", message, stamp);
    }
}

/// It was cancelled, or its object deleted, while it ran.
pub fn aborting(draft: &mut Draft, stamp: Stamp) {
    let message =
        format!("Since {}, {} is asked to give the migration up.", draft.why_given_up(), draft.source());
    give_up(draft, &message, stamp);
}

/// The source does not give it up, and not because it is too late.
pub fn abort_refused(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message = format!(
        "Since {}, {} is asked to give the migration up, and cannot: {error}. It is asked again.",
        draft.why_given_up(),
        draft.source()
    );
    give_up(draft, &message, stamp);
}

fn give_up(draft: &mut Draft, message: &str, stamp: Stamp) {
    if draft.is_in_doubt() {
        return;
    }
    draft.status.phase = Some(MigrationPhase::Aborting);
    let told = conditions::find(&draft.status.conditions, SUCCEEDED).is_some_and(|c| c.reason == "Aborting");
    draft.set(SUCCEEDED, Status::Unknown, "Aborting", message, stamp);
    if !told {
        draft.tell(false, "Aborting", message.to_owned());
    }
}

/// It was cancelled or deleted after the point of no return.
pub fn abort_too_late(draft: &mut Draft, error: &str, stamp: Stamp) {
    const TOO_LATE: &str = "AbortTooLate";
    let (target, then) = match draft.wish {
        Wish::Delete => ("deleted", "; then the object is removed"),
        _ => ("cancelled", ""),
    };
    let message = format!(
        "The migration was {target} too late to give it up: the point of no return has passed ({error}). The VM goes on to \
         {}{then}.",
        draft.target()
    );
    if draft.is_in_doubt() {
        return;
    }
    let told = conditions::find(&draft.status.conditions, SUCCEEDED).is_some_and(|c| c.reason == TOO_LATE);
    draft.status.phase = Some(MigrationPhase::Starting);
    draft.set(SUCCEEDED, Status::Unknown, TOO_LATE, &message, stamp);
    if !told {
        draft.tell(true, TOO_LATE, message);
    }
}

/// The source refuses to begin. It has not changed anything.
pub fn source_refused(draft: &mut Draft, error: &str, stamp: Stamp) {
    let message =
        format!("{} refuses to migrate VM {}: {error}. Nothing was touched there.", draft.source(), draft.vm);
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

/// Shows what the agents have told so far.
fn show_trace(draft: &mut Draft, trace: &Trace) {
    draft.status.timeline = trace.timeline(&draft.status.timeline);
}
