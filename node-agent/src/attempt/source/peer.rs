//! What the source has to do with the destination's agent.

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::source::Event;
use slackwater_handover::{Blob, Failure, Reason, Record, Word};
use slackwater_proto::channel::words;
use slackwater_proto::node::{Doubt, Phase as ToldPhase};
use slackwater_proto::transfer::HandoverResponse;
use tracing::warn;

use super::{Shell, Signal};
use crate::attempt::answers::{self, Answer};
use crate::attempt::limits;
use crate::attempt::link::{Answers, Link};
use crate::attempt::pump::DevicePump;
use crate::host::clock::Clock;

/// The pause before the destination is asked again what it has journalled: the first, and the longest.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The pause before the destination is told once more that the VM stays here, and for how long that is tried.
const TELL_AGAIN: Duration = Duration::from_secs(1);
const TELL_LIMIT: Duration = Duration::from_secs(600);

impl Shell {
    pub(super) fn connect(&self) {
        let (peer, devices, signals) = (self.parts.peer.clone(), self.device_blobs(), self.signals.clone());
        let channels = self.parts.budget.channels;
        tokio::spawn(async move {
            let signal = match peer.connect(devices, channels).await {
                Ok(link) => Signal::Connected(Box::new(link)),
                Err(failure) => Signal::Event(Event::Failed(failure)),
            };
            let _ = signals.send(signal);
        });
    }

    pub(super) fn connected(&mut self, link: Link) {
        self.reach(ToldPhase::Connected);
        let (decisions, blobs, answers) = link.split();
        self.decisions = Some(decisions);
        // All channels of the VMM's share one.
        let devices = blobs.iter().filter(|link| link.blob != Blob::Vmm);
        self.flows = devices.chain(blobs.last()).map(|link| Arc::clone(&link.flow)).collect();
        for link in blobs {
            match link.blob {
                Blob::Vmm => self.vmm_links.push(link),
                Blob::Device(index) => {
                    let device = self.parts.devices.get(index).cloned();
                    self.pumps.push(device.map(|device| Box::new(DevicePump::new(device, link))));
                }
            }
        }
        self.hear(answers);
    }

    /// Passes on what the destination says, until it says nothing more.
    pub(super) fn hear(&self, answers: Answers) {
        let Answers { mut stream, peer_clock } = answers;
        let (signals, log, peer) =
            (self.signals.clone(), self.parts.log.clone(), self.parts.peer.node.clone());
        let vmm = Arc::clone(&self.parts.vmm);
        tokio::spawn(async move {
            loop {
                let said = tokio::select! {
                    said = stream.message() => said,
                    () = signals.closed() => return,
                };
                let event = match said {
                    Ok(Some(HandoverResponse { message: Some(message) })) => {
                        match answers::understand(&peer, peer_clock, Clock::now(), message) {
                            Answer::Event(event) => Some(event),
                            Answer::Phase(at, phase, event) => {
                                log.peer_phase(&peer, at, phase);
                                event
                            }
                            Answer::Device(at, change) => {
                                log.peer_device(&peer, at, change);
                                None
                            }
                            Answer::Reply(said) => vmm.reply(said).err().map(|error| {
                                Event::Failed(Failure::new(Reason::VmmFailed, error.to_string()))
                            }),
                        }
                    }
                    Ok(Some(HandoverResponse { message: None })) => None,
                    Ok(None) => Some(lost(&peer, "it ended the hand-over's stream")),
                    Err(status) => Some(lost(&peer, &words(&status))),
                };
                let over =
                    matches!(&event, Some(Event::Failed(failure)) if failure.reason == Reason::PeerLost);
                if let Some(event) = event {
                    let _ = signals.send(Signal::Event(event));
                }
                if over {
                    return;
                }
            }
        });
    }

    /// Says so when STARTED takes long. Nothing else follows from that.
    pub(super) fn expect_start(&self) {
        let (signals, peer) = (self.signals.clone(), self.parts.peer.node.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(limits::START_EXPECTED) => {
                    let message = format!("{peer} has not started the VM {:?} after the commit", limits::START_EXPECTED);
                    let overdue = Event::StartOverdue(Failure::new(Reason::TargetSlow, message));
                    let _ = signals.send(Signal::Event(overdue));
                }
                () = signals.closed() => {}
            }
        });
    }

    /// Asks at once, and later and later when it is asked again.
    pub(super) fn ask_peer(&mut self) {
        let pause = self.ask_pause;
        let (first, longest) = ASK_AGAIN;
        self.ask_pause = (pause * 2).clamp(first, longest);
        let (peer, own, signals) = (self.parts.peer.clone(), self.parts.ledger.state(), self.signals.clone());
        tokio::spawn(async move {
            let answered = async {
                tokio::time::sleep(pause).await;
                peer.settle(own).await
            };
            let event = tokio::select! {
                answer = answered => match answer {
                    Ok(word) => Event::PeerSays(word),
                    Err(failure) => Event::PeerSilent(failure),
                },
                () = signals.closed() => return,
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    /// The hand-over's stream may be gone, and a destination at LOADED gives nothing back before it has heard this. The operator
    /// tells it, too.
    pub(super) fn tell_aborted(&self) {
        let (peer, own) = (self.parts.peer.clone(), self.parts.ledger.state());
        tokio::spawn(async move {
            let (mut pause, longest) = (TELL_AGAIN, ASK_AGAIN.1);
            let told = async {
                loop {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(longest);
                    let heard = peer.settle(own.clone()).await;
                    if matches!(heard, Ok(Word { record: None | Some(Record::Discarded), .. })) {
                        return;
                    }
                }
            };
            // The machine may have come to its end long since.
            let _ = tokio::time::timeout(TELL_LIMIT, told).await;
        });
    }

    pub(super) fn doubt(&self, failure: &Failure) {
        warn!(
            migration = self.parts.peer.attempt.migration_id,
            reason = failure.reason.as_str(),
            message = failure.message,
            "source: the migration cannot come to its end yet"
        );
        let doubt = Doubt { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() };
        self.parts.log.doubt(Clock::now(), doubt);
    }
}

fn lost(peer: &str, why: &str) -> Event {
    Event::Failed(Failure::new(Reason::PeerLost, format!("the destination {peer} was lost: {why}")))
}
