//! Both halves of the hand-over together, in a world that completes effects in any order, loses the link for a while, and lets any
//! effect fail, records too. After every step the world itself, not the machines, checks the invariants I1 to I6.

use proptest::prelude::*;

use super::destination::{self, Destination};
use super::source::{self, Source};
use crate::policy::{Driver, StopPlan};
use crate::state::{Features, MigrationState, path};
use crate::{Blob, Failure, Reason, Record, Word, blobs};

/// What may go wrong in one run.
#[derive(Clone, Debug)]
struct Trouble {
    /// The effect, counted from the start of the run, that fails.
    failing: Option<usize>,
    /// A refused state change leaves the device in ERROR.
    to_error: bool,
    /// After this many effects the link is gone, until nothing more can happen without it.
    cut_after: Option<usize>,
    /// After this many effects somebody asks for an abort.
    abort_after: Option<usize>,
    /// The VMM's save comes to its end when nothing else can happen any more.
    late_save: bool,
}

/// A device as the kernel has it.
#[derive(Clone, Copy, Debug)]
struct Real {
    at: MigrationState,
    was_quiesced: bool,
    was_stopped: bool,
    /// It refused to wake: from then on it takes no part in the barriers, and is reset.
    refused_to_wake: bool,
}

enum Pending {
    Source(source::Effect),
    /// The VMM's save comes to its end.
    SaveEnds,
    Destination(destination::Effect),
    ToSource(source::Event),
    ToDestination(destination::Event),
}

struct World {
    trouble: Trouble,
    plan: StopPlan,
    driver: Driver,
    features: Vec<Features>,
    source: Source,
    destination: Destination,
    pending: Vec<Pending>,
    source_devices: Vec<Real>,
    destination_devices: Vec<Real>,
    source_runs: bool,
    destination_runs: bool,
    destination_started: bool,
    aborted: bool,
    /// The VMM's save has been given up, or has come to its end.
    save_over: bool,
    reserved: bool,
    arrived: Vec<Blob>,
    /// The source waits for an answer to what the destination has journalled.
    asking: bool,
    source_records: Vec<Record>,
    destination_records: Vec<Record>,
    done: usize,
    link_up: bool,
    failed: bool,
    source_end: Option<source::End>,
    destination_end: Option<destination::End>,
}

fn trouble(message: &str) -> Failure {
    Failure::new(Reason::DeviceFailed, message)
}

impl World {
    fn new(features: Vec<Features>, plan: StopPlan, driver: Driver, trouble: Trouble) -> Self {
        let real = Real {
            at: MigrationState::Running,
            was_quiesced: false,
            was_stopped: false,
            refused_to_wake: false,
        };
        Self {
            source: Source::new(&features, plan, driver),
            destination: Destination::new(&features, driver),
            source_devices: vec![real; features.len()],
            destination_devices: vec![real; features.len()],
            pending: Vec::new(),
            source_runs: true,
            destination_runs: false,
            destination_started: false,
            aborted: false,
            save_over: false,
            reserved: false,
            arrived: Vec::new(),
            asking: false,
            source_records: Vec::new(),
            destination_records: Vec::new(),
            done: 0,
            link_up: true,
            failed: false,
            source_end: None,
            destination_end: None,
            trouble,
            plan,
            driver,
            features,
        }
    }

    fn source_event(&mut self, event: source::Event) {
        let (next, effects) = self.source.clone().step(event);
        self.source = next;
        self.pending.extend(effects.into_iter().map(Pending::Source));
    }

    fn destination_event(&mut self, event: destination::Event) {
        let (next, effects) = self.destination.clone().step(event);
        self.destination = next;
        self.pending.extend(effects.into_iter().map(Pending::Destination));
    }

    fn fails_now(&mut self) -> bool {
        let now = self.trouble.failing == Some(self.done);
        self.failed |= now;
        now
    }

    fn run(&mut self, choices: &[usize]) {
        self.destination_event(destination::Event::Start);
        let mut choice = choices.iter().cycle();
        while !self.pending.is_empty() || self.ask() {
            assert!(self.done < 2000, "the run does not end");
            self.done += 1;
            if self.pending.is_empty() {
                continue;
            }
            if self.trouble.cut_after == Some(self.done) && self.link_up {
                self.cut();
            }
            if self.trouble.abort_after == Some(self.done) && !self.source.committed() && self.reserved {
                self.source_event(source::Event::Failed(Failure::new(Reason::Aborted, "asked for")));
            }
            let pending = self.pick(choice.next().copied().unwrap_or_default());
            match pending {
                Pending::Source(effect) => self.source_effect(effect),
                Pending::SaveEnds => self.save_ends(),
                Pending::Destination(effect) => self.destination_effect(effect),
                Pending::ToSource(event) if self.link_up => self.source_event(event),
                Pending::ToDestination(event) if self.link_up => self.destination_event(event),
                Pending::ToSource(_) | Pending::ToDestination(_) => {}
            }
            // I1
            assert!(!(self.source_runs && self.destination_runs), "I1: both ends run the VM");
            assert!(
                !(self.destination_started && self.source_runs),
                "I1: the source runs after the destination has started"
            );
        }
        self.operator_cleans_up();
    }

    fn pick(&mut self, choice: usize) -> Pending {
        let late = |pending: &Pending| self.trouble.late_save && matches!(pending, Pending::SaveEnds);
        self.pending.sort_by_key(late);
        let early = self.pending.iter().filter(|pending| !late(pending)).count();
        self.pending.remove(choice % early.max(1))
    }

    /// Nothing happens any more by itself: what keeps the source waiting is asked. The link is back by then.
    fn ask(&mut self) -> bool {
        if !std::mem::take(&mut self.asking) {
            return false;
        }
        self.link_up = true;
        self.destination_event(destination::Event::PeerSays(Word::at(Record::Committed)));
        let ended = self.destination_end.is_some();
        let record = self.destination_records.last().copied();
        let failure = match &self.destination_end {
            Some(destination::End::Stuck(failure) | destination::End::Discarded(failure)) => {
                Some(failure.clone())
            }
            _ => None,
        };
        self.source_event(source::Event::PeerSays(Word { record, ended, failure, stated_because: None }));
        true
    }

    fn cut(&mut self) {
        self.link_up = false;
        let lost = Failure::new(Reason::PeerLost, "link cut");
        self.source_event(source::Event::Failed(lost.clone()));
        self.destination_event(destination::Event::PeerLost(lost));
    }

    /// What the operator does when the source has reported that the VM stays there.
    fn operator_cleans_up(&mut self) {
        let stays = matches!(self.source_end, Some(source::End::RolledBack(_) | source::End::Refused(_)));
        let never_started = self.source_end.is_none() && !self.reserved;
        if stays || never_started {
            let word = Failure::new(Reason::Released, "the source keeps the VM");
            self.destination_event(destination::Event::AbortReceived(word));
            while let Some(pending) = self.pending.pop() {
                if let Pending::Destination(effect) = pending {
                    self.destination_effect(effect);
                }
            }
        }
    }

    fn source_effect(&mut self, effect: source::Effect) {
        use source::{Effect, Event};
        let fails = self.fails_now();
        let event = match effect {
            Effect::Report(_) => return,
            Effect::Connect if fails => Event::Failed(trouble("connect")),
            Effect::Connect => {
                self.tell_destination(destination::Event::PeerConnected);
                return;
            }
            Effect::Record(record) if fails => Event::RecordFailed(record, trouble("record")),
            Effect::Record(record) | Effect::RecordAgain(record) => {
                self.aborted |= record == Record::Aborted;
                self.source_records.push(record);
                Event::Recorded(record)
            }
            Effect::Doubt(_) => return,
            Effect::AskPeer => {
                self.asking = true;
                return;
            }
            Effect::StartSave if fails => Event::Failed(trouble("start save")),
            Effect::StartSave => Event::SaveStarted,
            Effect::Converge if fails || self.save_over => Event::Failed(trouble("converge")),
            Effect::Converge => {
                self.source_runs = false;
                self.source_devices.iter_mut().for_each(|device| device.at = MigrationState::StopCopy);
                Event::Converged
            }
            Effect::ReadState(index) if fails => Event::DeviceFailed(index, None, trouble("read state")),
            Effect::ReadState(index) => Event::DeviceReached(index, self.source_devices[index].at),
            Effect::SetState(index, to) => {
                let at = self.source_devices[index].at;
                if fails {
                    if self.trouble.to_error {
                        self.source_devices[index].at = MigrationState::Error;
                    }
                    self.source_devices[index].refused_to_wake = self.aborted;
                    Event::DeviceFailed(index, Some(self.source_devices[index].at), trouble("set state"))
                } else {
                    self.check_source_move(index, at, to);
                    self.source_devices[index].at = to;
                    self.source_devices[index].was_quiesced |= to.is_p2p();
                    self.source_devices[index].was_stopped |= to == MigrationState::Stop;
                    Event::DeviceReached(index, to)
                }
            }
            Effect::PreCopy(index) if fails => {
                Event::DeviceFailed(index, Some(self.source_devices[index].at), trouble("read"))
            }
            Effect::PreCopy(index) => Event::PreCopied(index),
            Effect::Pause if fails => Event::PauseFailed(trouble("pause")),
            Effect::Pause => {
                self.source_runs = false;
                Event::Paused
            }
            Effect::FinishSave => {
                self.pending.push(Pending::SaveEnds);
                return self.capture(Blob::Vmm, fails);
            }
            Effect::Capture(index) => return self.capture(Blob::Device(index), fails),
            Effect::SendCommit => {
                assert!(!self.aborted, "COMMIT after ABORTED");
                assert!(self.source_records.contains(&Record::Committed), "COMMIT before COMMITTED");
                self.tell_destination(destination::Event::CommitReceived);
                return;
            }
            Effect::SendAbort(why) => {
                assert!(self.source.phase() != source::Phase::AwaitingStarted);
                let word = Failure::new(Reason::Aborted, why);
                self.tell_destination(destination::Event::AbortReceived(word));
                return;
            }
            Effect::CloseStreams => {
                self.pending.retain(|pending| {
                    !matches!(
                        pending,
                        Pending::Source(Effect::PreCopy(_) | Effect::Capture(_) | Effect::FinishSave)
                            | Pending::SaveEnds
                    )
                });
                self.give_save_up();
                Event::StreamsClosed
            }
            Effect::Reset(index) if fails => Event::DeviceFailed(index, None, trouble("reset")),
            Effect::Reset(index) => {
                self.source_devices[index].at = MigrationState::Running;
                Event::DeviceReached(index, MigrationState::Running)
            }
            Effect::Resume if fails => Event::ResumeFailed(trouble("resume")),
            Effect::Resume => {
                assert!(self.aborted, "I1: resumed before ABORTED was recorded");
                if self.driver == Driver::Vmm {
                    self.wake_source();
                    for (index, device) in self.source_devices.clone().into_iter().enumerate() {
                        self.source_event(Event::DeviceReached(index, device.at));
                    }
                }
                assert!(
                    self.source_devices.iter().all(|device| device.at == MigrationState::Running),
                    "I4, I6: vCPUs resumed before the devices"
                );
                self.source_runs = true;
                Event::Resumed
            }
            Effect::Release => {
                assert!(self.destination_runs, "released although the VM does not run at the destination");
                Event::Released
            }
            Effect::Finish(end) => {
                self.source_end = Some(end);
                return;
            }
        };
        self.source_event(event);
    }

    /// A VMM that drives its devices may give its migration up until it has said that it is complete, though all has been sent.
    fn save_ends(&mut self) {
        let event = if self.fails_now() {
            self.give_save_up();
            source::Event::Failed(trouble("save"))
        } else {
            self.save_over = true;
            source::Event::SaveFinished
        };
        self.source_event(event);
    }

    /// A VMM that drives its devices takes the VM back by itself.
    fn give_save_up(&mut self) {
        if self.driver == Driver::Vmm && !self.save_over {
            self.save_over = true;
            self.wake_source();
        }
    }

    fn wake_source(&mut self) {
        self.source_devices.iter_mut().for_each(|device| device.at = MigrationState::Running);
        self.source_runs = true;
    }

    fn check_source_move(&self, index: usize, at: MigrationState, to: MigrationState) {
        let way = path(self.features[index], at, to).expect("only legal moves are asked for");
        // A move towards the capture may still be under way when the rollback has been decided on.
        let waking = self.aborted || self.source.phase() == source::Phase::Settling;
        if waking && to != MigrationState::StopCopy {
            self.check_waking(&self.source_devices, at, &way);
            return;
        }
        if self.features.len() > 1 {
            for state in &way {
                match self.plan {
                    StopPlan::QuiesceFirst if state.is_stopped() => {
                        assert!(
                            self.source_devices.iter().all(|device| device.was_quiesced),
                            "I2: {state} too early"
                        );
                    }
                    StopPlan::StopFirst if *state == MigrationState::StopCopy => assert!(
                        self.source_devices.iter().all(|device| device.was_stopped),
                        "I2: {state} too early"
                    ),
                    _ => {}
                }
            }
        }
    }

    fn check_waking(&self, devices: &[Real], at: MigrationState, way: &[MigrationState]) {
        let taking_part = || devices.iter().filter(|device| !device.refused_to_wake);
        if at == MigrationState::Stop && devices.len() > 1 {
            assert!(
                !taking_part()
                    .any(|device| matches!(device.at, MigrationState::Resuming | MigrationState::StopCopy)),
                "I4: a device leaves STOP before all are there"
            );
        }
        let all_p2p = self.features.iter().all(|features| features.p2p);
        if way.contains(&MigrationState::Running) && all_p2p {
            assert!(
                taking_part().all(|device| !device.at.is_stopped() && device.at != MigrationState::Resuming),
                "I4: a device enters RUNNING before all are in RUNNING_P2P"
            );
        }
    }

    fn capture(&mut self, blob: Blob, fails: bool) {
        assert!(!self.source_runs, "I3: capture while vCPUs run");
        assert!(
            self.source_devices.iter().all(|device| device.at.is_stopped()),
            "I3: capture before slack water"
        );
        if fails {
            self.source_event(source::Event::Failed(trouble("capture")));
        } else if self.link_up && self.destination.takes_blobs() {
            self.arrived.push(blob);
            if self.driver == Driver::Vmm {
                self.destination_devices.iter_mut().for_each(|device| device.at = MigrationState::Resuming);
            }
            self.destination_event(destination::Event::BlobVerified(blob));
            self.pending.push(Pending::ToSource(source::Event::BlobSent(blob)));
        }
    }

    fn tell_destination(&mut self, event: destination::Event) {
        self.pending.push(Pending::ToDestination(event));
    }

    fn tell_source(&mut self, event: source::Event) {
        self.pending.push(Pending::ToSource(event));
    }

    fn destination_effect(&mut self, effect: destination::Effect) {
        use destination::{Effect, Event};
        let fails = self.fails_now();
        let event = match effect {
            Effect::Report(_) => return,
            Effect::StartTwin if fails => Event::Failed(trouble("twin")),
            Effect::StartTwin => Event::TwinReady,
            Effect::Check(index) if fails => Event::DeviceFailed(index, None, trouble("check")),
            Effect::Check(index) => {
                let device = &mut self.destination_devices[index];
                assert_eq!((device.at, self.driver), (MigrationState::Resuming, Driver::Vmm), "I5");
                device.at = MigrationState::Stop;
                Event::DeviceReached(index, MigrationState::Stop)
            }
            Effect::SetState(index, to) => {
                let at = self.destination_devices[index].at;
                if fails {
                    if self.trouble.to_error {
                        self.destination_devices[index].at = MigrationState::Error;
                    }
                    Event::DeviceFailed(index, Some(self.destination_devices[index].at), trouble("set state"))
                } else {
                    let way = path(self.features[index], at, to).expect("only legal moves are asked for");
                    if at == MigrationState::Resuming {
                        assert_eq!(self.arrived.len(), self.features.len() + 1, "I5: leaves RESUMING early");
                    } else if to != MigrationState::Resuming {
                        assert!(
                            self.destination_records.contains(&Record::Starting),
                            "woken before STARTING"
                        );
                        self.check_waking(&self.destination_devices, at, &way);
                        assert!(!self.aborted, "I1: woken although the source keeps the VM");
                        self.destination_started = true;
                    }
                    self.destination_devices[index].at = to;
                    Event::DeviceReached(index, to)
                }
            }
            Effect::ConfirmReserved => {
                self.reserved = true;
                self.source_event(source::Event::Start);
                return;
            }
            Effect::SendReady => return self.tell_source(source::Event::PeerReady),
            Effect::FinishLoad if fails => Event::Failed(trouble("finish load")),
            Effect::FinishLoad => Event::LoadFinished,
            Effect::ConfirmTwin if fails => Event::Failed(trouble("confirm")),
            Effect::ConfirmTwin => Event::TwinConfirmed,
            Effect::Record(record) if fails => Event::RecordFailed(record, trouble("record")),
            Effect::Record(record) | Effect::RecordAgain(record) => {
                let started = self.destination_records.contains(&Record::Starting);
                assert!(record != Record::Discarded || !started, "DISCARDED after STARTING");
                self.destination_records.push(record);
                Event::Recorded(record)
            }
            Effect::SendLoaded => return self.tell_source(source::Event::Loaded),
            Effect::SendStarting => return,
            Effect::ActivateIdentity if fails => Event::Failed(trouble("identity")),
            Effect::ActivateIdentity => Event::IdentityActivated,
            Effect::Resume if fails => Event::Failed(trouble("resume")),
            Effect::Resume => {
                if self.driver == Driver::Vmm {
                    assert!(self.destination_records.contains(&Record::Starting), "woken before STARTING");
                    assert!(
                        self.destination_devices.iter().all(|device| device.at == MigrationState::Stop),
                        "I5: a device has not been checked"
                    );
                    self.destination_devices
                        .iter_mut()
                        .for_each(|device| device.at = MigrationState::Running);
                }
                assert!(
                    self.destination_devices.iter().all(|device| device.at == MigrationState::Running),
                    "I4: vCPUs resumed before the devices"
                );
                self.destination_started = true;
                self.destination_runs = true;
                Event::Resumed
            }
            Effect::SendStarted => return self.tell_source(source::Event::Started),
            Effect::SendFailed(failure) => {
                let reason =
                    if self.destination_started { Reason::StartFailed } else { Reason::TargetFailed };
                return self.tell_source(source::Event::Failed(Failure::new(reason, failure.message)));
            }
            Effect::Discard => {
                assert!(!self.destination_started, "I1: discarded after it may have run");
                Event::Discarded
            }
            Effect::Finish(end) => {
                self.destination_end = Some(end);
                return;
            }
        };
        self.destination_event(event);
    }

    /// What must hold when nothing more can happen.
    fn check_end(&self) {
        match &self.source_end {
            Some(source::End::Succeeded) => assert!(self.destination_runs && !self.source_runs),
            Some(source::End::RolledBack(_) | source::End::Refused(_)) => {
                assert!(self.source_runs && !self.destination_started, "I6: {:?}", self.source_end);
                assert!(
                    self.source_devices.iter().all(|device| device.at == MigrationState::Running),
                    "I6: {:?}",
                    self.source_devices
                );
                assert!(
                    matches!(self.destination_end, Some(destination::End::Discarded(_))),
                    "I6: the reservation is still held: {:?}",
                    self.destination.phase()
                );
            }
            // A VMM that drives its devices may have taken the VM back without anybody having seen it.
            Some(source::End::Lost(_)) => assert!(!self.source_runs || self.driver == Driver::Vmm),
            // The reservation itself failed, and the source was never asked.
            None => assert!(!self.reserved && self.source_runs, "the source never came to an end"),
        }
        if !self.failed && self.link_up && self.trouble.abort_after.is_none() {
            assert_eq!(self.source_end, Some(source::End::Succeeded));
            assert_eq!(self.destination_end, Some(destination::End::Running));
            assert_eq!(self.arrived.len(), blobs(self.driver.device_blobs(self.features.len())).count());
        }
    }
}

fn simulate((features, plan, driver): Vm, trouble: Trouble, choices: &[usize]) -> World {
    let mut world = World::new(features, plan, driver, trouble);
    world.run(choices);
    world.check_end();
    world
}

const NO_TROUBLE: Trouble =
    Trouble { failing: None, to_error: false, cut_after: None, abort_after: None, late_save: false };
const ALL: Features = Features { stop_copy: true, p2p: true, pre_copy: true };
const P2P_ONLY: Features = Features { stop_copy: true, p2p: true, pre_copy: false };
const PRE_COPY_ONLY: Features = Features { stop_copy: true, p2p: false, pre_copy: true };
const BARE: Features = Features { stop_copy: true, p2p: false, pre_copy: false };

type Vm = (Vec<Features>, StopPlan, Driver);

fn vm() -> impl Strategy<Value = Vm> {
    let quiesced = proptest::collection::vec(prop_oneof![Just(ALL), Just(P2P_ONLY)], 0..4)
        .prop_map(|features| (features, StopPlan::QuiesceFirst));
    let isolated = proptest::collection::vec(
        prop_oneof![Just(ALL), Just(P2P_ONLY), Just(PRE_COPY_ONLY), Just(BARE)],
        2..4,
    )
    .prop_map(|features| (features, StopPlan::StopFirst));
    let alone =
        prop_oneof![Just(PRE_COPY_ONLY), Just(BARE)].prop_map(|features| (vec![features], StopPlan::Alone));
    (prop_oneof![quiesced, isolated, alone], prop_oneof![3 => Just(Driver::Agent), 1 => Just(Driver::Vmm)])
        .prop_map(|((features, plan), driver)| (features, plan, driver))
}

fn some_trouble() -> impl Strategy<Value = Trouble> {
    let at = || proptest::option::weighted(0.5, 0..90_usize);
    (at(), any::<bool>(), at(), at(), any::<bool>()).prop_map(
        |(failing, to_error, cut_after, abort_after, late_save)| Trouble {
            failing,
            to_error,
            cut_after,
            abort_after,
            late_save,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_fails_whenever_the_invariants_hold(
        vm in vm(), trouble in some_trouble(), choices in proptest::collection::vec(any::<usize>(), 1..200),
    ) {
        simulate(vm, trouble, &choices);
    }

    #[test]
    fn without_trouble_every_order_of_completion_succeeds(
        vm in vm(), choices in proptest::collection::vec(any::<usize>(), 1..200),
    ) {
        let world = simulate(vm, NO_TROUBLE, &choices);
        prop_assert_eq!(world.source_end, Some(source::End::Succeeded));
    }
}

#[test]
fn every_single_failure_before_the_commit_is_rolled_back_and_leaves_nothing_reserved() {
    for (driver, least) in [(Driver::Agent, 20), (Driver::Vmm, 10)] {
        let mut rolled_back = 0;
        for failing in 0..80 {
            for (to_error, late_save) in [(false, false), (true, false), (false, true)] {
                let trouble = Trouble { failing: Some(failing), to_error, late_save, ..NO_TROUBLE };
                let world = simulate((vec![ALL, ALL], StopPlan::QuiesceFirst, driver), trouble, &[0]);
                rolled_back += usize::from(matches!(world.source_end, Some(source::End::RolledBack(_))));
            }
        }
        assert!(
            rolled_back > least,
            "{driver:?}: only {rolled_back} were rolled back: the faults did not hit"
        );
    }
}
