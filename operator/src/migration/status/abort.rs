//! A cancel or a deletion, and what becomes of it.

use slackwater_api::condition::{ACCEPTED, SUCCEEDED};
use slackwater_api::{MigrationPhase, Reservation};

use super::{Draft, spec};
use crate::conditions::Status;
use crate::migration::step::Wish;
use crate::reason;

impl Draft {
    /// The user wants a running migration to be given up.
    pub fn abort_requested(&mut self) {
        let (why, source) = (self.why_given_up(), self.source());
        self.give_up(&format!("Since {why}, {source} is asked to give the migration up."));
    }

    /// The source does not give the migration up, and not because it is too late.
    pub fn abort_refused(&mut self, error: &str) {
        let (why, source) = (self.why_given_up(), self.source());
        self.give_up(&format!(
            "Since {why}, {source} is asked to give the migration up, and cannot: {error}. It is asked again."
        ));
    }

    fn give_up(&mut self, message: &str) {
        if self.is_in_doubt() {
            return;
        }
        self.status.phase = Some(MigrationPhase::Aborting);
        let known = self.has_reason(SUCCEEDED, reason::ABORTING);
        self.set(SUCCEEDED, Status::Unknown, reason::ABORTING, message);
        if !known {
            self.report("Aborting", message.to_owned());
        }
    }

    /// The user wanted the migration to be given up after the point of no return.
    pub fn abort_too_late(&mut self, error: &str) {
        let (what, then) = match self.wish {
            Wish::Delete => ("deleted", "; then the object is removed"),
            Wish::Cancel | Wish::Migrate => ("cancelled", ""),
        };
        let message = format!(
            "The migration was {what} too late to give it up: the point of no return has passed ({error}). The VM \
             goes on to {}{then}.",
            self.target()
        );
        if self.is_in_doubt() {
            return;
        }
        let known = self.has_reason(SUCCEEDED, reason::ABORT_TOO_LATE);
        self.status.phase = Some(MigrationPhase::Starting);
        self.set(SUCCEEDED, Status::Unknown, reason::ABORT_TOO_LATE, &message);
        if !known {
            self.warn(reason::ABORT_TOO_LATE, message);
        }
    }

    /// The user wanted the migration to be given up while nothing was under way: before it was planned,
    /// before the source was asked for anything, or between two attempts.
    pub fn give_up_before_asking(&mut self) {
        let why = self.why_given_up();
        match self.status.reservation {
            None => {
                let message = format!("Before anything was asked of any agent, {why}.");
                self.status.observed_spec.get_or_insert_with(|| spec::as_accepted(&self.spec));
                self.set(ACCEPTED, Status::False, reason::ABORTED, &message);
                self.end_badly(MigrationPhase::Refused, reason::ABORTED, &message);
            }
            Some(Reservation::Requested) => {
                let source = self.source();
                let message =
                    format!("Before anything was asked of {source}, {why}. VM {} runs on there.", self.vm);
                self.status.reservation = Some(Reservation::ReleasingNeverStarted);
                self.end_badly(MigrationPhase::RolledBack, reason::ABORTED, &message);
            }
            Some(_) => {
                let source = self.source();
                let message = format!("Between two attempts, {why}. VM {} runs on at {source}.", self.vm);
                let attempts = self.status.attempts.clone();
                self.status.next_attempt_time = None;
                self.end_badly(MigrationPhase::RolledBack, reason::ABORTED, &message);
                // No attempt was under way that could have ended by this.
                self.status.attempts = attempts;
            }
        }
    }
}
