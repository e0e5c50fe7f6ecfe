//! The source's half of the hand-over, pure.
//!
//! [`Source::step`] takes an event into account and then goes as far as what is known allows. Two rules carry
//! it: a phase is left only when every device has been *read back* where the phase wants it, and before the
//! point of no return any failure leads to [`Phase::Settling`], from which the rollback starts when nothing
//! is in flight any more.
//!
//! ```text
//! New ▶ Saving ▶ Connecting ▶ PreCopying ▶ Pausing ▶ Quiescing ▶ Stopping ▶ Capturing ▶ Committing
//!          └─────────┴────────────┴───────────┴──────────┴───────────┴──────────┘           ▼
//!                                     │ any failure          AwaitingStarted ▶ Releasing ▶ Finished
//!                                     ▼                             │ DISCARDED at the destination
//!                                  Settling ◀───────────────────────┘
//!                                     ▼
//!                   LeavingCapture ▶ WakingP2p ▶ Mending ▶ Waking ▶ Resuming ▶ Finished
//! ```
//!
//! A device that hangs on the way back holds up nothing else: the streams are closed, ABORTED is recorded, and
//! the other devices come as far as WakingP2p, where they wait for it. When it answers, it catches up with
//! them, by way of LeavingCapture if it has to.
//!
//! A peer that is lost after the commit settles nothing: the source asks what it has journalled until that is
//! known.

mod events;
mod progress;
mod recovery;
mod rollback;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

pub use self::events::{Effect, End, Event, Phase};
use self::progress::{PeerProgress, SaveProgress, Streams, Vcpus, VmmProgress};
pub use self::recovery::Found;

use crate::devices::{Devices, Track};
use crate::policy::{Driver, StopPlan};
use crate::state::{Features, MigrationState};
use crate::{Failure, Reason, Record, Word, blobs};

/// The source of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    phase: Phase,
    plan: StopPlan,
    driver: Driver,
    devices: Devices,
    vmm: VmmProgress,
    save: SaveProgress,
    streams: Streams,
    peer: PeerProgress,
    recorded: BTreeSet<Record>,
    /// Devices that had to be reset on the way back.
    reset: BTreeSet<usize>,
    /// Devices that were found reset while the guest stood still.
    forgetful: BTreeSet<usize>,
    /// The last record of the agent before, if this one has restarted.
    recovered: Option<Record>,
    failure: Option<Failure>,
}

impl Source {
    /// A source whose devices, with these features and driven by `driver`, have all been read back in
    /// RUNNING.
    pub fn new(features: &[Features], plan: StopPlan, driver: Driver) -> Self {
        Self {
            phase: Phase::New,
            plan,
            driver,
            devices: Devices::new(features, MigrationState::Running),
            vmm: VmmProgress::default(),
            save: SaveProgress::default(),
            streams: Streams::default(),
            peer: PeerProgress::default(),
            recorded: BTreeSet::new(),
            reset: BTreeSet::new(),
            forgetful: BTreeSet::new(),
            recovered: None,
            failure: None,
        }
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the point of no return has passed.
    pub fn committed(&self) -> bool {
        matches!(self.phase, Phase::Committing | Phase::AwaitingStarted | Phase::Releasing)
            || (self.phase == Phase::Finished
                && self.recorded.contains(&Record::Committed)
                && !self.recorded.contains(&Record::Aborted))
    }

    /// Why it is being given up, if it is.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// It keeps the VM for good, and does not let it run yet: a device hangs.
    pub fn waits_for_a_device(&self) -> bool {
        let way_back = matches!(
            self.phase,
            Phase::Settling | Phase::LeavingCapture | Phase::WakingP2p | Phase::Mending | Phase::Waking
        );
        way_back && self.recorded.contains(&Record::Aborted) && self.devices.hanging().is_some()
    }

    /// Takes an event into account. An event that comes too late to matter changes nothing.
    #[must_use]
    pub fn step(mut self, event: Event) -> (Self, Vec<Effect>) {
        let mut effects = Vec::new();
        if self.phase != Phase::Finished {
            self.absorb(event, &mut effects);
            while self.advance(&mut effects) {}
        }
        (self, effects)
    }

    fn absorb(&mut self, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Start if self.phase == Phase::New => match self.recovered {
                Some(record) => self.go_on_from(record, effects),
                None => {
                    self.enter(Phase::Saving, effects);
                    effects.push(Effect::Record(Record::Saving));
                }
            },
            Event::Start => {}
            Event::PeerReady => self.peer.ready = true,
            Event::SaveStarted => self.save.started = true,
            Event::Converged => self.save.converged = true,
            Event::DeviceReached(index, state) => {
                self.devices.read_back(index, state);
                if self.phase == Phase::PreCopying && state == MigrationState::PreCopy {
                    effects.push(Effect::PreCopy(index));
                }
                if self.phase == Phase::Stopping && !stopped(self.driver, state) {
                    self.fail(not_at_slack_water(index, state), effects);
                }
            }
            Event::DeviceFailed(index, found, failure) => self.device_failed(index, found, failure, effects),
            Event::DeviceHangs(index, failure) => self.device_hangs(index, failure, effects),
            Event::DeviceAnswers(index) => self.devices.answered(index),
            Event::PeerDoubts(failure) => {
                if matches!(self.phase, Phase::Capturing | Phase::AwaitingStarted) {
                    self.peer.doubt = Some(failure.reason.clone());
                    effects.push(Effect::Doubt(failure));
                }
            }
            Event::PreCopied(index) => {
                self.streams.pre_copied.insert(index);
            }
            Event::Paused => self.vmm.vcpus = Vcpus::Paused,
            Event::BlobSent(blob) => {
                self.streams.sent.insert(blob);
            }
            Event::SaveFinished => self.save.finished = true,
            Event::Loaded => self.peer.loaded = true,
            Event::Recorded(record) => {
                self.recorded.insert(record);
                if (record, self.phase) == (Record::Aborted, Phase::Settling) {
                    let why = self.failure.as_ref().map(|failure| failure.message.clone());
                    effects.push(Effect::SendAbort(why.unwrap_or_else(|| rollback::vmm_exited().message)));
                }
            }
            Event::RecordFailed(record, failure) => self.record_failed(record, failure, effects),
            Event::PeerSays(word) => {
                if self.peer_says(word, effects) {
                    effects.push(Effect::AskPeer);
                }
            }
            Event::Relayed(word) => {
                self.peer_says(word, effects);
            }
            Event::PeerSilent(failure) => {
                if self.phase == Phase::AwaitingStarted {
                    self.doubt(Failure::new(Reason::PeerLost, failure.message), effects);
                    effects.push(Effect::AskPeer);
                }
            }
            Event::StartOverdue(failure) => {
                if self.phase == Phase::AwaitingStarted && self.peer.doubt.is_none() {
                    self.doubt(failure, effects);
                }
            }
            Event::Started => self.started(effects),
            Event::Released => {
                if self.phase == Phase::Releasing {
                    self.finish(End::Succeeded, effects);
                }
            }
            Event::StreamsClosed => self.streams.closed = true,
            Event::Resumed => {
                self.vmm.vcpus = Vcpus::Running;
                if self.phase == Phase::Resuming {
                    self.finish_rollback(effects);
                }
            }
            Event::Failed(failure) => self.fail(failure, effects),
            Event::PauseFailed(failure) => {
                self.vmm.vcpus = Vcpus::Paused;
                self.fail(failure, effects);
            }
            // It was never paused, so it runs, as long as its process lives. A VMM that drives its devices
            // stops its vCPUs by itself.
            Event::ResumeFailed(_)
                if self.driver == Driver::Agent && self.vmm.vcpus == Vcpus::Running && !self.vmm.gone =>
            {
                self.finish_rollback(effects);
            }
            Event::ResumeFailed(failure) => self.rollback_failed(failure, effects),
            Event::VmmExited => {
                self.vmm.gone = true;
                if self.vmm.vcpus == Vcpus::Pausing {
                    self.vmm.vcpus = Vcpus::Paused;
                }
                // The failure of a call may have been noticed first: this is its cause. And a VM whose
                // devices hung would have come back.
                let known = [Reason::VmmFailed, Reason::VmStopped, Reason::DeviceHangs];
                self.failure.take_if(|failure| known.contains(&failure.reason));
                // Once the destination has all of it, going on saves the VM.
                if !(self.phase == Phase::Capturing && self.all_sent() && self.vmm_has_let_go()) {
                    self.fail(rollback::vmm_exited(), effects);
                }
            }
        }
    }

    /// Before the commit: the rollback begins. After it only the destination's journal settles anything.
    fn fail(&mut self, failure: Failure, effects: &mut Vec<Effect>) {
        match self.phase {
            Phase::New => self.finish(End::Refused(failure), effects),
            Phase::Saving
            | Phase::Connecting
            | Phase::PreCopying
            | Phase::Pausing
            | Phase::Quiescing
            | Phase::Stopping
            | Phase::Capturing => self.settle(failure, effects),
            Phase::AwaitingStarted => match failure.reason {
                // What happens to this end changes nothing any more.
                Reason::TimedOut | Reason::Aborted | Reason::VmmFailed | Reason::VmmExited => {}
                _ if self.peer.asking => {}
                _ => {
                    self.peer.asking = true;
                    if failure.reason == Reason::PeerLost {
                        self.doubt(failure, effects);
                    }
                    effects.push(Effect::AskPeer);
                }
            },
            // It takes effect when COMMITTED is on stable storage.
            Phase::Committing => self.failure = self.failure.take().or(Some(failure)),
            // A rollback is under way, or there is only forward.
            Phase::Releasing
            | Phase::Settling
            | Phase::LeavingCapture
            | Phase::WakingP2p
            | Phase::Mending
            | Phase::Waking
            | Phase::Resuming
            | Phase::Finished => {}
        }
    }

    fn started(&mut self, effects: &mut Vec<Effect>) {
        if self.phase == Phase::AwaitingStarted {
            self.phase = Phase::Releasing;
            effects.extend([Effect::Report(Phase::Releasing), Effect::Record(Record::Released)]);
        }
    }

    /// Acts on what the destination has journalled. Before the commit, and after STARTED, that changes
    /// nothing. True if it settles nothing.
    fn peer_says(&mut self, word: Word, effects: &mut Vec<Effect>) -> bool {
        if self.phase != Phase::AwaitingStarted {
            return false;
        }
        let failed =
            |reason, message: &str| word.failure.clone().unwrap_or_else(|| Failure::new(reason, message));
        match word.record {
            Some(Record::Running) => self.started(effects),
            Some(Record::Discarded) => {
                let mut failure =
                    failed(Reason::TargetFailed, "the destination has given the VM up before it started");
                if let Some(why) = &word.stated_because {
                    failure.message =
                        format!("an administrator states that the destination never started the VM: {why}");
                }
                self.settle(failure, effects);
            }
            Some(Record::Starting) if word.ended => {
                let failure = failed(Reason::StartFailed, "the destination could not start the VM");
                self.finish(End::Lost(Failure::new(Reason::StartFailed, failure.message)), effects);
            }
            record => {
                let (reason, message) = match record {
                    None => {
                        (Reason::TargetForgot, "the destination has no journal of this migration any more")
                    }
                    // It says what it waits for.
                    Some(_) if matches!(&word.failure, Some(why) if why.reason == Reason::DeviceHangs) => {
                        self.doubt(failed(Reason::DeviceHangs, ""), effects);
                        return true;
                    }
                    Some(_) => {
                        (Reason::TargetSlow, "the destination answers, and has not started the VM yet")
                    }
                };
                if self.peer.doubt.is_some() || reason == Reason::TargetForgot {
                    self.doubt(Failure::new(reason, message), effects);
                }
                return true;
            }
        }
        false
    }

    fn record_failed(&mut self, record: Record, failure: Failure, effects: &mut Vec<Effect>) {
        match (record, self.phase) {
            (Record::Saving, Phase::Saving) => self.finish(End::Refused(failure), effects),
            // The journal may hold it all the same. Nothing resumes before the journal holds ABORTED.
            (Record::Committed, Phase::Committing) => self.settle(failure, effects),
            (Record::Aborted, Phase::Settling) | (Record::Released, Phase::Releasing) => {
                self.doubt(failure, effects);
                effects.push(Effect::RecordAgain(record));
            }
            _ => {}
        }
    }

    /// Reports what keeps the migration from its end, once.
    fn doubt(&mut self, failure: Failure, effects: &mut Vec<Effect>) {
        if self.peer.doubt.as_ref() != Some(&failure.reason) {
            self.peer.doubt = Some(failure.reason.clone());
            effects.push(Effect::Doubt(failure));
        }
    }

    fn device_failed(
        &mut self,
        index: usize,
        found: Option<MigrationState>,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        // It was last moved while its guest ran: the guest has reset it, and knows.
        let by_its_guest = failure.reason == Reason::DeviceReset
            && self.devices.left_in(index).is_some_and(|at| at == MigrationState::PreCopy);
        match found {
            Some(state) => self.devices.read_back(index, state),
            None => self.devices.mark_broken(index),
        }
        match self.phase {
            Phase::LeavingCapture | Phase::WakingP2p => self.devices.mark_broken(index),
            // It is where it was to go.
            Phase::Waking if by_its_guest && found == Some(MigrationState::Running) => {}
            Phase::Mending | Phase::Waking if self.reset.contains(&index) => {
                self.devices.mark_broken(index);
                self.rollback_failed(failure, effects);
            }
            Phase::Waking => {
                self.devices.mark_broken(index);
                self.order_reset(index, effects);
            }
            _ => {
                if failure.reason == Reason::DeviceReset && !by_its_guest {
                    self.forgetful.insert(index);
                }
                self.fail(failure, effects);
            }
        }
    }

    /// In the blackout a device that hangs ends the migration, or, once its state is being read, it is named
    /// and waited for. While the guest runs there is time. On the way back nothing else waits for it.
    fn device_hangs(&mut self, index: usize, failure: Failure, effects: &mut Vec<Effect>) {
        if !self.devices.hang(index, failure.clone()) {
            return;
        }
        match self.phase {
            Phase::Quiescing | Phase::Stopping => self.fail(failure, effects),
            Phase::Capturing
            | Phase::Settling
            | Phase::LeavingCapture
            | Phase::WakingP2p
            | Phase::Mending
            | Phase::Waking => self.name_what_hangs(effects),
            _ => {}
        }
    }

    /// Leaves the phase if all it waits for is there. True if it did.
    fn advance(&mut self, effects: &mut Vec<Effect>) -> bool {
        match self.phase {
            Phase::Saving if self.recorded.contains(&Record::Saving) => {
                self.phase = Phase::Connecting;
                effects.push(Effect::Connect);
            }
            Phase::Connecting if self.peer.ready => {
                self.vmm.touched = true;
                self.enter(Phase::PreCopying, effects);
                effects.push(Effect::StartSave);
                let uses = self.plan != StopPlan::StopFirst && self.driver == Driver::Agent;
                self.order(effects, |track| {
                    (uses && track.features.pre_copy).then_some(MigrationState::PreCopy)
                });
            }
            Phase::PreCopying if self.save.started && self.driver == Driver::Vmm && !self.save.converging => {
                self.save.converging = true;
                effects.push(Effect::Converge);
            }
            Phase::PreCopying if self.save.started && self.devices.settled() && self.all_pre_copied() => {
                self.vmm.vcpus = Vcpus::Pausing;
                self.enter(Phase::Pausing, effects);
                effects.push(Effect::Pause);
            }
            Phase::Pausing if self.vmm.vcpus == Vcpus::Paused => {
                self.enter(Phase::Quiescing, effects);
                let plan = self.plan;
                if self.driver == Driver::Agent {
                    self.order(effects, |track| barrier_state(plan, track));
                }
            }
            Phase::Quiescing if self.quiesced() => {
                self.enter(Phase::Stopping, effects);
                self.order(effects, |_| Some(MigrationState::StopCopy));
            }
            Phase::Stopping if self.devices.all_at(|state| stopped(self.driver, state)) => {
                self.enter(Phase::Capturing, effects);
                effects.push(Effect::FinishSave);
                effects.extend((0..self.device_blobs()).map(Effect::Capture));
            }
            Phase::Capturing if self.peer.loaded && self.all_sent() && self.vmm_has_let_go() => {
                self.phase = Phase::Committing;
                effects.push(Effect::Record(Record::Committed));
            }
            Phase::Committing if self.recorded.contains(&Record::Committed) => {
                self.peer.doubt = None;
                self.enter(Phase::AwaitingStarted, effects);
                effects.push(Effect::SendCommit);
                if let Some(failure) = self.failure.take() {
                    self.fail(failure, effects);
                }
            }
            Phase::Releasing if self.recorded.remove(&Record::Released) => effects.push(Effect::Release),
            Phase::Settling
            | Phase::LeavingCapture
            | Phase::WakingP2p
            | Phase::Mending
            | Phase::Waking
            | Phase::Resuming => return self.advance_rollback(effects),
            _ => return false,
        }
        true
    }

    fn all_pre_copied(&self) -> bool {
        let device = |(index, track): (usize, &Track)| {
            track.at != MigrationState::PreCopy || self.streams.pre_copied.contains(&index)
        };
        match self.driver {
            Driver::Agent => self.devices.iter().all(device),
            Driver::Vmm => self.save.converged,
        }
    }

    /// A VMM that drives its devices has quiesced them before it says that it is ready.
    fn quiesced(&self) -> bool {
        self.driver == Driver::Vmm || self.devices.all_at(|state| at_barrier(self.plan, state))
    }

    fn device_blobs(&self) -> usize {
        self.driver.device_blobs(self.devices.len())
    }

    fn all_sent(&self) -> bool {
        blobs(self.device_blobs()).all(|blob| self.streams.sent.contains(&blob))
    }

    /// The VM cannot run here any more, except after a rollback. A VMM that drives its devices may have taken
    /// it back, and let its guest run, before it ended: only its own word excludes that.
    fn vmm_has_let_go(&self) -> bool {
        self.save.finished || (self.vmm.gone && self.driver == Driver::Agent)
    }

    /// Starts a step of all devices. One that its VMM drives is only looked at: it should be there, or be on
    /// its way by itself.
    /// True if there is a device that has to move.
    fn order(
        &mut self,
        effects: &mut Vec<Effect>,
        target: impl Fn(&Track) -> Option<MigrationState>,
    ) -> bool {
        let driver = self.driver;
        let moves = self.devices.order(target);
        let any = !moves.is_empty();
        effects.extend(moves.into_iter().map(|ordered| match driver {
            Driver::Agent => Effect::SetState(ordered),
            Driver::Vmm => Effect::ReadState(ordered.index),
        }));
        any
    }

    fn enter(&mut self, phase: Phase, effects: &mut Vec<Effect>) {
        self.phase = phase;
        effects.push(Effect::Report(phase));
    }

    fn finish(&mut self, end: End, effects: &mut Vec<Effect>) {
        self.phase = Phase::Finished;
        effects.push(Effect::Finish(end));
    }
}

/// The gate: nothing of the VM is captured.
fn not_at_slack_water(index: usize, state: MigrationState) -> Failure {
    let message = format!(
        "at the source, the VM's device {index} was read back in {} when all of them should have been \
         stopped, so nothing was captured",
        state.name()
    );
    Failure::new(Reason::DeviceFailed, message)
}

/// Whether a device is at slack water. QEMU leaves a device without pre-copy in STOP until it reads its
/// state.
fn stopped(driver: Driver, state: MigrationState) -> bool {
    state == MigrationState::StopCopy || (driver == Driver::Vmm && state == MigrationState::Stop)
}

/// Where a device waits for the others before any of them gives up its state.
fn barrier_state(plan: StopPlan, track: &Track) -> Option<MigrationState> {
    match plan {
        StopPlan::QuiesceFirst if track.at == MigrationState::PreCopy => Some(MigrationState::PreCopyP2p),
        StopPlan::QuiesceFirst => Some(MigrationState::RunningP2p),
        StopPlan::StopFirst => Some(MigrationState::Stop),
        StopPlan::Alone => None,
    }
}

fn at_barrier(plan: StopPlan, state: MigrationState) -> bool {
    match plan {
        StopPlan::QuiesceFirst => matches!(state, MigrationState::RunningP2p | MigrationState::PreCopyP2p),
        StopPlan::StopFirst => state == MigrationState::Stop,
        StopPlan::Alone => true,
    }
}
