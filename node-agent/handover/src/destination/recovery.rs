//! The destination of an agent that has restarted, from what the one before it had recorded.

use super::{Destination, Effect, End, Phase};
use crate::policy::Driver;
use crate::state::{Features, MigrationState};
use crate::{Failure, Reason, Record};

/// What an agent that has restarted finds of a destination.
#[derive(Clone, Debug)]
pub struct Found {
    /// The last record of the agent before.
    pub record: Record,
    /// Where each device was read back; `None` if it could not be read. Empty if the twin's process is gone.
    pub devices: Vec<Option<MigrationState>>,
    /// The twin's process is there, and is the one that was started.
    pub twin_there: bool,
    /// Why the reservation is given up, if it is.
    pub failure: Failure,
}

impl Destination {
    /// A destination whose agent has restarted.
    pub fn recover(features: &[Features], driver: Driver, found: Found) -> Self {
        let Found { record, devices, twin_there, failure } = found;
        let mut destination = Self::new(features, driver);
        for (index, found) in devices.iter().enumerate() {
            match found {
                Some(state) => destination.devices.read_back(index, *state),
                None => destination.devices.mark_broken(index),
            }
        }
        destination.recovered = Some((record, twin_there));
        destination.failure = Some(failure);
        destination
    }

    pub(super) fn go_on_from(&mut self, record: Record, twin_there: bool, effects: &mut Vec<Effect>) {
        self.recorded.insert(record);
        let failure = self.failure.take().unwrap_or_else(|| {
            Failure::new(Reason::AgentRestarted, "the destination's agent was started again")
        });
        let gone = |reason| Failure::new(reason, "the twin's process is gone");
        match record {
            Record::Loaded if !twin_there => self.discard(gone(Reason::TwinFailed), effects),
            Record::Loaded if self.devices.all_at(|state| state == MigrationState::Stop) => {
                self.enter(Phase::Loaded, effects);
            }
            Record::Starting if !twin_there => self.stuck(gone(Reason::StartFailed), effects),
            Record::Starting if self.devices.iter().any(|(_, track)| track.broken) => {
                let message = "a device of the twin is in ERROR, or cannot be read";
                self.stuck(Failure::new(Reason::StartFailed, message), effects);
            }
            Record::Starting => {
                self.enter(Phase::Starting, effects);
                effects.push(Effect::ActivateIdentity);
            }
            Record::Running => self.finish(End::Running, effects),
            Record::Discarded => {
                self.enter(Phase::Discarding, effects);
                effects.push(Effect::Discard);
                self.failure = Some(failure);
            }
            // Before LOADED its streams have died with the agent; or a device has left STOP without an order
            // from here.
            _ => self.discard(failure, effects),
        }
    }
}
