//! The source of an agent that has begun again, from what the one before it had recorded.

use super::{Effect, Phase, Source, Vcpus};
use crate::policy::StopPlan;
use crate::state::{Features, MigrationState};
use crate::{Failure, Record};

impl Source {
    /// A source at `record`, whose devices have been read back in `found` (None: they could not be read). `failure` is why
    /// the migration is given up, if it is; `vmm_gone` tells that the VMM's process has ended, and there are no devices.
    ///
    /// The streams of the agent before have died with it, so before the commit there is only the way back.
    pub fn recover(
        features: &[Features],
        found: &[Option<MigrationState>],
        plan: StopPlan,
        record: Record,
        failure: Failure,
        vmm_gone: bool,
    ) -> Self {
        let mut source = Self::new(features, plan);
        for (index, found) in found.iter().enumerate() {
            match found {
                Some(state) => source.devices.read_back(index, *state),
                None => source.devices.mark_broken(index),
            }
        }
        // Whether they run is not known; to resume a VM, the VMM is asked first.
        source.vcpus = Vcpus::Paused;
        source.touched = true;
        source.vmm_gone = vmm_gone;
        source.recovered = Some(record);
        source.failure = Some(failure);
        source
    }

    pub(super) fn go_on_from(&mut self, record: Record, effects: &mut Vec<Effect>) {
        self.recorded.insert(record);
        match record {
            Record::Committed => {
                self.failure = None;
                self.asking = true;
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
