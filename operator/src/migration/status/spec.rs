//! Changes of the spec after it was accepted, and which of them count.

use slackwater_api::VMMigrationSpec;
use slackwater_api::condition::{ACCEPTED, RESOLVE_ACCEPTED};

use super::Draft;
use crate::conditions::{self, Status};
use crate::reason::SPEC_CHANGE_IGNORED;

/// A spec as it is accepted: `cancel` and `resolve` are noted when the operator sees them.
pub(super) fn as_accepted(spec: &VMMigrationSpec) -> VMMigrationSpec {
    VMMigrationSpec { cancel: false, resolve: None, ..spec.clone() }
}

impl Draft {
    /// Takes in a spec as it is now. A change that must not be is ignored, and the status says so: API
    /// servers before 1.25 let it happen.
    ///
    /// `true`: the status has changed.
    pub fn note_spec(&mut self, spec: &VMMigrationSpec) -> bool {
        let cancelled = self.note_cancel(spec);
        let withdrawn = self.note_withdrawn_resolve(spec);
        self.ignore_changes(spec) || cancelled || withdrawn
    }

    /// `cancel` is noted, and cannot be taken back.
    fn note_cancel(&mut self, spec: &VMMigrationSpec) -> bool {
        let observed = self.status.observed_spec.as_mut();
        let Some(observed) = observed.filter(|observed| spec.cancel && !observed.cancel) else {
            return false;
        };
        observed.cancel = true;
        self.status.observed_generation = self.stamp.generation;
        if self.status.completion_time.is_some() {
            let note =
                "spec.cancel was set to true after the migration had ended: there is nothing to give up.";
            self.warn("CancelTooLate", note.to_owned());
        }
        true
    }

    /// A resolve that was refused may be taken away.
    fn note_withdrawn_resolve(&mut self, spec: &VMMigrationSpec) -> bool {
        let refused = self.is(RESOLVE_ACCEPTED, Status::False);
        let Some(observed) = &mut self.status.observed_spec else { return false };
        if !refused || spec.resolve.is_some() || observed.resolve.is_none() {
            return false;
        }
        observed.resolve = None;
        self.status.conditions.retain(|condition| condition.type_ != RESOLVE_ACCEPTED);
        true
    }

    fn ignore_changes(&mut self, spec: &VMMigrationSpec) -> bool {
        let Some(observed) = &self.status.observed_spec else { return false };
        let Some(accepted) = conditions::find(&self.status.conditions, ACCEPTED) else { return false };
        let status = if accepted.status == Status::True.as_str() { Status::True } else { Status::False };
        let changed = changed_fields(observed, spec, self.is_resolved());
        if changed.is_empty() || accepted.reason == SPEC_CHANGE_IGNORED {
            return false;
        }
        let message = format!(
            "{} was changed afterwards, and that is ignored: a VMMigration does what it was created for. Delete it \
             and create another one. What was decided: {}",
            changed.join(", "),
            accepted.message
        );
        self.set(ACCEPTED, status, SPEC_CHANGE_IGNORED, &message);
        self.warn(SPEC_CHANGE_IGNORED, message);
        true
    }
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
