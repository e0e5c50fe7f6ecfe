//! The way back: from whatever has been done so far to a VM that runs here with all its devices.

use std::collections::BTreeSet;

use super::progress::Vcpus;
use super::{Effect, End, Phase, Source};
use crate::devices::Track;
use crate::policy::Driver;
use crate::state::MigrationState;
use crate::{Failure, Reason, Record};

impl Source {
    /// The migration is given up. Nothing goes back before everything in flight has ended and ABORTED is
    /// recorded.
    pub(super) fn settle(&mut self, failure: Failure, effects: &mut Vec<Effect>) {
        effects.extend([
            Effect::Report(Phase::Settling),
            Effect::CloseStreams,
            Effect::Record(Record::Aborted),
        ]);
        self.failure = Some(failure);
        self.phase = Phase::Settling;
        self.name_what_hangs(effects);
    }

    /// Reports which devices hang, and what the VM waits for. A VMM that drives its devices goes its way back
    /// without the agent's reads of them.
    pub(super) fn name_what_hangs(&mut self, effects: &mut Vec<Effect>) {
        let Some(hanging) = self.devices.hanging().filter(|_| self.driver == Driver::Agent) else { return };
        let until = if self.phase == Phase::Capturing {
            "The migration goes on when that call returns, and is given up if it has not by preCommitTimeout."
        } else if self.vmm.vcpus == Vcpus::Running {
            "The VM stays here and runs on. The rollback waits for that call to return, which a reset of the \
             device may bring about, or for the end of the VMM's process, and then goes on by itself."
        } else {
            "The VM stays here, paused, and waits for that call to return, which a reset of the device may \
             bring about, or for the end of the VMM's process; the rollback then goes on by itself."
        };
        self.peer.doubt = Some(Reason::DeviceHangs);
        effects.push(Effect::Doubt(Failure::new(Reason::DeviceHangs, format!("{hanging}. {until}"))));
    }

    /// Leaves a phase of the rollback if all it waits for is there. True if it did.
    pub(super) fn advance_rollback(&mut self, effects: &mut Vec<Effect>) -> bool {
        match self.phase {
            Phase::Settling if self.nothing_in_flight() => return self.begin_rollback(effects),
            Phase::LeavingCapture | Phase::WakingP2p | Phase::Mending | Phase::Waking
                if self.vmm.gone && self.devices.hanging().is_some() =>
            {
                self.finish(End::Lost(vmm_exited()), effects);
                return false;
            }
            Phase::LeavingCapture if self.devices.settled_but_hanging() => {
                self.phase = Phase::WakingP2p;
                self.order(effects, to_p2p);
            }
            Phase::WakingP2p if self.devices.settled_but_hanging() => {
                // One that hung, and has answered since, catches up.
                if self.order(effects, out_of_capture) {
                    self.phase = Phase::LeavingCapture;
                    return true;
                }
                if self.order(effects, to_p2p) {
                    return true;
                }
                // None runs before all are in RUNNING_P2P, or have failed and can be reset.
                if self.devices.hanging().is_some() {
                    return false;
                }
                self.phase = Phase::Mending;
                let broken: Vec<usize> =
                    self.devices.iter().filter(|(_, track)| track.broken).map(|(index, _)| index).collect();
                for index in broken {
                    self.order_reset(index, effects);
                }
            }
            Phase::Mending if self.devices.settled() => {
                self.phase = Phase::Waking;
                self.order(effects, |_| Some(MigrationState::Running));
            }
            Phase::Waking if self.devices.all_at(|state| state == MigrationState::Running) => {
                if self.vmm.touched {
                    self.resume(effects);
                } else {
                    self.finish_rollback(effects);
                }
            }
            _ => return false,
        }
        true
    }

    /// Asked even if the vCPUs were never paused: a VMM that has died since is not known of yet. One that
    /// drives its devices wakes them first.
    fn resume(&mut self, effects: &mut Vec<Effect>) {
        self.phase = Phase::Resuming;
        effects.push(Effect::Resume);
    }

    fn begin_rollback(&mut self, effects: &mut Vec<Effect>) -> bool {
        if self.vmm.gone {
            let failure = self.take_failure();
            self.finish(End::Lost(failure), effects);
            return false;
        }
        if self.driver == Driver::Vmm {
            self.resume(effects);
            return true;
        }
        self.phase = Phase::LeavingCapture;
        self.order(effects, out_of_capture);
        true
    }

    fn nothing_in_flight(&self) -> bool {
        (self.driver == Driver::Vmm || self.devices.settled_but_hanging())
            && self.vmm.vcpus != Vcpus::Pausing
            && self.streams.closed
            && self.recorded.contains(&Record::Aborted)
    }

    pub(super) fn order_reset(&mut self, index: usize, effects: &mut Vec<Effect>) {
        self.reset.insert(index);
        self.devices.expect(index, MigrationState::Running);
        effects.push(Effect::Reset(index));
    }

    pub(super) fn finish_rollback(&mut self, effects: &mut Vec<Effect>) {
        let mut failure = self.take_failure();
        let reset: BTreeSet<usize> = self.reset.union(&self.forgetful).copied().collect();
        if !reset.is_empty() {
            failure.message.push_str(&format!(
                "; the VM's devices with index {:?} had to be reset, or were, and have lost their state",
                reset
            ));
        }
        if self.driver == Driver::Vmm {
            let runs = |track: &Track| track.at == MigrationState::Running && track.hangs.is_none();
            let astray = self.devices.iter().filter(|(_, track)| !runs(track));
            for (index, track) in astray {
                let told = match &track.hangs {
                    Some(why) => format!("; whether its device {index} runs is not known: {}", why.message),
                    None => {
                        format!("; its device {index} was read back in {}", track.at.name())
                    }
                };
                failure.message.push_str(&told);
            }
        }
        self.finish(if self.vmm.touched { End::RolledBack(failure) } else { End::Refused(failure) }, effects);
    }

    pub(super) fn rollback_failed(&mut self, why: Failure, effects: &mut Vec<Effect>) {
        let first = self.take_failure();
        if self.vmm.gone {
            self.finish(End::Lost(vmm_exited()), effects);
            return;
        }
        let end = match self.driver {
            Driver::Agent if self.vmm.vcpus == Vcpus::Running => "while the VM, never paused, runs on here",
            Driver::Agent => "so the VM stays paused here",
            Driver::Vmm => "and whether its VMM has taken the VM back by itself is not known",
        };
        let message =
            format!("{}; and the rollback did not come through, {end}: {}", first.message, why.message);
        self.finish(End::Lost(Failure::new(Reason::RollbackFailed, message)), effects);
    }

    pub(super) fn take_failure(&mut self) -> Failure {
        match self.failure.take() {
            Some(failure) => failure,
            None if self.vmm.gone => vmm_exited(),
            None => Failure::new(Reason::Aborted, "the migration was given up"),
        }
    }
}

/// Nothing more is asked of a device that hangs.
fn out_of_capture(track: &Track) -> Option<MigrationState> {
    (track.at == MigrationState::StopCopy && track.hangs.is_none()).then_some(MigrationState::Stop)
}

fn to_p2p(track: &Track) -> Option<MigrationState> {
    let runs = [MigrationState::PreCopy, MigrationState::Running].contains(&track.at);
    (track.features.p2p && !runs && track.hangs.is_none()).then_some(MigrationState::RunningP2p)
}

pub(super) fn vmm_exited() -> Failure {
    let message = "the VMM's process ended while its VM was being migrated, and the VM with it";
    Failure::new(Reason::VmmExited, message)
}
