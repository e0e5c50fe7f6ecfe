//! What arrives: messages on the stream, words said outside it, and the news that the stream is broken.

use slackwater_handover::policy::Driver;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Reason, Word, destination, source};

use crate::effects::failure;
use crate::world::{Back, Config, Forth, Said, Side, World};

impl World {
    /// Something that was said outside the stream is heard; at the source in answer to its question, or not.
    pub(crate) fn hear(&mut self, config: &Config, said: Said, answer: bool) {
        match said {
            Said::ToSource { record, ended, .. } => {
                let word = Word { ended, ..Word::at(record) };
                let event = if answer {
                    self.source.todo.retain(|effect| *effect != source::Effect::AskPeer);
                    source::Event::PeerSays(word)
                } else {
                    source::Event::Relayed(word)
                };
                self.source_event(config, event);
            }
            Said::ToDestination { record, .. } => {
                self.destination_event(config, destination::Event::PeerSays(Word::at(record)));
            }
            Said::Release { .. } => {
                let event = destination::Event::AbortReceived(failure(Reason::Released));
                self.destination_event(config, event);
            }
        }
    }

    /// The next message on the stream arrives.
    pub(crate) fn deliver(&mut self, config: &Config, to: Side) {
        let Some(stream) = &mut self.stream else { return };
        match to {
            Side::Destination => {
                let Some(queue) = stream.forth.as_mut().filter(|queue| !queue.is_empty()) else { return };
                let attempt = stream.attempt;
                let event = match queue.remove(0) {
                    Forth::Hello => destination::Event::PeerConnected,
                    Forth::Blob(blob, true) => {
                        if self.destination.machine.as_ref().is_some_and(|machine| machine.takes_blobs()) {
                            self.verified.insert(blob);
                            if config.driver == Driver::Vmm {
                                // The twin loads its devices from its own stream.
                                for device in &mut self.destination.devices {
                                    *device = device.moved(MigrationState::Resuming);
                                }
                            }
                            self.destination_event(config, destination::Event::BlobVerified(blob));
                            self.send_back(attempt, Back::Verified(blob));
                        }
                        return;
                    }
                    Forth::Blob(_, false) => destination::Event::Failed(failure(Reason::BlobRejected)),
                    Forth::Commit => destination::Event::CommitReceived,
                    Forth::Abort => destination::Event::AbortReceived(failure(Reason::Aborted)),
                };
                self.destination_event(config, event);
            }
            Side::Source => {
                let Some(queue) = stream.back.as_mut().filter(|queue| !queue.is_empty()) else { return };
                let event = match queue.remove(0) {
                    Back::Ready => source::Event::PeerReady,
                    Back::Verified(blob) => source::Event::BlobSent(blob),
                    Back::Loaded => source::Event::Loaded,
                    Back::Starting => return,
                    Back::Started => source::Event::Started,
                    Back::Failed { started: true } => source::Event::Failed(failure(Reason::StartFailed)),
                    Back::Failed { started: false } => source::Event::Failed(failure(Reason::TargetFailed)),
                };
                self.source_event(config, event);
            }
        }
    }

    /// The reader at this side notices that the stream is broken.
    pub(crate) fn notice(&mut self, config: &Config, side: Side) {
        self.hang_up(side);
        let lost = failure(Reason::PeerLost);
        match side {
            Side::Source => self.source_event(config, source::Event::Failed(lost)),
            Side::Destination => self.destination_event(config, destination::Event::PeerLost(lost)),
        }
    }
}
