//! The source of an agent that has restarted, from what the one before it had recorded.

use super::progress::Vcpus;
use super::{Effect, Phase, Source};
use crate::policy::{Driver, StopPlan};
use crate::state::{Features, MigrationState};
use crate::{Failure, Record};

/// What an agent that has restarted finds of a source.
#[derive(Clone, Debug)]
pub struct Found {
    /// The last record of the agent before.
    pub record: Record,
    /// Where each device was read back; `None` if it could not be read. Empty if the VMM's process is gone.
    pub devices: Vec<Option<MigrationState>>,
    /// The VMM's process has ended.
    pub vmm_gone: bool,
    /// Why the migration is given up, if it is.
    pub failure: Failure,
}

impl Source {
    /// A source whose agent has restarted. The streams of the agent before have died with it, so before the
    /// commit there is only the way back.
    pub fn recover(features: &[Features], plan: StopPlan, driver: Driver, found: Found) -> Self {
        let Found { record, devices, vmm_gone, failure } = found;
        let mut source = Self::new(features, plan, driver);
        for (index, found) in devices.iter().enumerate() {
            match found {
                Some(state) => source.devices.read_back(index, *state),
                None => source.devices.mark_broken(index),
            }
        }
        // Whether they run is not known; to resume a VM, the VMM is asked first.
        source.vmm.vcpus = Vcpus::Paused;
        source.vmm.touched = true;
        source.vmm.gone = vmm_gone;
        source.recovered = Some(record);
        source.failure = Some(failure);
        source
    }

    pub(super) fn go_on_from(&mut self, record: Record, effects: &mut Vec<Effect>) {
        self.recorded.insert(record);
        match record {
            Record::Committed => {
                self.failure = None;
                self.peer.asking = true;
                self.enter(Phase::AwaitingStarted, effects);
                effects.push(Effect::AskPeer);
            }
            Record::Released => {
                self.failure = None;
                self.enter(Phase::Releasing, effects);
            }
            Record::Aborted => {
                self.enter(Phase::Settling, effects);
                effects.push(Effect::CloseStreams);
            }
            _ => {
                let failure = self.take_failure();
                self.settle(failure, effects);
            }
        }
    }
}
