//! Which attempts have ended, and whether another one follows.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_api::condition::SUCCEEDED;
use slackwater_api::{EndedAttempt, MigrationPhase, VMMigrationSpec, format_duration};

use super::Draft;
use crate::backoff::Pauses;
use crate::conditions::{Status, cut, plain};
use crate::migration::step::Wish;
use crate::plan::Refusal;
use crate::reason;

/// Between two attempts.
const ATTEMPT_PAUSES: Pauses = Pauses::new(Duration::from_secs(5), Duration::from_secs(60));
/// An attempt's message in the list of those that have ended.
const MESSAGE_LIMIT_BYTES: usize = 1024;

impl Draft {
    /// Another attempt may follow this one. Not where an administrator has decided where the VM runs.
    pub(super) fn may_try_again(&self) -> bool {
        self.wish == Wish::Migrate
            && self.status.attempt.is_some_and(|attempt| attempt < self.allowed_attempts())
            && !self.is_resolved()
    }

    /// Notes that the current attempt has ended; once, however often it is called.
    pub(super) fn note_attempt(&mut self, reason: &str, message: &str) {
        let Some(attempt) = self.status.attempt else { return };
        self.status.attempts.retain(|ended| ended.attempt != attempt);
        let message = cut(&plain(message), MESSAGE_LIMIT_BYTES);
        self.status.attempts.push(EndedAttempt { attempt, reason: reason.to_owned(), message });
    }

    /// The attempt was rolled back. Another one follows when the target has given back what it reserved.
    pub(super) fn attempt_failed(&mut self, reason: &str, message: &str) {
        let message = format!("Attempt {} has failed ({reason}). {message}", self.which_attempt());
        self.status.phase = Some(MigrationPhase::Retrying);
        self.set(SUCCEEDED, Status::Unknown, reason::ATTEMPT_FAILED, &message);
        self.warn(reason::ATTEMPT_FAILED, message);
    }

    /// How long the next attempt waits, as of now: never longer than this operator would have it wait, since
    /// another one wrote the time by another clock.
    pub fn wait_for_next_attempt(&self, now: Timestamp) -> Duration {
        let Some(time) = &self.status.next_attempt_time else { return Duration::ZERO };
        let wait = Duration::try_from(time.0.duration_since(now)).unwrap_or(Duration::ZERO);
        wait.min(self.pause_after_attempt())
    }

    fn pause_after_attempt(&self) -> Duration {
        ATTEMPT_PAUSES.after(u32::try_from(self.status.attempt.unwrap_or_default()).unwrap_or_default())
    }

    /// Nothing is held for the last attempt any more: the next one is planned after a pause.
    pub(super) fn schedule_next_attempt(&mut self) {
        let pause = self.pause_after_attempt();
        let signed = SignedDuration::try_from(pause).unwrap_or(SignedDuration::ZERO);
        self.status.next_attempt_time = self.stamp.now.checked_add(signed).ok().map(Time);
        self.status.phase = Some(MigrationPhase::Retrying);
        let last = self.status.attempts.last();
        let why = last.map(|last| format!(" It failed by {}: {}", last.reason, last.message));
        let message = format!(
            "Attempt {} has ended; the next begins after {}.{}",
            self.which_attempt(),
            format_duration(pause),
            why.unwrap_or_default()
        );
        self.set(SUCCEEDED, Status::Unknown, reason::ATTEMPT_FAILED, &message);
    }

    /// The next attempt cannot be planned as things are. That counts as an attempt.
    pub fn next_plan_failed(&mut self, spec: &VMMigrationSpec, refusal: &Refusal) {
        let attempt = self.status.attempt.unwrap_or_default() + 1;
        self.status.attempt = Some(attempt);
        self.status.next_attempt_time = None;
        let message = refusal.to_string();
        self.note_attempt(refusal.reason(), &message);
        if self.may_try_again() {
            self.attempt_failed(refusal.reason(), &message);
            self.schedule_next_attempt();
        } else {
            self.refuse(spec, refusal);
        }
    }

    /// "1 of 3"
    fn which_attempt(&self) -> String {
        format!("{} of {}", self.status.attempt.unwrap_or_default(), self.allowed_attempts())
    }

    fn allowed_attempts(&self) -> i32 {
        self.status.observed_spec.as_ref().map_or(1, |spec| spec.attempts)
    }
}
