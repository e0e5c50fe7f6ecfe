//! The rules that are checked at the moment of an action.

use slackwater_handover::Record;
use slackwater_handover::policy::StopPlan;
use slackwater_handover::state::MigrationState;

use crate::properties::Rule;
use crate::world::{Config, Device, Process, Said, Side, World};

impl World {
    /// The agent of the source lets something run again.
    pub(crate) fn wake(&mut self) {
        if !self.source.has_recorded(self.source.attempt, Record::Aborted) {
            self.broken.insert(Rule::AbortedFirst);
        }
        self.wakes_at_source();
    }

    /// Something of the VM runs again at the source.
    pub(crate) fn wakes_at_source(&mut self) {
        if self.source_is_dead() {
            self.broken.insert(Rule::NoFork);
        }
        self.woken = self.woken.max(self.source.attempt);
    }

    /// Something at the destination is about to run.
    pub(crate) fn start_something(&mut self) {
        let attempt = self.destination.attempt;
        self.started.insert(attempt);
        self.check_never_started(attempt);
        if !self.destination.has_recorded(attempt, Record::Starting) {
            self.broken.insert(Rule::StartingFirst);
        }
    }

    /// The operator has not said of this attempt that the destination would never start it.
    pub(crate) fn check_never_started(&mut self, attempt: u32) {
        if self.operator.said_never_started >= attempt {
            self.broken.insert(Rule::SaidNeverStarted);
        }
    }

    /// The destination takes what has arrived for the VM.
    pub(crate) fn believe(&mut self, config: &Config) {
        if !config.blobs().all(|blob| self.verified.contains(&blob)) {
            self.broken.insert(Rule::BelievedUnverified);
        }
    }

    /// The destination is about to give everything back.
    pub(crate) fn check_giving_up(&mut self) {
        let attempt = self.destination.attempt;
        let copy_is_whole = self.loaded
            && self.destination.vmm == Process::Alive
            && [self.device_fault, self.write_fault, self.call_fault]
                .into_iter()
                .all(|fault| fault != Some(Side::Destination));
        let source_keeps_it = self.said.contains(&Said::ToDestination { attempt, record: Record::Aborted })
            || self.said.contains(&Said::Release { attempt });
        if copy_is_whole && !source_keeps_it {
            self.broken.insert(Rule::GivenUpAlone);
        }
    }
}

/// I2: nothing of `way` stops a device before every device has reached the barrier of the plan.
pub(crate) fn quiesced_together(config: &Config, devices: &[Device], way: &[MigrationState]) -> bool {
    devices.len() < 2
        || way.iter().all(|state| match config.plan {
            StopPlan::QuiesceFirst if state.is_stopped() => devices.iter().all(|device| device.quiesced),
            StopPlan::StopFirst if *state == MigrationState::StopCopy => {
                devices.iter().all(|device| device.stopped)
            }
            _ => true,
        })
}

/// I4: no device leaves STOP before all hold their state, and none enters RUNNING before all are in
/// RUNNING_P2P, where they have it. One that hangs takes nothing in and gives nothing out, so it keeps no other
/// in STOP, nor does it when it answers; but where it is nobody knows, so none is sent to RUNNING without it.
pub(crate) fn woken_together(
    config: &Config,
    devices: &[Device],
    index: usize,
    way: &[MigrationState],
) -> bool {
    let all = |holds: fn(MigrationState) -> bool, late_ones: bool| {
        let counts =
            |device: &&Device| !device.refused && device.hangs.is_none() && (late_ones || !device.late);
        devices.iter().filter(counts).all(|device| holds(device.at))
    };
    let holds_state = |at| !matches!(at, MigrationState::Resuming | MigrationState::StopCopy);
    let runs_p2p = |at: MigrationState| !at.is_stopped() && at != MigrationState::Resuming;
    let another_hangs =
        devices.iter().enumerate().any(|(other, device)| other != index && device.hangs.is_some());
    let sent_without_it = another_hangs && !devices[index].sent_to_run;
    let leaves_stop = devices[index].at == MigrationState::Stop && devices.len() > 1;
    let enters_running =
        way.contains(&MigrationState::Running) && config.features.iter().all(|features| features.p2p);
    (!leaves_stop || all(holds_state, false))
        && (!enters_running || (all(runs_p2p, true) && !sent_without_it))
}
