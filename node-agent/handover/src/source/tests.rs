use super::{Effect, End, Event, Phase, Source};
use crate::devices::Move;
use crate::policy::{Driver, StopPlan};
use crate::state::{Features, MigrationState};
use crate::{Blob, Failure, Reason, Record, Word};

/// A source whose effects all succeed at once, and whose VMM has given all it has: it is verified at the
/// destination. Neither has the destination loaded it, nor has the VMM said that its save has ended.
struct AllSent {
    machine: Source,
    records: Vec<Record>,
    end: Option<End>,
}

impl AllSent {
    fn new(driver: Driver) -> Self {
        let machine = Source::new(&[Features::ALL], StopPlan::QuiesceFirst, driver);
        let mut all = Self { machine, records: Vec::new(), end: None };
        all.hear(Event::Start);
        assert_eq!(all.machine.phase(), Phase::Capturing);
        all
    }

    fn hear(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let (machine, effects) = self.machine.clone().step(event);
            self.machine = machine;
            events.extend(effects.into_iter().filter_map(|effect| self.perform(effect)));
        }
    }

    fn perform(&mut self, effect: Effect) -> Option<Event> {
        Some(match effect {
            Effect::Connect => Event::PeerReady,
            Effect::Record(record) | Effect::RecordAgain(record) => {
                self.records.push(record);
                Event::Recorded(record)
            }
            Effect::StartSave => Event::SaveStarted,
            Effect::Converge => Event::Converged,
            Effect::ReadState(index) => Event::DeviceReached(index, MigrationState::StopCopy),
            Effect::SetState(Move { index, to, .. }) => Event::DeviceReached(index, to),
            Effect::PreCopy(index) => Event::PreCopied(index),
            Effect::Pause => Event::Paused,
            Effect::FinishSave => Event::BlobSent(Blob::Vmm),
            Effect::Capture(index) => Event::BlobSent(Blob::Device(index)),
            Effect::CloseStreams => Event::StreamsClosed,
            Effect::Reset(index) => Event::DeviceReached(index, MigrationState::Running),
            Effect::Finish(end) => {
                self.end = Some(end);
                return None;
            }
            _ => return None,
        })
    }

    fn after(driver: Driver, events: &[Event]) -> Self {
        let mut all = Self::new(driver);
        events.iter().for_each(|event| all.hear(event.clone()));
        all
    }

    fn has_committed(&self) -> bool {
        self.records.contains(&Record::Committed)
    }
}

#[test]
fn nothing_is_committed_before_the_vmm_has_said_that_its_save_has_ended() {
    for driver in [Driver::Agent, Driver::Vmm] {
        for (events, commits) in [
            (vec![Event::Loaded], false),
            (vec![Event::SaveFinished], false),
            (vec![Event::Loaded, Event::SaveFinished], true),
            (vec![Event::SaveFinished, Event::Loaded], true),
        ] {
            assert_eq!(AllSent::after(driver, &events).has_committed(), commits, "{driver:?} {events:?}");
        }
    }
}

#[test]
fn a_vmm_that_ends_when_the_destination_has_all_of_it_is_no_reason_to_lose_its_vm() {
    for (driver, events) in [
        (Driver::Agent, vec![Event::VmmExited, Event::Loaded]),
        (Driver::Agent, vec![Event::Loaded, Event::VmmExited]),
        (Driver::Agent, vec![Event::VmmExited, Event::VmmExited, Event::Loaded]),
        (Driver::Vmm, vec![Event::SaveFinished, Event::VmmExited, Event::Loaded]),
    ] {
        let all = AllSent::after(driver, &events);
        assert!(all.has_committed(), "{driver:?} {events:?}");
    }
}

#[test]
fn a_vmm_that_drives_its_devices_and_ends_without_a_word_may_have_let_its_guest_run_so_nothing_is_committed()
{
    for events in [[Event::Loaded, Event::VmmExited], [Event::VmmExited, Event::Loaded]] {
        let all = AllSent::after(Driver::Vmm, &events);
        assert!(!all.has_committed(), "{events:?}");
        assert!(matches!(&all.end, Some(End::Lost(_))), "{events:?} {:?}", all.end);
        assert!(all.records.contains(&Record::Aborted), "{events:?}");
    }
}

/// A source of two devices at this phase, whose device 0 has been asked and does not answer; device 1 has
/// got where it was to go. What it asks for is collected, and answered only by the test.
struct Hung {
    machine: Source,
    asked: Vec<Effect>,
}

impl Hung {
    /// All goes well until device 0 is asked for `at`.
    fn at(at: MigrationState) -> Self {
        let machine = Source::new(&[Features::ALL; 2], StopPlan::QuiesceFirst, Driver::Agent);
        let mut hung = Self { machine, asked: Vec::new() };
        let mut events = vec![Event::Start];
        while let Some(event) = events.pop() {
            hung.hear(event);
            for effect in std::mem::take(&mut hung.asked) {
                match effect {
                    Effect::SetState(Move { index: 0, to, .. }) if to == at => {}
                    Effect::SetState(Move { index, to, .. }) => {
                        events.push(Event::DeviceReached(index, to));
                    }
                    Effect::Connect => events.push(Event::PeerReady),
                    Effect::Record(record) => events.push(Event::Recorded(record)),
                    Effect::StartSave => events.push(Event::SaveStarted),
                    Effect::PreCopy(index) => events.push(Event::PreCopied(index)),
                    Effect::Pause => events.push(Event::Paused),
                    _ => {}
                }
            }
        }
        hung
    }

    fn hear(&mut self, event: Event) {
        let (machine, effects) = self.machine.clone().step(event);
        self.machine = machine;
        self.asked.extend(effects);
    }

    /// What was asked for since the last time.
    fn asks(&mut self, event: Event) -> Vec<Effect> {
        self.asked.clear();
        self.hear(event);
        self.asked.retain(|effect| !matches!(effect, Effect::Report(_)));
        std::mem::take(&mut self.asked)
    }
}

fn moves(index: usize, from: MigrationState, to: MigrationState) -> Effect {
    Effect::SetState(Move { index, from, to })
}

fn does_not_answer() -> Failure {
    Failure::new(Reason::DeviceHangs, "device vf0 has not returned from STOP_COPY for 20 s")
}

fn doubt(effects: &[Effect]) -> Option<&Failure> {
    effects.iter().find_map(|effect| match effect {
        Effect::Doubt(failure) => Some(failure),
        _ => None,
    })
}

#[test]
fn a_device_that_hangs_in_the_blackout_is_named_and_the_others_wait_for_it_in_running_p2p() {
    let mut hung = Hung::at(MigrationState::StopCopy);
    assert_eq!(hung.machine.phase(), Phase::Stopping);
    let asked = hung.asks(Event::DeviceHangs(0, does_not_answer()));
    assert!(asked.contains(&Effect::CloseStreams) && asked.contains(&Effect::Record(Record::Aborted)));
    let named = doubt(&asked).expect("it is named");
    assert_eq!(named.reason, Reason::DeviceHangs);
    for says in ["vf0", "reset", "stays here, paused"] {
        assert!(named.message.contains(says), "{says}: {}", named.message);
    }

    // The destination hears that the VM stays here.
    assert!(matches!(hung.asks(Event::Recorded(Record::Aborted))[..], [Effect::SendAbort(_)]));
    assert!(hung.machine.waits_for_a_device());
    let asked = hung.asks(Event::StreamsClosed);
    assert_eq!(asked, [moves(1, MigrationState::StopCopy, MigrationState::Stop)]);
    let asked = hung.asks(Event::DeviceReached(1, MigrationState::Stop));
    assert_eq!(asked, [moves(1, MigrationState::Stop, MigrationState::RunningP2p)]);
    assert_eq!(hung.asks(Event::DeviceReached(1, MigrationState::RunningP2p)), []);
    assert_eq!(hung.machine.phase(), Phase::WakingP2p);

    // It answers after all, where it was to go, and catches up.
    let asked = hung.asks(Event::DeviceReached(0, MigrationState::StopCopy));
    assert_eq!(asked, [moves(0, MigrationState::StopCopy, MigrationState::Stop)]);
    assert_eq!(hung.asks(Event::DeviceAnswers(0)), []);
    let asked = hung.asks(Event::DeviceReached(0, MigrationState::Stop));
    assert_eq!(asked, [moves(0, MigrationState::Stop, MigrationState::RunningP2p)]);
    let asked = hung.asks(Event::DeviceReached(0, MigrationState::RunningP2p));
    let both = [0, 1].map(|index| moves(index, MigrationState::RunningP2p, MigrationState::Running));
    assert_eq!(asked, both);
    assert_eq!(hung.asks(Event::DeviceReached(0, MigrationState::Running)), []);
    assert_eq!(hung.asks(Event::DeviceReached(1, MigrationState::Running)), [Effect::Resume]);
    let asked = hung.asks(Event::Resumed);
    let [Effect::Finish(End::RolledBack(failure))] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!(failure, &does_not_answer());
}

#[test]
fn a_device_that_has_hung_and_then_fails_is_reset_before_any_device_runs() {
    let mut hung = Hung::at(MigrationState::StopCopy);
    hung.hear(Event::DeviceHangs(0, does_not_answer()));
    hung.hear(Event::Recorded(Record::Aborted));
    hung.hear(Event::StreamsClosed);
    hung.hear(Event::DeviceReached(1, MigrationState::Stop));
    hung.hear(Event::DeviceReached(1, MigrationState::RunningP2p));
    let failed = Failure::new(Reason::DeviceFailed, "EIO");
    assert_eq!(hung.asks(Event::DeviceFailed(0, Some(MigrationState::Error), failed)), [Effect::Reset(0)]);
    // So may the reset.
    assert!(doubt(&hung.asks(Event::DeviceHangs(0, does_not_answer()))).is_some());
    let asked = hung.asks(Event::DeviceReached(0, MigrationState::Running));
    assert_eq!(asked, [moves(1, MigrationState::RunningP2p, MigrationState::Running)]);
}

#[test]
fn the_end_of_the_vmm_ends_a_rollback_that_waits_for_a_device() {
    for waits_since in [Phase::Settling, Phase::WakingP2p] {
        let mut hung = Hung::at(MigrationState::StopCopy);
        hung.hear(Event::DeviceHangs(0, does_not_answer()));
        hung.hear(Event::Recorded(Record::Aborted));
        if waits_since == Phase::WakingP2p {
            hung.hear(Event::StreamsClosed);
            hung.hear(Event::DeviceReached(1, MigrationState::Stop));
            hung.hear(Event::DeviceReached(1, MigrationState::RunningP2p));
        }
        assert_eq!(hung.machine.phase(), waits_since);
        hung.hear(Event::VmmExited);
        let asked = hung.asks(Event::StreamsClosed);
        let ended = hung.machine.phase() == Phase::Finished;
        assert!(ended, "{waits_since:?} {asked:?}");
    }
}

#[test]
fn a_device_that_hangs_while_the_guest_runs_is_named_only_when_the_migration_is_given_up() {
    let mut hung = Hung::at(MigrationState::PreCopy);
    assert_eq!(hung.asks(Event::DeviceHangs(0, does_not_answer())), []);
    assert_eq!(hung.machine.phase(), Phase::PreCopying);
    let asked = hung.asks(Event::Failed(Failure::new(Reason::TimedOut, "preCommitTimeout")));
    let named = doubt(&asked).expect("it is named");
    assert_eq!(named.reason, Reason::DeviceHangs);
    assert!(named.message.contains("runs on"), "{}", named.message);
    // It answered before, and nothing is in doubt.
    let mut slow = Hung::at(MigrationState::PreCopy);
    slow.hear(Event::DeviceHangs(0, does_not_answer()));
    slow.hear(Event::DeviceAnswers(0));
    let asked = slow.asks(Event::Failed(Failure::new(Reason::TimedOut, "preCommitTimeout")));
    assert_eq!(doubt(&asked), None);
}

#[test]
fn a_rollback_that_does_not_come_through_says_whether_the_guest_runs() {
    for (at, says) in
        [(MigrationState::PreCopy, "never paused, runs on"), (MigrationState::Stop, "stays paused")]
    {
        let mut hung = Hung::at(at);
        hung.hear(Event::DeviceFailed(0, None, Failure::new(Reason::DeviceFailed, "EIO")));
        hung.hear(Event::Recorded(Record::Aborted));
        let mut reset = hung.asks(Event::StreamsClosed);
        if at == MigrationState::Stop {
            reset = hung.asks(Event::DeviceReached(1, MigrationState::RunningP2p));
        }
        assert!(reset.contains(&Effect::Reset(0)), "{at:?} {reset:?}");
        let asked = hung.asks(Event::DeviceFailed(0, None, Failure::new(Reason::DeviceFailed, "no reset")));
        let [Effect::Finish(End::Lost(failure))] = &asked[..] else { panic!("{at:?} {asked:?}") };
        assert!(failure.message.contains(says), "{}", failure.message);
    }
}

#[test]
fn a_read_of_a_device_that_its_vmm_drives_does_not_hold_up_the_way_back() {
    let mut machine = Source::new(&[Features::ALL], StopPlan::QuiesceFirst, Driver::Vmm);
    let mut asked = Vec::new();
    for event in [
        Event::Start,
        Event::Recorded(Record::Saving),
        Event::PeerReady,
        Event::SaveStarted,
        Event::Converged,
        Event::Paused,
        // The gate asks, and has no answer.
        Event::DeviceHangs(0, does_not_answer()),
        Event::Recorded(Record::Aborted),
        Event::StreamsClosed,
    ] {
        (machine, asked) = machine.step(event);
    }
    assert_eq!(asked, [Effect::Resume]);
    let (_, asked) = machine.step(Event::Resumed);
    let [Effect::Finish(End::RolledBack(failure))] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!(failure.reason, Reason::DeviceHangs);
    assert!(failure.message.contains("whether its device 0 runs is not known"), "{}", failure.message);
}

#[test]
fn what_the_destination_waits_for_is_passed_on() {
    let mut all = AllSent::new(Driver::Agent);
    let says = Failure::new(Reason::DeviceHangs, "at the destination, vf9");
    let (machine, asked) = all.machine.clone().step(Event::PeerDoubts(says.clone()));
    all.machine = machine;
    assert_eq!(asked, [Effect::Doubt(says.clone())]);
    all.hear(Event::SaveFinished);
    all.hear(Event::Loaded);
    assert_eq!(all.machine.phase(), Phase::AwaitingStarted);
    // By its journal, too, when the stream is lost.
    let word = Word { failure: Some(says.clone()), ..Word::at(Record::Starting) };
    let (_, asked) = all.machine.step(Event::PeerSays(word));
    assert_eq!(asked, [Effect::Doubt(says), Effect::AskPeer]);
}

fn was_reset() -> Failure {
    Failure::new(Reason::DeviceReset, "vf0 was left in PRE_COPY and is in RUNNING")
}

#[test]
fn each_move_says_where_the_device_was_left() {
    let mut hung = Hung::at(MigrationState::PreCopy);
    for (left_in, to) in [
        (MigrationState::Running, MigrationState::PreCopy),
        (MigrationState::PreCopy, MigrationState::PreCopyP2p),
        (MigrationState::PreCopyP2p, MigrationState::StopCopy),
    ] {
        let mut asked = Vec::new();
        let mut machine = Source::new(&[Features::ALL], StopPlan::QuiesceFirst, Driver::Agent);
        let mut events = vec![Event::Start];
        while let Some(event) = events.pop() {
            let (next, effects) = machine.step(event);
            machine = next;
            for effect in effects {
                asked.push(effect.clone());
                events.extend(match effect {
                    Effect::SetState(Move { index, to, .. }) => Some(Event::DeviceReached(index, to)),
                    Effect::Connect => Some(Event::PeerReady),
                    Effect::Record(record) => Some(Event::Recorded(record)),
                    Effect::StartSave => Some(Event::SaveStarted),
                    Effect::PreCopy(index) => Some(Event::PreCopied(index)),
                    Effect::Pause => Some(Event::Paused),
                    _ => None,
                });
            }
        }
        assert!(asked.contains(&moves(0, left_in, to)), "{left_in} -> {to}: {asked:?}");
    }
    // On the way back from where the failure found it.
    hung.hear(Event::DeviceFailed(0, Some(MigrationState::PreCopy), Failure::new(Reason::DeviceFailed, "")));
    hung.hear(Event::Recorded(Record::Aborted));
    let asked = hung.asks(Event::StreamsClosed);
    let both = [0, 1].map(|index| moves(index, MigrationState::PreCopy, MigrationState::Running));
    assert_eq!(asked, both);
}

#[test]
fn a_device_that_its_guest_has_reset_ends_the_migration_and_is_left_as_the_guest_has_it() {
    let mut hung = Hung::at(MigrationState::PreCopyP2p);
    let asked = hung.asks(Event::DeviceFailed(0, Some(MigrationState::Running), was_reset()));
    assert!(asked.contains(&Effect::Record(Record::Aborted)), "{asked:?}");
    hung.hear(Event::Recorded(Record::Aborted));
    let asked = hung.asks(Event::StreamsClosed);
    assert_eq!(asked, [moves(1, MigrationState::PreCopyP2p, MigrationState::RunningP2p)]);
    let asked = hung.asks(Event::DeviceReached(1, MigrationState::RunningP2p));
    assert_eq!(asked, [moves(1, MigrationState::RunningP2p, MigrationState::Running)]);
    assert_eq!(hung.asks(Event::DeviceReached(1, MigrationState::Running)), [Effect::Resume]);
    let asked = hung.asks(Event::Resumed);
    assert_eq!(asked, [Effect::Finish(End::RolledBack(was_reset()))]);
}

#[test]
fn a_device_that_was_reset_while_the_guest_stood_still_is_named_as_one_that_has_lost_its_state() {
    for at in [MigrationState::StopCopy, MigrationState::Stop] {
        let mut hung = Hung::at(MigrationState::StopCopy);
        if at == MigrationState::Stop {
            // Another failure, and the reset is found on the way back.
            hung.hear(Event::DeviceReached(0, MigrationState::StopCopy));
            hung.hear(Event::Failed(Failure::new(Reason::PeerLost, "the destination is lost")));
            hung.hear(Event::Recorded(Record::Aborted));
            hung.hear(Event::StreamsClosed);
            hung.hear(Event::DeviceReached(1, MigrationState::Stop));
            hung.hear(Event::DeviceFailed(0, Some(MigrationState::Running), was_reset()));
        } else {
            hung.hear(Event::DeviceFailed(0, Some(MigrationState::Running), was_reset()));
            hung.hear(Event::Recorded(Record::Aborted));
            hung.hear(Event::StreamsClosed);
            hung.hear(Event::DeviceReached(1, MigrationState::Stop));
        }
        hung.hear(Event::DeviceReached(1, MigrationState::RunningP2p));
        // A second reset loses nothing more, and nothing else would show what the device holds.
        if at == MigrationState::Stop {
            hung.hear(Event::DeviceReached(0, MigrationState::Running));
        }
        hung.hear(Event::DeviceReached(1, MigrationState::Running));
        let asked = hung.asks(Event::Resumed);
        let [Effect::Finish(End::RolledBack(failure))] = &asked[..] else { panic!("{at}: {asked:?}") };
        assert!(failure.message.contains("{0} had to be reset, or were"), "{at}: {failure}");
    }
}

#[test]
fn a_guest_that_was_never_paused_and_has_reset_its_device_needs_no_other_reset() {
    let mut hung = Hung::at(MigrationState::PreCopyP2p);
    let mut early = Source::new(&[Features::ALL], StopPlan::QuiesceFirst, Driver::Agent);
    let mut asked = Vec::new();
    for event in [
        Event::Start,
        Event::Recorded(Record::Saving),
        Event::PeerReady,
        Event::DeviceReached(0, MigrationState::PreCopy),
        Event::Failed(was_reset()),
        Event::Recorded(Record::Aborted),
        Event::StreamsClosed,
    ] {
        (early, asked) = early.step(event);
    }
    assert_eq!(asked, [moves(0, MigrationState::PreCopy, MigrationState::Running)]);
    hung.machine = early;
    let asked = hung.asks(Event::DeviceFailed(0, Some(MigrationState::Running), was_reset()));
    assert_eq!(asked, [Effect::Resume]);
    assert_eq!(hung.asks(Event::Resumed), [Effect::Finish(End::RolledBack(was_reset()))]);
}
