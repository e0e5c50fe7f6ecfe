//! What the agents do: they perform the effects of the two machines, and turn what happens into events.
//! Effects without an answer are performed at once, every other one at a time of the explorer's choosing;
//! records of one journal keep their order.

use slackwater_handover::devices::Move;
use slackwater_handover::policy::Driver;
use slackwater_handover::source::Source;
use slackwater_handover::state::{MigrationState, path};
use slackwater_handover::{Blob, Failure, Reason, Record, destination, source};

use crate::kinds::Kind;
use crate::mutants::Mutant;
use crate::properties::Rule;
use crate::rules::{quiesced_together, woken_together};
use crate::world::{Back, Config, Device, Ended, Forth, Line, Process, Said, Save, Side, Stream, World};

/// How an effect goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Well,
    /// A device step fails: the device is found where it was, in ERROR (true), or cannot be read (None). Or
    /// the twin does not start.
    DeviceFails(Option<bool>),
    /// A write fails; whether the disk holds the new record all the same.
    WriteFails {
        stands: bool,
    },
    /// A call, a read or a connection fails.
    CallFails,
}

pub(crate) fn failure(reason: Reason) -> Failure {
    Failure::new(reason, "")
}

impl World {
    pub(crate) fn source_event(&mut self, config: &Config, event: source::Event) {
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
        // An answer that comes later than this changes nothing.
        if self.source.machine.as_ref().is_some_and(|m| m.phase() != source::Phase::AwaitingStarted) {
            self.source.todo.retain(|effect| *effect != source::Effect::AskPeer);
        }
    }

    /// The source has asked the destination what it has journalled, and has no answer yet.
    pub(crate) fn asks(&self) -> bool {
        self.source.todo.contains(&source::Effect::AskPeer)
    }

    pub(crate) fn destination_event(&mut self, config: &Config, event: destination::Event) {
        let Some(machine) = self.destination.machine.take() else { return };
        let (machine, effects) = machine.step(event);
        self.destination.machine = Some(machine);
        let attempt = self.destination.attempt;
        for effect in Mutant::instead(config.mutant, effects) {
            match effect {
                destination::Effect::Report(_) | destination::Effect::Doubt(_) => {}
                destination::Effect::ConfirmReserved => self.reserved = self.reserved.max(attempt),
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

    pub(crate) fn perform_at_source(&mut self, config: &Config, index: usize, how: How) {
        use source::{Effect, Event};
        let effect = self.source.todo.remove(index);
        let device = Kind::device_of_source(&effect);
        if device.is_some_and(|device| self.stuck == Some((Side::Source, device))) {
            self.unstick(Side::Source);
        }
        let there = self.source.vmm == Process::Alive;
        let fails = how == How::CallFails;
        let vmm_failed = || failure(Reason::VmmFailed);
        let device_failed = |index| Event::DeviceFailed(index, None, failure(Reason::DeviceFailed));
        let event = match effect {
            Effect::Connect => match !fails && self.connect() {
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
            Effect::StartSave if there && !fails => {
                self.save = Save::Active;
                Event::SaveStarted
            }
            Effect::StartSave => Event::Failed(vmm_failed()),
            Effect::Converge if there && !fails && self.save == Save::Active => {
                self.source.runs = false;
                for device in &mut self.source.devices {
                    *device = device.moved(MigrationState::StopCopy);
                }
                Event::Converged
            }
            Effect::Converge => Event::Failed(vmm_failed()),
            Effect::ReadState(index) if !there || fails => device_failed(index),
            Effect::ReadState(index) => Event::DeviceReached(index, self.source.devices[index].at),
            Effect::SetState(Move { index, .. }) if !there => device_failed(index),
            Effect::SetState(Move { index, from, to }) => {
                let at = self.source.devices[index].at;
                if !Mutant::takes_it_where_it_is(config.mutant) && at != from {
                    Event::DeviceFailed(index, Some(at), failure(Reason::DeviceReset))
                } else if let How::DeviceFails(found) = how {
                    let aborted = self.source.has_recorded(self.source.attempt, Record::Aborted);
                    let device = &mut self.source.devices[index];
                    device.refused |= aborted;
                    Event::DeviceFailed(index, break_device(device, found), failure(Reason::DeviceFailed))
                } else {
                    let phase = self.source.machine.as_ref().map(Source::phase);
                    let to = Mutant::moves_to(config.mutant, phase, to);
                    self.move_source_device(config, index, to);
                    Event::DeviceReached(index, to)
                }
            }
            // The stream of a session that has ended says so.
            Effect::PreCopy(index) if self.source.devices[index].at != MigrationState::PreCopy && there => {
                Event::Failed(failure(Reason::DeviceReset))
            }
            Effect::PreCopy(index) if there && !fails => Event::PreCopied(index),
            Effect::PreCopy(index) => device_failed(index),
            Effect::Pause if there && !fails => {
                self.source.runs = false;
                Event::Paused
            }
            Effect::Pause => Event::PauseFailed(vmm_failed()),
            Effect::FinishSave | Effect::Capture(_) if !there || fails => Event::Failed(vmm_failed()),
            Effect::FinishSave => {
                self.save = Save::Draining;
                self.capture(Blob::Vmm, how);
                if !config.late_save {
                    self.save = Save::Finished;
                } else if !Mutant::takes_the_stream_for_the_save(config.mutant) {
                    return;
                }
                Event::SaveFinished
            }
            Effect::Capture(index) => {
                if self.source.devices[index].two_sessions {
                    self.broken.insert(Rule::OneSession);
                }
                return self.capture(Blob::Device(index), how);
            }
            Effect::CloseStreams => {
                let sends = |effect: &Effect| {
                    matches!(effect, Effect::PreCopy(_) | Effect::Capture(_) | Effect::FinishSave)
                };
                self.source.todo.retain(|effect| !sends(effect));
                for device in &mut self.source.devices {
                    device.two_sessions = false;
                }
                self.give_save_up(config);
                Event::StreamsClosed
            }
            Effect::Reset(index) if !there => device_failed(index),
            Effect::Reset(index) => {
                if how != How::Well {
                    device_failed(index)
                } else {
                    self.wake();
                    self.source.devices[index] = self.source.devices[index].moved(MigrationState::Running);
                    Event::DeviceReached(index, MigrationState::Running)
                }
            }
            Effect::Resume if there && !fails => return self.resume_source(config),
            Effect::Resume => Event::ResumeFailed(vmm_failed()),
            Effect::Release => {
                let attempt = self.source.attempt;
                let runs = Said::ToSource { attempt, record: Record::Running, ended: true };
                if !self.said.contains(&runs) && !self.destination.has_recorded(attempt, Record::Running) {
                    self.broken.insert(Rule::ReleasedTooEarly);
                }
                if there {
                    self.source.vmm = Process::None;
                }
                self.source.runs = false;
                Event::Released
            }
            Effect::Finish(end) => {
                self.finish_source(&end, how);
                return;
            }
            // Answered by a message: see `messages`.
            Effect::AskPeer => Event::PeerSilent(failure(Reason::PeerLost)),
            Effect::Report(_) | Effect::Doubt(_) | Effect::SendCommit | Effect::SendAbort(_) => return,
        };
        self.source_event(config, event);
    }

    pub(crate) fn perform_at_destination(&mut self, config: &Config, index: usize, how: How) {
        use destination::{Effect, Event};
        let effect = self.destination.todo.remove(index);
        let device = Kind::device_of_destination(&effect);
        if device.is_some_and(|device| self.stuck == Some((Side::Destination, device))) {
            self.unstick(Side::Destination);
        }
        let there = self.destination.vmm == Process::Alive;
        let fails = how == How::CallFails;
        let device_failed = |index| Event::DeviceFailed(index, None, failure(Reason::DeviceFailed));
        let event = match effect {
            Effect::StartTwin if how != How::Well => Event::Failed(failure(Reason::TwinFailed)),
            Effect::StartTwin => {
                self.destination.vmm = Process::Alive;
                Event::TwinReady
            }
            Effect::SetState(Move { index, .. }) | Effect::Check(index) if !there => device_failed(index),
            Effect::SetState(Move { index, from, to }) => {
                let at = self.destination.devices[index].at;
                if at != from {
                    Event::DeviceFailed(index, Some(at), failure(Reason::DeviceReset))
                } else if let How::DeviceFails(found) = how {
                    let found = break_device(&mut self.destination.devices[index], found);
                    Event::DeviceFailed(index, found, failure(Reason::DeviceFailed))
                } else {
                    self.move_destination_device(config, index, to);
                    Event::DeviceReached(index, to)
                }
            }
            Effect::Check(index) if how != How::Well => device_failed(index),
            Effect::Check(index) => {
                if self.destination.devices[index].at != MigrationState::Resuming {
                    self.broken.insert(Rule::BelievedUnverified);
                }
                self.believe(config);
                self.destination.devices[index] = self.destination.devices[index].moved(MigrationState::Stop);
                Event::DeviceReached(index, MigrationState::Stop)
            }
            Effect::FinishLoad if there && !fails => Event::LoadFinished,
            Effect::ConfirmTwin if there && !fails => Event::TwinConfirmed,
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
            Effect::ActivateIdentity if fails => Event::Failed(failure(Reason::TwinFailed)),
            Effect::ActivateIdentity => Event::IdentityActivated,
            Effect::Resume if there && !fails => {
                self.start_something();
                self.resume_twin(config);
                Event::Resumed
            }
            Effect::Resume => Event::Failed(failure(Reason::TwinFailed)),
            Effect::Discard => {
                self.check_giving_up();
                self.unstick(Side::Destination);
                self.destination.todo.retain(|effect| Kind::device_of_destination(effect).is_none());
                self.destination.vmm = Process::None;
                self.destination.runs = false;
                self.destination.devices.fill(Device::RUNNING);
                Event::Discarded
            }
            Effect::Finish(end) => {
                let ended = match end {
                    destination::End::Running => Ended::Succeeded,
                    destination::End::Discarded(_) => Ended::Discarded,
                    destination::End::Stuck(_) => Ended::Lost,
                };
                match how {
                    How::Well => self.destination.finish(ended),
                    _ => self.destination.fail_to_finish(ended),
                }
                self.say(Side::Destination);
                return;
            }
            _ => return,
        };
        self.destination_event(config, event);
    }

    /// The guest resets one of its devices.
    pub(crate) fn guest_resets(&mut self, index: usize) {
        let reset = self.source.devices[index].moved(MigrationState::Running);
        self.source.devices[index] = Device { two_sessions: true, ..reset };
    }

    /// The call to a device, which has begun, does not return in its time.
    pub(crate) fn hang(&mut self, config: &Config, side: Side, index: usize) {
        self.stuck = Some((side, index));
        match side {
            Side::Source => {
                let mut to = None;
                for effect in &self.source.todo {
                    match effect {
                        source::Effect::SetState(ordered) if ordered.index == index => to = Some(ordered.to),
                        source::Effect::SetState(ordered) if ordered.to == MigrationState::Running => {
                            self.source.devices[ordered.index].sent_to_run = true;
                        }
                        _ => {}
                    }
                }
                let device = &mut self.source.devices[index];
                device.hangs = to.or(Some(device.at));
                device.late = true;
                if let Some(event) = Mutant::hangs(config.mutant, index) {
                    self.source_event(config, event);
                }
            }
            Side::Destination => {
                let mut to = None;
                for effect in &self.destination.todo {
                    match effect {
                        destination::Effect::SetState(ordered) if ordered.index == index => {
                            to = Some(ordered.to);
                        }
                        destination::Effect::SetState(ordered) if ordered.to == MigrationState::Running => {
                            self.destination.devices[ordered.index].sent_to_run = true;
                        }
                        _ => {}
                    }
                }
                let device = &mut self.destination.devices[index];
                device.hangs = to.or(Some(device.at));
                let event = destination::Event::DeviceHangs(index, failure(Reason::DeviceHangs));
                self.destination_event(config, event);
            }
        }
    }

    /// True if a stream has been opened: it was, if the destination waits for one of this attempt.
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

    /// Final state is read and sent.
    fn capture(&mut self, blob: Blob, how: How) {
        if self.source.runs || !self.source.devices.iter().all(|device| device.at.is_stopped()) {
            self.broken.insert(Rule::SlackWater);
        }
        self.send_forth(self.source.attempt, Forth::Blob(blob, how == How::Well));
    }

    /// The VMM's save comes to its end after its last byte, well or not.
    pub(crate) fn end_save(&mut self, config: &Config, well: bool) {
        let event = if well {
            self.save = Save::Finished;
            source::Event::SaveFinished
        } else {
            self.give_save_up(config);
            source::Event::Failed(failure(Reason::VmmFailed))
        };
        self.source_event(config, event);
    }

    /// The save is given up, if it has not ended. A VMM that drives its devices takes the VM back by itself.
    pub(crate) fn give_save_up(&mut self, config: &Config) {
        let active = matches!(self.save, Save::Active | Save::Draining);
        self.save = if active { Save::None } else { self.save };
        if active && config.driver == Driver::Vmm && self.source.vmm == Process::Alive {
            self.take_back();
        }
    }

    /// A VMM that drives its devices lets the VM run at the source.
    fn take_back(&mut self) {
        self.source.devices.fill(Device::RUNNING);
        self.source.runs = true;
        self.wakes_at_source();
    }

    fn resume_source(&mut self, config: &Config) {
        self.wake();
        if config.driver == Driver::Vmm {
            self.source.devices.fill(Device::RUNNING);
            for index in 0..self.source.devices.len() {
                self.source_event(config, source::Event::DeviceReached(index, MigrationState::Running));
            }
        }
        // What a VMM does with its own devices, it does before.
        if !self.source.devices_run() || self.source.devices.iter().any(|device| device.hangs.is_some()) {
            self.broken.insert(Rule::WakeTogether);
        }
        self.source.runs = true;
        self.source_event(config, source::Event::Resumed);
    }

    fn resume_twin(&mut self, config: &Config) {
        // An agent that has restarted may find that the twin runs already.
        if config.driver == Driver::Vmm && !self.destination.runs {
            // A device that was not checked holds a state that its driver may have refused.
            if !self.destination.devices.iter().all(|device| device.at == MigrationState::Stop) {
                self.broken.insert(Rule::BelievedUnverified);
            }
            self.destination.devices.fill(Device::RUNNING);
        }
        if !self.destination.devices_run() {
            self.broken.insert(Rule::WakeTogether);
        }
        self.destination.runs = true;
    }

    fn move_source_device(&mut self, config: &Config, index: usize, to: MigrationState) {
        let at = self.source.devices[index].at;
        let Ok(way) = path(config.features[index], at, to) else {
            self.broken.insert(Rule::IllegalMove);
            return;
        };
        let aborted = self.source.has_recorded(self.source.attempt, Record::Aborted);
        let settles = self.source.machine.as_ref().is_some_and(|m| m.phase() == source::Phase::Settling);
        if (aborted || settles) && to != MigrationState::StopCopy {
            if !woken_together(config, &self.source.devices, index, &way) {
                self.broken.insert(Rule::WakeTogether);
            }
        } else if !quiesced_together(config, &self.source.devices, &way) {
            self.broken.insert(Rule::QuiesceTogether);
        }
        if to == MigrationState::Running || (to == MigrationState::RunningP2p && at.is_stopped()) {
            self.wake();
        }
        self.source.devices[index] = self.source.devices[index].moved(to);
    }

    fn move_destination_device(&mut self, config: &Config, index: usize, to: MigrationState) {
        let at = self.destination.devices[index].at;
        let Ok(way) = path(config.features[index], at, to) else {
            self.broken.insert(Rule::IllegalMove);
            return;
        };
        match to {
            MigrationState::Resuming => {}
            MigrationState::Stop => self.believe(config),
            _ => {
                if !woken_together(config, &self.destination.devices, index, &way) {
                    self.broken.insert(Rule::WakeTogether);
                }
                self.start_something();
            }
        }
        self.destination.devices[index] = self.destination.devices[index].moved(to);
    }

    /// False if it failed.
    fn write(&mut self, side: Side, record: Record, how: How) -> bool {
        let (journal, shown, attempt) = match side {
            Side::Source => (&mut self.source.journal, &mut self.source.shown, self.source.attempt),
            Side::Destination => {
                (&mut self.destination.journal, &mut self.destination.shown, self.destination.attempt)
            }
        };
        let line = Line { attempt, record, ended: None };
        match how {
            How::WriteFails { stands } => {
                if stands && journal.is_some() {
                    *shown = shown.or(*journal);
                    *journal = Some(line);
                }
            }
            _ => {
                *journal = Some(line);
                *shown = None;
            }
        }
        let stands = *journal == Some(line);
        match (side, record) {
            (Side::Destination, Record::Loaded) if stands => self.loaded = true,
            // One that is not known to be on the disk has started nothing.
            (Side::Destination, Record::Starting) if how == How::Well => {
                if self.source.runs || self.woken >= attempt || attempt != self.attempt {
                    self.broken.insert(Rule::NoFork);
                }
                self.started.insert(attempt);
                self.check_never_started(attempt);
            }
            (Side::Destination, Record::Discarded) if stands && self.started.contains(&attempt) => {
                self.broken.insert(Rule::DiscardedTooLate);
            }
            _ => {}
        }
        if how == How::Well {
            self.say(side);
        }
        how == How::Well
    }

    /// What an agent says about its journal now can be asked for, and relayed.
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

    fn finish_source(&mut self, end: &source::End, how: How) {
        let attempt = self.source.attempt;
        let ended = match end {
            source::End::Succeeded => Ended::Succeeded,
            source::End::RolledBack(_) => Ended::RolledBack,
            source::End::Refused(_) => Ended::Refused,
            source::End::Lost(_) => Ended::Lost,
        };
        if matches!(ended, Ended::RolledBack | Ended::Refused) {
            self.said.insert(Said::Release { attempt });
            let whole = self.source.runs && self.source.devices_run();
            if self.source.vmm == Process::Alive && !whole {
                self.broken.insert(Rule::HalfRollback);
            }
        }
        match how {
            How::Well => self.source.finish(ended),
            _ => self.source.fail_to_finish(ended),
        }
    }

    /// The end of an attempt is written after all.
    pub(crate) fn record_end(&mut self, side: Side) {
        match side {
            Side::Source => {
                if let Some(ended) = self.source.unrecorded {
                    self.source.finish(ended);
                }
            }
            Side::Destination => {
                if let Some(ended) = self.destination.unrecorded {
                    self.destination.finish(ended);
                    self.say(side);
                }
            }
        }
    }
}

/// Where a device that fails is found; `in_error`: None if it cannot be read.
fn break_device(device: &mut Device, in_error: Option<bool>) -> Option<MigrationState> {
    if in_error == Some(true) {
        device.at = MigrationState::Error;
    }
    in_error.map(|_| device.at)
}
