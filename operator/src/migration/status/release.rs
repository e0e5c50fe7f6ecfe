//! Giving the target's reservation back.

use slackwater_api::Reservation;
use slackwater_api::condition::PREPARED;

use super::Draft;
use crate::conditions::Status;
use crate::migration::request::silence_timeout;
use crate::migration::step::Wish;

impl Draft {
    /// The target has given back what it reserved.
    pub fn target_released(&mut self, message: &str) {
        self.status.reservation = Some(Reservation::Released);
        // A failed reservation keeps its reason: that is what the user has to know.
        if !self.is(PREPARED, Status::False) {
            self.set(PREPARED, Status::False, "Released", message);
        }
        self.status.observed_generation = self.stamp.generation;
        if self.status.completion_time.is_none() && self.wish == Wish::Migrate {
            self.schedule_next_attempt();
        }
    }

    /// The target could not be asked to give back what it reserved; it is asked again.
    pub fn release_failed(&mut self, error: &str) {
        let message = format!(
            "{} could not be asked to give back what it reserved: {error}. It is asked again until it answers; if \
             it hears nothing from the source, it gives the devices back by itself after {}.",
            self.target(),
            silence_timeout()
        );
        self.set(PREPARED, Status::Unknown, "Releasing", &message);
    }

    /// The target says that it must not give back what it reserved: the VM may have run there.
    pub fn release_refused(&mut self, error: &str) {
        let message = format!(
            "{} keeps what it reserved: {error}. Yet {} has given the migration up. Look where VM {} runs, and end \
             the other copy before anything else.",
            self.target(),
            self.source(),
            self.vm
        );
        self.status.reservation = Some(Reservation::Kept);
        self.set(PREPARED, Status::Unknown, "ReleaseRefused", &message);
        self.warn("ReleaseRefused", message);
    }
}
