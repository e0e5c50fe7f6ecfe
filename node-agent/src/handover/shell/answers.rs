//! What the destination's answers mean to the source. Pure.

use slackwater_proto::node::{DeviceStateChange, Phase};
use slackwater_proto::transfer::{Clock as WireClock, handover_response::Message};

use crate::handover::source::Event;
use crate::handover::{Failure, Reason};
use crate::host::clock::Clock;

/// What is to be done with an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Tell the machine.
    Event(Event),
    /// Tell whoever watches, and, if there is one, the event to the machine.
    Phase(Clock, Phase, Option<Event>),
    /// Tell whoever watches.
    Device(Clock, DeviceStateChange),
}

/// Reads one answer of `peer`.
pub(super) fn understand(peer: &str, message: Message) -> Answer {
    match message {
        Message::Ready(_) => Answer::Event(Event::PeerReady),
        Message::Loaded(loaded) => Answer::Phase(clock(loaded.at), Phase::Loaded, Some(Event::Loaded)),
        Message::Starting(starting) => Answer::Phase(clock(starting.at), Phase::Starting, None),
        Message::Started(_) => Answer::Event(Event::Started),
        Message::Failed(failed) => {
            let reason = if failed.reason == Reason::StartFailed.as_str() {
                Reason::StartFailed
            } else {
                Reason::TargetFailed
            };
            Answer::Event(Event::Failed(Failure::new(reason, format!("{peer}: {}", failed.message))))
        }
        Message::DeviceStep(step) => Answer::Device(
            clock(step.at),
            DeviceStateChange { device: step.device, from: step.from, to: step.to, took_ns: step.took_ns },
        ),
    }
}

fn clock(at: Option<WireClock>) -> Clock {
    let at = at.unwrap_or_default();
    Clock { monotonic_ns: at.monotonic_ns, unix_ns: at.unix_ns }
}
