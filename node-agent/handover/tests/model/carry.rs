//! What the agents' shells do: they carry out the effects of the two machines, and turn what happens into events. Effects without an
//! answer are carried out at once, every other one at a time of the checker's choosing; records of one journal keep their order.

use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason, Record, blobs, destination, source};

use crate::mutants::Mutant;
use crate::properties::Rule;
use crate::world::{Back, Config, Ended, Forth, Line, Process, Said, Side, Stream, World};

/// How an effect goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Well,
    /// A device step, by a fault: it is found where it was, in ERROR, or cannot be read (None). Or the twin does not start.
    DeviceFails(Option<bool>),
    /// A write, by a fault; whether the new record stands on the disk all the same.
    WriteFails {
        stands: bool,
    },
}

pub(crate) fn failure(reason: Reason) -> Failure {
    Failure::new(reason, "")
}

impl World {
    pub(crate) fn tell_source(&mut self, config: &Config, event: source::Event) {
        let Some(machine) = self.source.machine.take() else { return };
        let (machine, effects) = machine.step(event);
        self.source.machine = Some(machine);
        let attempt = self.source.attempt;
        for effect in effects {
            if let Some(early) = Mutant::sends_early(config.mutant, &effect) {
                self.send_forth(attempt, early);
            }
            match effect {
                source::Effect::Report(_) | source::Effect::Doubt(_) => {}
                source::Effect::SendCommit => {
                    if !self.source.has_recorded(attempt, Record::Committed) {
                        self.broken.insert(Rule::CommittedFirst);
                    }
                    self.send_forth(attempt, Forth::Commit);
                }
                source::Effect::SendAbort(_) => self.send_forth(attempt, Forth::Abort),
                source::Effect::AskPeer if self.asks() => {
                    self.broken.insert(Rule::AskedTwice);
                }
                effect => self.source.todo.push(effect),
            }
        }
        // An answer that comes later than this is of no matter.
        if self.source.machine.as_ref().is_some_and(|m| m.phase() != source::Phase::AwaitingStarted) {
            self.source.todo.retain(|effect| *effect != source::Effect::AskPeer);
        }
    }

    /// S has asked D what it has journalled, and not heard yet.
    pub(crate) fn asks(&self) -> bool {
        self.source.todo.contains(&source::Effect::AskPeer)
    }

    pub(crate) fn tell_destination(&mut self, config: &Config, event: destination::Event) {
        let Some(machine) = self.destination.machine.take() else { return };
        let (machine, effects) = machine.step(event);
        self.destination.machine = Some(machine);
        let attempt = self.destination.attempt;
        for effect in Mutant::instead(config.mutant, effects) {
            match effect {
                destination::Effect::Report(_) => {}
                destination::Effect::ConfirmReserved => self.reserved = attempt,
                destination::Effect::SendReady => self.send_back(attempt, Back::Ready),
                destination::Effect::SendLoaded => self.send_back(attempt, Back::Loaded),
                destination::Effect::SendStarting => self.send_back(attempt, Back::Starting),
                destination::Effect::SendStarted => self.send_back(attempt, Back::Started),
                destination::Effect::SendFailed(failure) => {
                    let started = failure.reason == Reason::StartFailed;
                    self.send_back(attempt, Back::Failed { started });
                }
                effect => self.destination.todo.push(effect),
            }
        }
    }

    pub(crate) fn carry_out_at_source(&mut self, config: &Config, index: usize, how: How) {
        use source::{Effect, Event};
        let effect = self.source.todo.remove(index);
        let there = self.source.vmm == Process::Alive;
        let vmm_failed = || failure(Reason::VmmFailed);
        let device_failed = |index| Event::DeviceFailed(index, None, failure(Reason::DeviceFailed));
        let event = match effect {
            Effect::Connect => match self.connect() {
                true => return,
                false => Event::Failed(failure(Reason::TargetUnreachable)),
            },
            Effect::Record(record) | Effect::RecordAgain(record) => {
                if self.write(Side::Source, record, how) {
                    Event::Recorded(record)
                } else {
                    Event::RecordFailed(record, failure(Reason::JournalFailed))
                }
            }
            Effect::StartSave if there => Event::SaveStarted,
            Effect::StartSave => Event::Failed(vmm_failed()),
            Effect::SetState(index, _) if !there => device_failed(index),
            Effect::SetState(index, to) => {
                let at = self.source.devices[index];
                if let How::DeviceFails(found) = how {
                    let found = broken_device(&mut self.source.devices[index], found);
                    Event::DeviceFailed(index, found, failure(Reason::DeviceFailed))
                } else {
                    if to == MigrationState::Running || (to == MigrationState::RunningP2p && at.is_stopped())
                    {
                        self.wake();
                    }
                    self.source.devices[index] = to;
                    Event::DeviceReached(index, to)
                }
            }
            Effect::PreCopy(index) if there => Event::PreCopied(index),
            Effect::PreCopy(index) => device_failed(index),
            Effect::Pause if there => {
                self.source.runs = false;
                Event::Paused
            }
            Effect::Pause => Event::PauseFailed(vmm_failed()),
            Effect::FinishSave | Effect::Capture(_) if !there => Event::Failed(vmm_failed()),
            Effect::FinishSave => {
                self.send_blob(slackwater_handover::Blob::Vmm, how);
                Event::SaveFinished
            }
            Effect::Capture(index) => {
                return self.send_blob(slackwater_handover::Blob::Device(index), how);
            }
            Effect::CloseStreams => {
                let sends = |effect: &Effect| {
                    matches!(effect, Effect::PreCopy(_) | Effect::Capture(_) | Effect::FinishSave)
                };
                self.source.todo.retain(|effect| !sends(effect));
                Event::StreamsClosed
            }
            Effect::Reset(index) if !there => device_failed(index),
            Effect::Reset(index) => {
                if how != How::Well {
                    device_failed(index)
                } else {
                    self.wake();
                    self.source.devices[index] = MigrationState::Running;
                    Event::DeviceReached(index, MigrationState::Running)
                }
            }
            Effect::Resume if there => {
                self.wake();
                self.source.runs = true;
                Event::Resumed
            }
            Effect::Resume => Event::ResumeFailed(vmm_failed()),
            Effect::Release => {
                if !self.destination.has_recorded(self.source.attempt, Record::Running) {
                    self.broken.insert(Rule::ReleasedTooEarly);
                }
                if there {
                    self.source.vmm = Process::None;
                }
                self.source.runs = false;
                Event::Released
            }
            Effect::Finish(end) => {
                self.finish_source(&end);
                return;
            }
            // Of VMs whose VMM drives the devices, which this model has none of: the simulation in the agent has.
            Effect::Converge | Effect::ReadState(_) => return,
            // Answered by what is heard: see `hear`.
            Effect::AskPeer => Event::PeerSilent(failure(Reason::PeerLost)),
            Effect::Report(_) | Effect::Doubt(_) | Effect::SendCommit | Effect::SendAbort(_) => return,
        };
        self.tell_source(config, event);
    }

    pub(crate) fn carry_out_at_destination(&mut self, config: &Config, index: usize, how: How) {
        use destination::{Effect, Event};
        let effect = self.destination.todo.remove(index);
        let there = self.destination.vmm == Process::Alive;
        let event = match effect {
            Effect::StartTwin if how != How::Well => Event::Failed(failure(Reason::TwinFailed)),
            Effect::StartTwin => {
                self.destination.vmm = Process::Alive;
                Event::TwinReady
            }
            Effect::SetState(index, _) if !there => {
                Event::DeviceFailed(index, None, failure(Reason::DeviceFailed))
            }
            Effect::SetState(index, to) => {
                if let How::DeviceFails(found) = how {
                    let found = broken_device(&mut self.destination.devices[index], found);
                    Event::DeviceFailed(index, found, failure(Reason::DeviceFailed))
                } else {
                    match to {
                        MigrationState::Resuming => {}
                        MigrationState::Stop => self.believe(config),
                        _ => self.start_something(),
                    }
                    self.destination.devices[index] = to;
                    Event::DeviceReached(index, to)
                }
            }
            Effect::FinishLoad if there => Event::LoadFinished,
            Effect::ConfirmTwin if there => Event::TwinConfirmed,
            Effect::FinishLoad | Effect::ConfirmTwin => Event::Failed(failure(Reason::TwinFailed)),
            Effect::Record(record) | Effect::RecordAgain(record) => {
                if self.write(Side::Destination, record, how) {
                    if record == Record::Loaded {
                        self.believe(config);
                    }
                    Event::Recorded(record)
                } else {
                    Event::RecordFailed(record, failure(Reason::JournalFailed))
                }
            }
            Effect::ActivateIdentity => Event::IdentityActivated,
            Effect::Resume if there => {
                self.start_something();
                self.destination.runs = true;
                Event::Resumed
            }
            Effect::Resume => Event::Failed(failure(Reason::TwinFailed)),
            Effect::Discard => {
                self.check_giving_up();
                self.destination.vmm = Process::None;
                self.destination.runs = false;
                self.destination.devices.fill(MigrationState::Running);
                Event::Discarded
            }
            Effect::Finish(end) => {
                let ended = match end {
                    destination::End::Running => Ended::Succeeded,
                    destination::End::Discarded(_) => Ended::Discarded,
                    destination::End::Stuck(_) => Ended::Lost,
                };
                self.destination.finish(ended);
                self.say(Side::Destination);
                return;
            }
            _ => return,
        };
        self.tell_destination(config, event);
    }

    /// True if a stream has been opened: it was, if D waits for one of this attempt.
    fn connect(&mut self) -> bool {
        let waits = self.destination.machine.as_ref().is_some_and(|machine| machine.takes_blobs());
        if waits
            && self.destination.attempt == self.source.attempt
            && self.stream.is_none()
            && !self.link_down
        {
            let forth = Some(vec![Forth::Hello]);
            self.stream =
                Some(Stream { attempt: self.source.attempt, cut: false, forth, back: Some(Vec::new()) });
            return true;
        }
        false
    }

    fn send_blob(&mut self, blob: slackwater_handover::Blob, how: How) {
        self.send_forth(self.source.attempt, Forth::Blob(blob, how == How::Well));
    }

    /// False if it failed.
    fn write(&mut self, side: Side, record: Record, how: How) -> bool {
        let (journal, told, attempt) = match side {
            Side::Source => (&mut self.source.journal, &mut self.source.told, self.source.attempt),
            Side::Destination => {
                (&mut self.destination.journal, &mut self.destination.told, self.destination.attempt)
            }
        };
        let line = Line { attempt, record, ended: None };
        match how {
            How::WriteFails { stands } => {
                if stands && journal.is_some() {
                    *told = told.or(*journal);
                    *journal = Some(line);
                }
            }
            _ => {
                *journal = Some(line);
                *told = None;
            }
        }
        let stands = *journal == Some(line);
        match (side, record) {
            (Side::Destination, Record::Loaded) if stands => self.loaded = true,
            // One that is not known to stand has started nothing.
            (Side::Destination, Record::Starting) if how == How::Well => {
                self.has_started = true;
                if self.source.runs || self.woken >= attempt {
                    self.broken.insert(Rule::NoFork);
                }
            }
            (Side::Destination, Record::Discarded) if stands && self.has_started => {
                self.broken.insert(Rule::DiscardedTooLate);
            }
            _ => {}
        }
        if how == How::Well {
            self.say(side);
        }
        how == How::Well
    }

    /// What an agent tells of its journal now may be asked for, and relayed.
    pub(crate) fn say(&mut self, side: Side) {
        let said = match side {
            Side::Source => {
                let settles = |line: &Line| matches!(line.record, Record::Committed | Record::Aborted);
                let line = self.source.word().filter(settles);
                line.map(|line| Said::ToDestination { attempt: line.attempt, record: line.record })
            }
            Side::Destination => self.destination.word().map(|line| Said::ToSource {
                attempt: line.attempt,
                record: line.record,
                ended: line.ended.is_some(),
            }),
        };
        self.said.extend(said);
    }

    fn finish_source(&mut self, end: &source::End) {
        let attempt = self.source.attempt;
        let ended = match end {
            source::End::Succeeded => Ended::Succeeded,
            source::End::RolledBack(_) => Ended::RolledBack,
            source::End::Refused(_) => Ended::Refused,
            source::End::Lost(_) => Ended::Lost,
        };
        if matches!(ended, Ended::RolledBack | Ended::Refused) {
            self.said.insert(Said::Release { attempt });
            let whole =
                self.source.runs && self.source.devices.iter().all(|at| *at == MigrationState::Running);
            if self.source.vmm == Process::Alive && !whole {
                self.broken.insert(Rule::HalfRollback);
            }
        }
        self.source.finish(ended);
    }

    /// Something at S is about to run again.
    fn wake(&mut self) {
        let attempt = self.source.attempt;
        if !self.source.has_recorded(attempt, Record::Aborted) {
            self.broken.insert(Rule::AbortedFirst);
        }
        self.woken = attempt;
        if self.has_started {
            self.broken.insert(Rule::NoFork);
        }
    }

    /// Something at D is about to run.
    fn start_something(&mut self) {
        self.has_started = true;
        if !self.destination.has_recorded(self.destination.attempt, Record::Starting) {
            self.broken.insert(Rule::StartingFirst);
        }
    }

    /// D takes what has arrived for the VM.
    fn believe(&mut self, config: &Config) {
        if !blobs(config.devices).all(|blob| self.verified.contains(&blob)) {
            self.broken.insert(Rule::BelievedUnverified);
        }
    }

    /// D is about to give everything back.
    fn check_giving_up(&mut self) {
        let attempt = self.destination.attempt;
        let copy_is_whole = self.loaded
            && self.destination.vmm == Process::Alive
            && self.device_fault != Some(Side::Destination)
            && self.write_fault != Some(Side::Destination);
        let source_keeps_it = self.said.contains(&Said::ToDestination { attempt, record: Record::Aborted })
            || self.said.contains(&Said::Release { attempt });
        if copy_is_whole && !source_keeps_it {
            self.broken.insert(Rule::GivenUpAlone);
        }
    }
}

/// Where a device that fails is found; `in_error`: None if it cannot be read.
fn broken_device(at: &mut MigrationState, in_error: Option<bool>) -> Option<MigrationState> {
    if in_error == Some(true) {
        *at = MigrationState::Error;
    }
    in_error.map(|_| *at)
}
