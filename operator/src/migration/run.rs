//! One migration under way, and settling it with both ends: what every step of it needs.
//!
//! `prepare`, `follow` and `release` are the steps; `drive` takes them in the order that
//! [`step`](super::step) draws.

use std::sync::Arc;

use slackwater_api::VMMigration;
use slackwater_handover::resolver::{Decision, Settlement, Unfit};

use super::attempt::Attempt;
use super::context::Context;
use super::inquiry::{Round, run_round};
use super::request::Accepted;
use super::status::end_of;
use super::tracked::TrackedMigration;

/// A VMMigration, its current attempt, and all that is needed to bring it on.
pub(super) struct Run {
    pub(super) context: Context,
    pub(super) tracked: TrackedMigration,
    pub(super) attempt: Attempt,
}

impl Run {
    pub(super) fn new(context: Context, object: Arc<VMMigration>) -> Self {
        let tracked = TrackedMigration::new(context.clone(), object);
        Self { context, tracked, attempt: Attempt::default() }
    }

    /// Takes in what the user has changed in the spec.
    pub(super) async fn note_spec(&mut self) {
        let spec = self.tracked.spec().clone();
        let changed = self.tracked.draft_now().note_spec(&spec);
        if self.judge_resolve() || changed {
            self.tracked.write_progress().await;
        }
        // Before an agent hears of a decision, the next operator must be able to find it.
        if self.tracked.is_written()
            && let Some(decision) = self.attempt.decided.take()
        {
            self.attempt.inquiry.decide(decision);
        }
    }

    /// Begins an inquiry with what the status says.
    pub(super) fn recall(&mut self) {
        let draft = self.tracked.draft();
        if !draft.status.timeline.is_empty() || draft.is_committed() {
            self.attempt.inquiry.source_began(draft.is_committed());
        }
        let observed = draft.status.observed_spec.as_ref();
        let resolve = observed.and_then(|spec| spec.resolve.as_ref()).filter(|_| draft.is_resolved());
        if let Some(resolve) = resolve {
            let justification = resolve.justification.trim().to_owned();
            self.attempt.inquiry.decide(Decision { run_on: end_of(resolve.run_on), justification });
        }
    }

    /// Asks both ends once, now or after a pause that grows. Returns how the migration is settled, if it is.
    pub(super) async fn inquire(&mut self, accepted: &Accepted) -> Option<Settlement> {
        let next = self.attempt.inquiry.next_round();
        let round = run_round(Arc::clone(&self.context.fleet), accepted.clone(), next).await;
        self.tracked.look();
        self.take_in_round(round).await
    }

    /// Judges a round and shows what came of it.
    pub(super) async fn take_in_round(&mut self, round: Round) -> Option<Settlement> {
        let (source, target) = (&round.source, &round.target);
        tracing::debug!(migration = self.tracked.name(), ?source, ?target, "both ends were asked");
        let settled = self.attempt.inquiry.judge(round, self.context.source_patience);
        self.show_doubt();
        self.note_spec().await;
        self.tracked.write_progress().await;
        settled
    }

    /// Shows whether the migration is in doubt, by all that is known.
    pub(super) fn show_doubt(&mut self) {
        let inquiry = &self.attempt.inquiry;
        // What an earlier operator has found out stays until this one has asked, too. The same goes for what
        // this one shows, while an end may just be restarting.
        if self.tracked.draft().is_in_doubt() && (!inquiry.resolver().has_judged() || inquiry.is_patient()) {
            return;
        }
        match inquiry.doubt() {
            Some(doubt) => self.tracked.draft_now().set_in_doubt(&doubt),
            None => self.tracked.draft_now().clear_doubt(),
        }
    }

    /// Judges `spec.resolve`, if there is one that has not been judged. `true`: the status has changed.
    fn judge_resolve(&mut self) -> bool {
        let spec = self.tracked.spec().clone();
        let draft = self.tracked.draft_now();
        let Some(resolve) = draft.unjudged_resolve(&spec) else { return false };
        let resolver = self.attempt.inquiry.resolver();
        let fits = match draft.is_in_doubt() {
            // A restarted operator has to ask first.
            true if !resolver.has_judged() => return false,
            true => resolver.fits(end_of(resolve.run_on)),
            false => Err(Unfit::NotInDoubt),
        };
        match draft.judge_resolve(resolve, fits) {
            Ok(decision) => {
                draft.accept_resolve(resolve);
                self.attempt.decided = Some(decision);
            }
            Err(refusal) => draft.refuse_resolve(resolve, &refusal),
        }
        true
    }
}
