//! The destination's half of the hand-over, pure.
//!
//! ```text
//! New ▶ Recording ▶ StartingTwin ▶ Preparing ▶ Reserved ▶ Loading ▶ Finishing ▶ Verifying
//!          └──────────────┴────────────┴─────────┴──────────┴───────────┘            ▼
//!                          │ any failure, or the source is lost                RecordingLoaded
//!                          ▼                                                         ▼
//!        Finished ◀ Discarding ◀── a failure, or the source's word ────────────── Loaded
//!                          ▲                                                         │ COMMIT
//!                          │                                                         ▼
//!                          └── a failure, or the source's word ─────────────── Confirming
//!                                                                                    │ the twin answers
//!                                       only forward from here ── RecordingStarting ◀┘
//!                                                                         ▼
//!      Finished ◀ RecordingRunning ◀ Resuming ◀ Waking ◀ WakingP2p ◀ Starting
//! ```
//!
//! No device leaves RESUMING before every blob's length and digest have been verified and the VMM has loaded
//! (I5); none leaves STOP before all have left RESUMING, none enters RUNNING before all are in RUNNING_P2P,
//! and the vCPUs resume last (I4). From Loaded on nothing is discarded on the destination's own judgement;
//! from Starting on, nothing is discarded at all.

mod events;
mod recovery;

use std::collections::BTreeSet;

pub use self::events::{Effect, End, Event, Phase};
pub use self::recovery::Found;

use crate::devices::{Devices, Track};
use crate::policy::Driver;
use crate::state::{Features, MigrationState};
use crate::{Blob, Failure, Reason, Record, blobs};

/// How often a device is ordered to start before that counts as refused: from STARTING on there is no way
/// back.
const START_TRIES: u32 = 3;

/// The destination of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    phase: Phase,
    driver: Driver,
    devices: Devices,
    verified: BTreeSet<Blob>,
    recorded: BTreeSet<Record>,
    peer_connected: bool,
    load_finished: bool,
    identity_active: bool,
    resumed: bool,
    start_failures: u32,
    given_back: bool,
    twin_confirmed: bool,
    /// The twin is being started: nothing of it can be cleared away before that has ended.
    twin_pending: bool,
    /// The last record of the agent before, if this one has restarted, and whether the twin is still there.
    recovered: Option<(Record, bool)>,
    failure: Option<Failure>,
}

impl Destination {
    /// A destination for devices with these features, driven by `driver`, which are in RUNNING when the twin
    /// has opened them.
    pub fn new(features: &[Features], driver: Driver) -> Self {
        Self {
            phase: Phase::New,
            driver,
            devices: Devices::new(features, MigrationState::Running),
            verified: BTreeSet::new(),
            recorded: BTreeSet::new(),
            peer_connected: false,
            load_finished: false,
            identity_active: false,
            resumed: false,
            start_failures: 0,
            given_back: false,
            twin_confirmed: false,
            twin_pending: false,
            recovered: None,
            failure: None,
        }
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Why it is being given up, if it is.
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// Whether the twin may have run something: nothing may be discarded any more.
    pub fn may_have_run(&self) -> bool {
        match self.phase {
            Phase::RecordingStarting
            | Phase::Starting
            | Phase::WakingP2p
            | Phase::Waking
            | Phase::Resuming
            | Phase::RecordingRunning => true,
            Phase::Finished => !self.given_back,
            _ => false,
        }
    }

    /// Whether blobs may arrive.
    pub fn takes_blobs(&self) -> bool {
        matches!(self.phase, Phase::Reserved | Phase::Loading)
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
                Some((record, twin_there)) => self.go_on_from(record, twin_there, effects),
                None => {
                    self.phase = Phase::Recording;
                    effects.push(Effect::Record(Record::Reserved));
                }
            },
            Event::Start => {}
            Event::TwinReady => {
                self.twin_answered(effects);
                if self.phase == Phase::StartingTwin {
                    self.enter(Phase::Preparing, effects);
                    if self.driver == Driver::Agent {
                        self.order(effects, |_| Some(MigrationState::Resuming));
                    }
                }
            }
            Event::DeviceReached(index, state) => self.devices.read_back(index, state),
            Event::DeviceFailed(index, found, failure) => self.device_failed(index, found, failure, effects),
            Event::DeviceHangs(index, failure) => self.device_hangs(index, failure, effects),
            Event::DeviceAnswers(index) => self.devices.answered(index),
            Event::PeerConnected => self.peer_connected = true,
            Event::BlobVerified(blob) => {
                self.verified.insert(blob);
            }
            Event::LoadFinished => self.load_finished = true,
            Event::Recorded(record) => {
                self.recorded.insert(record);
                if let (Record::Discarded, Some(failure)) = (record, &self.failure) {
                    effects.push(Effect::SendFailed(failure.clone()));
                }
            }
            Event::RecordFailed(record, failure) => self.record_failed(record, failure, effects),
            Event::CommitReceived => self.commit(effects),
            Event::PeerSays(word) => match word.record {
                Some(Record::Committed) => self.commit(effects),
                Some(Record::Aborted) if !self.may_have_run() => {
                    let failure = word
                        .failure
                        .unwrap_or_else(|| Failure::new(Reason::Released, "the source keeps the VM"));
                    self.discard(failure, effects);
                }
                _ => {}
            },
            Event::AbortReceived(failure) => {
                if !self.may_have_run() {
                    self.discard(failure, effects);
                }
            }
            Event::PeerLost(failure) => {
                if self.before_loaded() {
                    self.discard(failure, effects);
                }
            }
            Event::TwinConfirmed => self.twin_confirmed = true,
            Event::IdentityActivated => self.identity_active = true,
            Event::Resumed => self.resumed = true,
            Event::Failed(failure) => {
                self.twin_answered(effects);
                self.fail(failure, effects);
            }
            Event::Discarded => self.given_back = true,
        }
    }

    fn before_loaded(&self) -> bool {
        let loaded = [Phase::RecordingLoaded, Phase::Loaded, Phase::Confirming, Phase::Discarding];
        !loaded.contains(&self.phase) && !self.may_have_run()
    }

    fn device_failed(
        &mut self,
        index: usize,
        found: Option<MigrationState>,
        failure: Failure,
        effects: &mut Vec<Effect>,
    ) {
        let wanted = self.devices.wanted(index);
        match found {
            Some(state) => self.devices.read_back(index, state),
            None => self.devices.mark_broken(index),
        }
        self.start_failures += u32::from(self.may_have_run());
        match (wanted, found) {
            (Some(to), Some(state))
                if self.may_have_run()
                    && state != MigrationState::Error
                    && self.start_failures < START_TRIES =>
            {
                // It can only go on, without the state that it had loaded.
                if failure.reason == Reason::DeviceReset {
                    effects.push(Effect::Doubt(failure));
                }
                effects.extend(self.devices.order_again(index, to).map(Effect::SetState));
            }
            _ => self.fail(failure, effects),
        }
    }

    /// Nothing depends on a device before the reservation is confirmed. After that it is named and waited for:
    /// before LOADED the source gives up when its time has passed, and from STARTING on there is only
    /// forward.
    fn device_hangs(&mut self, index: usize, failure: Failure, effects: &mut Vec<Effect>) {
        if !self.devices.hang(index, failure.clone()) {
            return;
        }
        let until = match self.phase {
            Phase::Preparing => return self.fail(failure, effects),
            Phase::Loading | Phase::Finishing | Phase::Verifying => {
                "The migration goes on when that call returns, and is given up if it has not by \
                 preCommitTimeout."
            }
            Phase::WakingP2p | Phase::Waking => {
                "The VM is paused, and starts when that call returns, which a reset of the device may bring \
                 about; if the twin's process ends before, the VM is lost."
            }
            Phase::Discarding => "The reservation is given back; the device is free when that call returns.",
            _ => return,
        };
        effects
            .push(Effect::Doubt(Failure::new(Reason::DeviceHangs, format!("{}. {until}", failure.message))));
    }

    fn fail(&mut self, failure: Failure, effects: &mut Vec<Effect>) {
        match self.phase {
            // The VM has run here, and that is what is being recorded. The inventory shows that it does not
            // run any more.
            Phase::RecordingRunning => {}
            // The journal shows in a moment whether it holds STARTING, and that decides.
            Phase::RecordingStarting => self.failure = self.failure.take().or(Some(failure)),
            _ if self.may_have_run() => self.stuck(failure, effects),
            _ => self.discard(failure, effects),
        }
    }

    /// A twin may have died a moment ago, unnoticed so far. After STARTING that costs the VM; before it, the
    /// source still has it.
    fn commit(&mut self, effects: &mut Vec<Effect>) {
        if self.phase == Phase::Loaded {
            self.enter(Phase::Confirming, effects);
            effects.push(Effect::ConfirmTwin);
        }
    }

    fn record_failed(&mut self, record: Record, failure: Failure, effects: &mut Vec<Effect>) {
        match (record, self.phase) {
            // Nothing has been touched.
            (Record::Reserved, Phase::Recording) => {
                self.given_back = true;
                self.finish(End::Discarded(failure), effects);
            }
            (Record::Loaded, Phase::RecordingLoaded) => self.discard(failure, effects),
            // The journal does not hold it, nothing has been started, and there is nothing left to start.
            (Record::Starting, Phase::RecordingStarting) if self.failure.is_some() => {
                let failure = self.failure.take().unwrap_or(failure);
                self.discard(failure, effects);
            }
            (Record::Starting, Phase::RecordingStarting)
            | (Record::Running, Phase::RecordingRunning)
            | (Record::Discarded, Phase::Discarding) => effects.push(Effect::RecordAgain(record)),
            _ => {}
        }
    }

    /// From STARTING on there is only forward, and forward it does not go.
    fn stuck(&mut self, failure: Failure, effects: &mut Vec<Effect>) {
        let failure = Failure::new(Reason::StartFailed, failure.message);
        effects.push(Effect::SendFailed(failure.clone()));
        self.finish(End::Stuck(failure), effects);
    }

    /// Nothing has started: all that was reserved is given back. The source hears of it when the journal
    /// holds that.
    fn discard(&mut self, failure: Failure, effects: &mut Vec<Effect>) {
        if self.phase != Phase::Discarding {
            self.enter(Phase::Discarding, effects);
            effects.push(Effect::Record(Record::Discarded));
            if !self.twin_pending {
                effects.push(Effect::Discard);
            }
            self.failure = Some(failure);
        }
    }

    /// The twin is there, or is not: what a discard has waited for.
    fn twin_answered(&mut self, effects: &mut Vec<Effect>) {
        if std::mem::take(&mut self.twin_pending) && self.phase == Phase::Discarding {
            effects.push(Effect::Discard);
        }
    }

    /// Leaves the phase if all it waits for is there. True if it did.
    fn advance(&mut self, effects: &mut Vec<Effect>) -> bool {
        match self.phase {
            Phase::Recording if self.recorded.contains(&Record::Reserved) => {
                self.enter(Phase::StartingTwin, effects);
                self.twin_pending = true;
                effects.push(Effect::StartTwin);
            }
            Phase::Preparing if self.prepared() => {
                self.enter(Phase::Reserved, effects);
                effects.push(Effect::ConfirmReserved);
            }
            Phase::Reserved if self.peer_connected => {
                self.enter(Phase::Loading, effects);
                effects.push(Effect::SendReady);
            }
            Phase::Loading if self.all_verified() => {
                self.enter(Phase::Finishing, effects);
                effects.push(Effect::FinishLoad);
            }
            Phase::Finishing if self.load_finished => {
                self.enter(Phase::Verifying, effects);
                self.order(effects, |_| Some(MigrationState::Stop));
            }
            Phase::Verifying if self.devices.all_at(|state| state == MigrationState::Stop) => {
                self.phase = Phase::RecordingLoaded;
                effects.push(Effect::Record(Record::Loaded));
            }
            Phase::RecordingLoaded if self.recorded.contains(&Record::Loaded) => {
                self.enter(Phase::Loaded, effects);
                effects.push(Effect::SendLoaded);
            }
            Phase::Confirming if self.twin_confirmed => {
                self.phase = Phase::RecordingStarting;
                effects.push(Effect::Record(Record::Starting));
            }
            Phase::RecordingStarting if self.recorded.contains(&Record::Starting) => {
                if let Some(failure) = self.failure.take() {
                    self.stuck(failure, effects);
                    return false;
                }
                self.enter(Phase::Starting, effects);
                effects.extend([Effect::SendStarting, Effect::ActivateIdentity]);
            }
            Phase::Starting if self.identity_active && self.driver == Driver::Vmm => {
                self.enter(Phase::Resuming, effects);
                effects.push(Effect::Resume);
            }
            Phase::Starting if self.identity_active => {
                self.enter(Phase::WakingP2p, effects);
                // One that runs already was woken by an agent that has restarted since.
                self.order(effects, |track| {
                    (track.features.p2p && track.at != MigrationState::Running)
                        .then_some(MigrationState::RunningP2p)
                });
            }
            Phase::WakingP2p if self.devices.settled() => {
                self.enter(Phase::Waking, effects);
                self.order(effects, |_| Some(MigrationState::Running));
            }
            Phase::Waking if self.devices.all_at(|state| state == MigrationState::Running) => {
                self.enter(Phase::Resuming, effects);
                effects.push(Effect::Resume);
            }
            Phase::Resuming if self.resumed => {
                self.phase = Phase::RecordingRunning;
                effects.push(Effect::Record(Record::Running));
            }
            Phase::RecordingRunning if self.recorded.contains(&Record::Running) => {
                effects.push(Effect::SendStarted);
                self.finish(End::Running, effects);
            }
            Phase::Discarding if self.given_back && self.recorded.contains(&Record::Discarded) => {
                let failure = self
                    .failure
                    .take()
                    .unwrap_or_else(|| Failure::new(Reason::Aborted, "the reservation was given up"));
                self.finish(End::Discarded(failure), effects);
            }
            _ => return false,
        }
        true
    }

    /// A VMM that drives its devices takes them to RESUMING when their states arrive.
    fn prepared(&self) -> bool {
        self.driver == Driver::Vmm || self.devices.all_at(|state| state == MigrationState::Resuming)
    }

    fn all_verified(&self) -> bool {
        blobs(self.driver.device_blobs(self.devices.len())).all(|blob| self.verified.contains(&blob))
    }

    /// Starts a step of all devices. Those that their VMM drives are led only out of RESUMING.
    fn order(&mut self, effects: &mut Vec<Effect>, target: impl Fn(&Track) -> Option<MigrationState>) {
        let driver = self.driver;
        effects.extend(self.devices.order(target).into_iter().map(|ordered| match driver {
            Driver::Agent => Effect::SetState(ordered),
            Driver::Vmm => Effect::Check(ordered.index),
        }));
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
