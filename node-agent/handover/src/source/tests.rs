use super::{Effect, End, Event, Source};
use crate::policy::{Driver, StopPlan};
use crate::state::{Features, MigrationState};
use crate::{Blob, Record};

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
        assert_eq!(all.machine.phase(), super::Phase::Capturing);
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
            Effect::SetState(index, to) => Event::DeviceReached(index, to),
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
