//! Facts about attempts: which have ended, and whether another one follows.

use std::time::Duration;

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::{RESOLVE_ACCEPTED, SUCCEEDED};
use slackwater_api::{EndedAttempt, MigrationPhase, VMMigrationSpec, format_duration};

use super::{Draft, refused};
use crate::conditions::{Stamp, Status, cut};
use crate::migration::step::Wish;
use crate::plan::Refusal;

/// The pauses before the second attempt, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// An attempt's message in the list of those that have ended.
const MESSAGE_LIMIT_BYTES: usize = 1024;

impl Draft {
    /// Another attempt may follow this one. Not where somebody has decided that the VM stays where it is.
    pub(super) fn may_try_again(&self) -> bool {
        let allowed = self.status.observed_spec.as_ref().map_or(1, |spec| spec.attempts);
        self.wish == Wish::Migrate
            && self.status.attempt.is_some_and(|attempt| attempt < allowed)
            && !self.is(RESOLVE_ACCEPTED, Status::True)
    }

    /// An attempt has ended. Told again, it is noted once.
    pub(super) fn note_attempt(&mut self, reason: &str, message: &str) {
        let Some(attempt) = self.status.attempt else { return };
        self.status.attempts.retain(|ended| ended.attempt != attempt);
        let message = cut(message, MESSAGE_LIMIT_BYTES);
        self.status.attempts.push(EndedAttempt { attempt, reason: reason.to_owned(), message });
    }

    /// "1 of 3"
    fn which_attempt(&self) -> String {
        let allowed = self.status.observed_spec.as_ref().map_or(1, |spec| spec.attempts);
        format!("{} of {allowed}", self.status.attempt.unwrap_or_default())
    }
}

/// An attempt was rolled back, and another one follows when the target has given back what it reserved.
pub(super) fn failed_for_now(draft: &mut Draft, reason: &str, message: &str, stamp: Stamp) {
    let message = format!("Attempt {} has failed ({reason}). {message}", draft.which_attempt());
    draft.status.phase = Some(MigrationPhase::Retrying);
    draft.set(SUCCEEDED, Status::Unknown, "AttemptFailed", &message, stamp);
    draft.tell(true, "AttemptFailed", message);
}

/// Nothing is held for the last attempt any more: the next one is planned after a pause.
pub fn paused_before_the_next(draft: &mut Draft, stamp: Stamp) {
    let ended = u32::try_from(draft.status.attempt.unwrap_or_default().max(1)).unwrap_or(1);
    let pause = PAUSES.0.saturating_mul(1 << (ended - 1).min(10)).min(PAUSES.1);
    let pause_signed = SignedDuration::try_from(pause).unwrap_or(SignedDuration::ZERO);
    draft.status.next_attempt_time = stamp.now.checked_add(pause_signed).ok().map(Time);
    draft.status.phase = Some(MigrationPhase::Retrying);
    let last = draft.status.attempts.last();
    let why = last.map(|last| format!(" It failed by {}: {}", last.reason, last.message)).unwrap_or_default();
    let message = format!(
        "Attempt {} has ended; the next begins after {}.{why}",
        draft.which_attempt(),
        format_duration(pause)
    );
    draft.set(SUCCEEDED, Status::Unknown, "AttemptFailed", &message, stamp);
}

/// The next attempt cannot be planned as things stand. That counts as an attempt.
pub fn no_plan_this_time(draft: &mut Draft, spec: &VMMigrationSpec, refusal: &Refusal, stamp: Stamp) {
    let attempt = draft.status.attempt.unwrap_or_default() + 1;
    draft.status.attempt = Some(attempt);
    draft.status.next_attempt_time = None;
    let message = refusal.to_string();
    draft.note_attempt(refusal.reason(), &message);
    if draft.may_try_again() {
        failed_for_now(draft, refusal.reason(), &message, stamp);
        paused_before_the_next(draft, stamp);
    } else {
        refused(draft, spec, refusal, stamp);
    }
}
