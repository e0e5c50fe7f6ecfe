//! What the destination's answers mean to the source. Pure.

use bytes::Bytes;
use slackwater_handover::source::Event;
use slackwater_proto::convert;
use slackwater_proto::node::{DeviceStateChange, Phase};
use slackwater_proto::transfer::{Clock as WireClock, handover_response::Message};

use crate::host::clock::Clock;

/// Puts the destination's times on the source's wall clock. Two nodes' clocks may be far apart, and a timeline of both would be
/// out of order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerClock {
    ahead_ns: i64,
}

impl PeerClock {
    /// `ready` was read at the destination when it sent Ready, and `heard` here when that was heard.
    pub(super) fn learn(ready: Option<WireClock>, heard: Clock) -> Self {
        let ahead_ns = ready.map_or(0, |ready| ready.unix_ns.saturating_sub(heard.unix_ns));
        Self { ahead_ns }
    }

    /// The destination's time on our wall clock; its monotonic clock stays its own. Nothing has happened after it was heard of.
    fn ours(self, at: Option<WireClock>, heard: Clock) -> Clock {
        let at = at.unwrap_or_default();
        let unix_ns = at.unix_ns.saturating_sub(self.ahead_ns).min(heard.unix_ns);
        Clock { monotonic_ns: at.monotonic_ns, unix_ns }
    }
}

/// What is to be done with an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Tell the machine.
    Event(Event),
    /// Tell whoever watches, and, if there is one, the event to the machine.
    Phase(Clock, Phase, Option<Event>),
    /// Tell whoever watches.
    Device(Clock, DeviceStateChange),
    /// Hand it to the VMM.
    Reply(Bytes),
}

/// Reads one answer of `peer`.
pub(super) fn understand(peer: &str, clock: PeerClock, heard: Clock, message: Message) -> Answer {
    let clock = |at| clock.ours(at, heard);
    match message {
        Message::VmmReply(reply) => Answer::Reply(reply.data),
        Message::Ready(_) => Answer::Event(Event::PeerReady),
        Message::Loaded(loaded) => Answer::Phase(clock(loaded.at), Phase::Loaded, Some(Event::Loaded)),
        Message::Starting(starting) => Answer::Phase(clock(starting.at), Phase::Starting, None),
        Message::Started(_) => Answer::Event(Event::Started),
        Message::Failed(failed) => {
            let message = format!("{peer}: {}", failed.message);
            Answer::Event(Event::Failed(convert::failure(&failed.reason, &message)))
        }
        Message::DeviceStep(step) => Answer::Device(
            clock(step.at),
            DeviceStateChange { device: step.device, from: step.from, to: step.to, took_ns: step.took_ns },
        ),
    }
}

#[cfg(test)]
mod tests {
    use slackwater_proto::transfer::{Loaded, Started};

    use super::*;

    fn at(monotonic_ns: u64, unix_ns: i64) -> Option<WireClock> {
        Some(WireClock { monotonic_ns, unix_ns })
    }

    #[test]
    fn a_destination_whose_clock_is_ahead_is_told_on_the_sources_clock() {
        let clock = PeerClock::learn(at(5, 9_000), Clock { monotonic_ns: 1, unix_ns: 1_010 });
        let heard = Clock { monotonic_ns: 500, unix_ns: 1_500 };
        let loaded = Message::Loaded(Loaded { at: at(400, 9_300) });
        let Answer::Phase(told, Phase::Loaded, Some(Event::Loaded)) = understand("b", clock, heard, loaded)
        else {
            panic!("not understood")
        };
        assert_eq!(told, Clock { monotonic_ns: 400, unix_ns: 1_310 });
    }

    #[test]
    fn nothing_is_told_to_have_happened_after_it_was_heard_of() {
        let clock = PeerClock::learn(at(5, 1_000), Clock { monotonic_ns: 1, unix_ns: 1_400 });
        let heard = Clock { monotonic_ns: 2, unix_ns: 1_500 };
        assert_eq!(clock.ours(at(6, 1_200), heard).unix_ns, 1_500);
        assert_eq!(
            understand("b", clock, heard, Message::Started(Started { at: None })),
            Answer::Event(Event::Started)
        );
    }
}
