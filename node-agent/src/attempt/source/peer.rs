//! What the source says to the destination's agent, and hears of it. A function returns the future that
//! carries an effect out.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::source::Event;
use slackwater_handover::{Blob, Failure, Reason};
use slackwater_proto::channel::words;
use slackwater_proto::node::{Doubt, Phase as ReportedPhase};
use slackwater_proto::transfer::HandoverResponse;
use tracing::warn;

use super::{Signal, SourceAttempt};
use crate::attempt::answers::{self, Answer};
use crate::attempt::limits;
use crate::attempt::link::{AnswerStream, Link};
use crate::attempt::sending::DeviceSender;
use crate::attempt::unheard::Unheard;
use crate::host::clock::Clock;

/// The first pause, and the longest, before the destination is asked again what it has journalled.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

impl SourceAttempt {
    pub(super) fn connect(&self) -> impl Future<Output = Signal> + Send + use<> {
        let (peer, devices) = (self.parts.peer.clone(), self.device_blobs());
        let channels = self.parts.budget.channels;
        async move {
            match peer.connect(devices, channels).await {
                Ok(link) => Signal::Connected(Box::new(link)),
                Err(failure) => Signal::Event(Event::Failed(failure)),
            }
        }
    }

    pub(super) fn connected(&mut self, link: Link) {
        self.reach(ReportedPhase::Connected);
        let Link { decisions, blobs, answers } = link;
        self.decisions = Some(decisions);
        // All channels of the VMM's blob share one flow.
        let devices = blobs.iter().filter(|link| link.blob != Blob::Vmm);
        self.flows = devices.chain(blobs.last()).map(|link| Arc::clone(&link.flow)).collect();
        for link in blobs {
            match link.blob {
                Blob::Vmm => self.vmm_links.push(link),
                Blob::Device(index) => {
                    let device = self.device(index);
                    self.senders.push(device.map(|device| Box::new(DeviceSender::new(device, link))));
                }
            }
        }
        self.tasks.detach(self.receive_answers(answers));
    }

    /// Passes on what the destination says, until its stream or the attempt ends.
    fn receive_answers(&self, answers: AnswerStream) -> impl Future<Output = ()> + Send + use<> {
        let AnswerStream { mut messages, clock } = answers;
        let (signals, log) = (self.tasks.signals(), self.parts.log.clone());
        let (peer, vmm) = (self.parts.peer.node.clone(), Arc::clone(&self.parts.vmm));
        async move {
            loop {
                let message = tokio::select! {
                    message = messages.message() => message,
                    () = signals.closed() => return,
                };
                let event = match message {
                    Ok(Some(HandoverResponse { message: Some(message) })) => {
                        match answers::parse(&peer, clock, Clock::now(), message) {
                            Answer::Event(event) => Some(event),
                            Answer::Phase(at, phase, event) => {
                                log.peer_phase(&peer, at, phase);
                                event
                            }
                            Answer::Device(change) => {
                                log.peer_device(&peer, change.at, change.change);
                                None
                            }
                            Answer::Reply(data) => vmm.reply(data).err().map(|error| {
                                Event::Failed(Failure::new(Reason::VmmFailed, error.to_string()))
                            }),
                        }
                    }
                    Ok(Some(HandoverResponse { message: None })) => None,
                    Ok(None) => Some(peer_lost(&peer, "it ended the hand-over's stream")),
                    Err(status) => Some(peer_lost(&peer, &words(&status))),
                };
                let lost =
                    matches!(&event, Some(Event::Failed(failure)) if failure.reason == Reason::PeerLost);
                if let Some(event) = event {
                    signals.send(event);
                }
                if lost {
                    return;
                }
            }
        }
    }

    /// Reports when STARTED takes long. Nothing else follows from that.
    pub(super) fn expect_start(&self) -> impl Future<Output = Event> + Send + use<> {
        let peer = self.parts.peer.node.clone();
        async move {
            tokio::time::sleep(limits::START_EXPECTED).await;
            let message =
                format!("{peer} has not started the VM {:?} after the commit", limits::START_EXPECTED);
            Event::StartOverdue(Failure::new(Reason::TargetSlow, message))
        }
    }

    /// Asks the destination what it has journalled: at once, and after longer and longer pauses when it is
    /// asked again.
    pub(super) fn ask_peer(&mut self) -> impl Future<Output = Event> + Send + use<> {
        let pause = self.ask_pause;
        let (first, longest) = ASK_AGAIN;
        self.ask_pause = (pause * 2).clamp(first, longest);
        let (peer, own) = (self.parts.peer.clone(), self.parts.ledger.state());
        async move {
            tokio::time::sleep(pause).await;
            match peer.settle(own).await {
                Ok(word) => Event::PeerSays(word),
                Err(failure) => Event::PeerSilent(failure),
            }
        }
    }

    /// Says again and again that the VM stays here, until the destination has heard it. The hand-over's
    /// stream may be gone. The operator says it, too. The attempt may end long before.
    pub(super) fn repeat_abort(&self) -> impl Future<Output = ()> + Send + use<> {
        Unheard::new(self.parts.peer.clone(), self.parts.ledger.state()).tell_until_heard()
    }

    /// Reports what keeps the migration from its end.
    pub(super) fn doubt(&self, failure: &Failure) {
        warn!(
            migration = self.parts.peer.attempt.migration_id,
            reason = failure.reason.as_str(),
            message = failure.message,
            "source: the migration cannot come to its end yet"
        );
        self.parts.log.doubt(Clock::now(), Doubt::from(failure));
    }
}

fn peer_lost(peer: &str, why: &str) -> Event {
    Event::Failed(Failure::new(Reason::PeerLost, format!("the destination {peer} was lost: {why}")))
}
