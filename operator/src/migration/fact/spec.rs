//! Facts about the spec: what was changed after it was accepted, and what of that counts.

use slackwater_api::VMMigrationSpec;
use slackwater_api::condition::{ACCEPTED, RESOLVE_ACCEPTED};

use super::Draft;
use crate::conditions::{self, Stamp, Status};

const IGNORED: &str = "SpecChangeIgnored";

/// A spec as it is accepted: `cancel` and `resolve` are noted when they are seen.
pub(super) fn as_accepted(spec: &VMMigrationSpec) -> VMMigrationSpec {
    VMMigrationSpec { cancel: false, resolve: None, ..spec.clone() }
}

/// Takes in a spec as it stands now. What must not be changed is ignored, in words: API servers before 1.25 let it happen.
///
/// `true`: the status has been changed.
pub fn spec_changed(draft: &mut Draft, spec: &VMMigrationSpec, stamp: Stamp) -> bool {
    let cancelled = cancelled(draft, spec, stamp);
    let withdrawn = withdrawn(draft, spec);
    ignored(draft, spec, stamp) || cancelled || withdrawn
}

/// `cancel` is noted, and cannot be taken back.
fn cancelled(draft: &mut Draft, spec: &VMMigrationSpec, stamp: Stamp) -> bool {
    let Some(observed) =
        draft.status.observed_spec.as_mut().filter(|observed| spec.cancel && !observed.cancel)
    else {
        return false;
    };
    observed.cancel = true;
    draft.status.observed_generation = stamp.generation;
    if draft.status.completion_time.is_some() {
        let note = "spec.cancel was set to true after the migration had ended: there is nothing to give up.";
        draft.tell(true, "CancelTooLate", note.to_owned());
    }
    true
}

/// A resolve that was refused may be taken away.
fn withdrawn(draft: &mut Draft, spec: &VMMigrationSpec) -> bool {
    let refused = draft.is(RESOLVE_ACCEPTED, Status::False);
    let Some(observed) = &mut draft.status.observed_spec else { return false };
    if !refused || spec.resolve.is_some() || observed.resolve.is_none() {
        return false;
    }
    observed.resolve = None;
    draft.status.conditions.retain(|condition| condition.type_ != RESOLVE_ACCEPTED);
    true
}

fn ignored(draft: &mut Draft, spec: &VMMigrationSpec, stamp: Stamp) -> bool {
    let Some(observed) = &draft.status.observed_spec else { return false };
    let Some(accepted) = conditions::find(&draft.status.conditions, ACCEPTED) else { return false };
    let status = if accepted.status == Status::True.as_str() { Status::True } else { Status::False };
    let resolved = draft.is(RESOLVE_ACCEPTED, Status::True);
    let changed = changed_fields(observed, spec, resolved);
    if changed.is_empty() || accepted.reason == IGNORED {
        return false;
    }
    let message = format!(
        "{} was changed afterwards, and that is ignored: a VMMigration does what it was created for. Delete it and create \
         another one. What was decided: {}",
        changed.join(", "),
        accepted.message
    );
    draft.set(ACCEPTED, status, IGNORED, &message, stamp);
    draft.tell(true, IGNORED, message);
    true
}

fn changed_fields(observed: &VMMigrationSpec, spec: &VMMigrationSpec, resolved: bool) -> Vec<&'static str> {
    [
        (observed.vm_ref != spec.vm_ref, "spec.vmRef"),
        (observed.target != spec.target, "spec.target"),
        (observed.peer_to_peer != spec.peer_to_peer, "spec.peerToPeer"),
        (observed.pre_commit_timeout != spec.pre_commit_timeout, "spec.preCommitTimeout"),
        (observed.downtime_budget != spec.downtime_budget, "spec.downtimeBudget"),
        (observed.on_budget_exceeded != spec.on_budget_exceeded, "spec.onBudgetExceeded"),
        (observed.attempts != spec.attempts, "spec.attempts"),
        (observed.cancel && !spec.cancel, "spec.cancel"),
        (resolved && observed.resolve != spec.resolve, "spec.resolve"),
    ]
    .into_iter()
    .filter_map(|(changed, field)| changed.then_some(field))
    .collect()
}
