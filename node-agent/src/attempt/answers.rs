//! What the destination's answers mean to the source. Pure.

use bytes::Bytes;
use slackwater_handover::source::Event;
use slackwater_proto::convert;
use slackwater_proto::node::Phase;
use slackwater_proto::transfer::{Clock as WireClock, handover_response::Message};

use super::device::DeviceChange;
use crate::host::clock::Clock;

/// Converts the destination's times to the source's wall clock. The clocks of two nodes may be far apart, and
/// a timeline of both would be out of order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerClock {
    ahead_ns: i64,
}

impl PeerClock {
    /// `ready` was read at the destination when it sent Ready, and `received` here when that arrived.
    pub(super) fn from_ready(ready: Option<WireClock>, received: Clock) -> Self {
        let ahead_ns = ready.map_or(0, |ready| ready.unix_ns.saturating_sub(received.unix_ns));
        Self { ahead_ns }
    }

    /// The destination's time on this node's wall clock; its monotonic clock stays its own. Nothing has
    /// happened after the report of it arrived.
    fn to_local(self, at: Option<WireClock>, received: Clock) -> Clock {
        let at = at.unwrap_or_default();
        let unix_ns = at.unix_ns.saturating_sub(self.ahead_ns).min(received.unix_ns);
        Clock { monotonic_ns: at.monotonic_ns, unix_ns }
    }
}

/// What is to be done with an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Give it to the machine.
    Event(Event),
    /// Report the phase, and give the event, if there is one, to the machine.
    Phase(Clock, Phase, Option<Event>),
    /// Report it.
    Device(DeviceChange),
    /// Give it to the VMM.
    Reply(Bytes),
}

/// Parses an answer of `peer` that was `received` then.
pub(super) fn parse(peer: &str, clock: PeerClock, received: Clock, message: Message) -> Answer {
    let clock = |at| clock.to_local(at, received);
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
        Message::Doubt(doubt) => {
            let message = format!("{peer}: {}", doubt.message);
            Answer::Event(Event::PeerDoubts(convert::failure(&doubt.reason, &message)))
        }
        Message::DeviceStep(step) => {
            let at = clock(step.at);
            Answer::Device(DeviceChange::from_step(step, at))
        }
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
    fn the_times_of_a_destination_whose_clock_is_ahead_are_converted_to_the_sources_clock() {
        let clock = PeerClock::from_ready(at(5, 9_000), Clock { monotonic_ns: 1, unix_ns: 1_010 });
        let received = Clock { monotonic_ns: 500, unix_ns: 1_500 };
        let loaded = Message::Loaded(Loaded { at: at(400, 9_300) });
        let Answer::Phase(when, Phase::Loaded, Some(Event::Loaded)) = parse("b", clock, received, loaded)
        else {
            panic!("another answer")
        };
        assert_eq!(when, Clock { monotonic_ns: 400, unix_ns: 1_310 });
    }

    #[test]
    fn no_time_is_later_than_the_arrival_of_the_report() {
        let clock = PeerClock::from_ready(at(5, 1_000), Clock { monotonic_ns: 1, unix_ns: 1_400 });
        let received = Clock { monotonic_ns: 2, unix_ns: 1_500 };
        assert_eq!(clock.to_local(at(6, 1_200), received).unix_ns, 1_500);
        assert_eq!(
            parse("b", clock, received, Message::Started(Started { at: None })),
            Answer::Event(Event::Started)
        );
    }
}
