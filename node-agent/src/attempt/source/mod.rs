//! The source's end of an attempt: carries out what the core's state machine decides, and reports to it what
//! came of that.
//!
//! ```text
//!   SourceRun ── abort requests ──▶ SourceAttempt (owns slackwater_handover::source::Source)
//!       └──────── signals ────────▶      │ effects                ▲ signals
//!                                        ▼                        │
//!                                   tasks: vm.rs (VMM, devices), peer.rs (the destination)
//! ```
//!
//! One task owns the machine. Whatever takes time runs in tasks of its own, which answer with a signal. So
//! all devices change state at the same time, and no slow call keeps a failure from the machine.

mod peer;
mod run;
mod timers;
mod vm;

pub use run::{PastTheCommit, Recovered, SourceParts, SourceRun};

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use slackwater_handover::devices::Move;
use slackwater_handover::source::{Effect, End, Event, Found, Source};
use slackwater_handover::{Failure, Reason, Record};
use slackwater_proto::convert;
use slackwater_proto::node::{Finished, Phase as ReportedPhase, Progress};
use tokio::sync::{mpsc, watch};
use tracing::info;

use self::run::AbortRequest;
use self::timers::{Due, Timers};
use super::device::{DeviceOutcome, EndDevice, Hanging, LastStates};
use super::entry::{EndEntry, Ended, Marks};
use super::link::{BlobLink, Decisions, Link};
use super::sending::DeviceSender;
use super::tasks::Tasks;
use crate::faults;
use crate::host::clock::Clock;
use crate::transfer::flow::Flow;
use crate::vmm::DeviceSeen;

/// What the tasks send to the one that owns the machine.
#[derive(Debug)]
enum Signal {
    Event(Event),
    Connected(Box<Link>),
    /// The VMM reports where it has taken a device that it drives.
    DeviceSeen(DeviceSeen),
    /// Such a device has been read.
    DeviceRead(DeviceSeen),
    /// The VMM is to resume its VM, and gives no answer for long.
    VmmSilent(Failure),
    /// All of a device's initial data has been sent; the sender waits for the final data.
    PreCopied(usize, Box<DeviceSender>),
}

impl From<Event> for Signal {
    fn from(event: Event) -> Self {
        Self::Event(event)
    }
}

impl From<DeviceOutcome> for Signal {
    fn from(outcome: DeviceOutcome) -> Self {
        Self::Event(outcome.into())
    }
}

impl From<Hanging> for Signal {
    fn from(hanging: Hanging) -> Self {
        Self::Event(hanging.into())
    }
}

struct SourceAttempt {
    parts: SourceParts,
    tasks: Tasks<Signal>,
    inbox: mpsc::UnboundedReceiver<Signal>,
    decisions: Option<Decisions>,
    /// Of each device whose state is not being sent right now.
    senders: Vec<Option<Box<DeviceSender>>>,
    /// Of each blob; the VMM's is the last.
    flows: Vec<Arc<Flow>>,
    /// The main channel is the first.
    vmm_links: Vec<BlobLink>,
    last_states: LastStates,
    save_started: bool,
    /// The VMM has not confirmed that its save has ended.
    save_open: Arc<AtomicBool>,
    reported_bytes: u64,
    marks: Marks,
    /// Why the machine gives up, if it does: it goes into the journal.
    failure: Option<Failure>,
    /// Why an administrator has stated the destination's word in its place, if one has.
    stated_because: Option<String>,
    /// The pause before the destination is asked the next time.
    ask_pause: Duration,
    /// The VM stays here, and a device that hangs, or a VMM that does not answer, keeps it from running.
    waits: watch::Sender<bool>,
    end: Option<End>,
}

impl SourceAttempt {
    fn new(parts: SourceParts, waits: watch::Sender<bool>) -> Self {
        let (tasks, inbox) = Tasks::new();
        Self {
            last_states: LastStates::running(&parts.devices),
            parts,
            tasks,
            inbox,
            decisions: None,
            senders: Vec::new(),
            flows: Vec::new(),
            vmm_links: Vec::new(),
            save_started: false,
            save_open: Arc::default(),
            reported_bytes: 0,
            marks: Marks::default(),
            failure: None,
            stated_because: None,
            ask_pause: Duration::ZERO,
            waits,
            end: None,
        }
    }

    async fn run(mut self, mut abort_requests: mpsc::Receiver<AbortRequest>) {
        let mut machine = self.machine();
        let mut timers = Timers::start(self.parts.pre_commit_timeout);
        self.watch_vm();
        let mut event = Event::Start;
        loop {
            let before = machine.phase();
            let (next, effects) = machine.step(event);
            machine = next;
            let phase = machine.phase();
            if phase != before {
                faults::halt(faults::End::Source, phase).await;
                timers.enter(phase);
            }
            self.failure = machine.failure().cloned();
            for effect in effects {
                self.perform(effect);
            }
            self.waits.send_replace(machine.waits_for_a_device());
            if let Some(end) = self.end.take() {
                self.finish(end).await;
                return;
            }
            event = self.next_event(&machine, &mut timers, &mut abort_requests).await;
        }
    }

    fn machine(&mut self) -> Source {
        let driver = self.parts.vmm.driver();
        match self.parts.recovered.take() {
            None => {
                self.marks.begin(Clock::now().monotonic_ns);
                Source::new(&self.parts.features, self.parts.plan, driver)
            }
            Some(found) => {
                self.marks = found.marks;
                // It is not known whether the agent before had begun a save; a VMM without one refuses to
                // abort it.
                self.save_started = true;
                let found = Found {
                    record: found.record,
                    devices: found.found,
                    vmm_gone: found.vmm_gone,
                    failure: found.failure,
                };
                Source::recover(&self.parts.features, self.parts.plan, driver, found)
            }
        }
    }

    async fn next_event(
        &mut self,
        machine: &Source,
        timers: &mut Timers,
        abort_requests: &mut mpsc::Receiver<AbortRequest>,
    ) -> Event {
        loop {
            tokio::select! {
                Some(signal) = self.inbox.recv() => {
                    if let Some(event) = self.accept(signal) {
                        return event;
                    }
                }
                due = timers.next(machine.phase()) => match due {
                    Due::Progress => self.report_progress(),
                    Due::GiveUp(failure) => return Event::Failed(failure),
                },
                Some(request) = abort_requests.recv() => {
                    if machine.committed() {
                        let _ = request.answer.send(Err(PastTheCommit));
                    } else {
                        let _ = request.answer.send(Ok(()));
                        return Event::Failed(Failure::new(Reason::Aborted, request.why));
                    }
                }
            }
        }
    }

    /// The event that a signal means to the machine, if it means one.
    fn accept(&mut self, signal: Signal) -> Option<Event> {
        Some(match signal {
            Signal::Event(Event::Relayed(word)) => {
                self.stated_because.clone_from(&word.stated_because);
                Event::Relayed(word)
            }
            Signal::Event(event) => event,
            Signal::Connected(link) => {
                self.connected(*link);
                Event::PeerReady
            }
            Signal::PreCopied(index, sender) => {
                if let Some(place) = self.senders.get_mut(index) {
                    *place = Some(sender);
                }
                Event::PreCopied(index)
            }
            Signal::DeviceSeen(seen) => {
                self.trace(seen);
                return None;
            }
            Signal::VmmSilent(failure) => {
                self.doubt(&failure);
                self.waits.send_replace(true);
                return None;
            }
            Signal::DeviceRead(seen) => {
                self.trace(seen);
                Event::DeviceReached(seen.index, seen.state)
            }
        })
    }

    fn trace(&mut self, seen: DeviceSeen) {
        let device = self.parts.devices.get(seen.index);
        if let Some(traced) = device.and_then(|device| self.last_states.update(device, seen)) {
            self.parts.log.device(traced.at, traced.change);
        }
    }

    fn perform(&mut self, effect: Effect) {
        let tasks = self.tasks.clone();
        match effect {
            Effect::Report(phase) => {
                if let Some(phase) = convert::reported_phase(phase) {
                    self.reach(phase);
                }
            }
            Effect::Connect => tasks.run(self.connect()),
            Effect::Record(record) => self.record(record, false),
            Effect::RecordAgain(record) => self.record(record, true),
            Effect::AskPeer => tasks.run_until_end(self.ask_peer()),
            Effect::Doubt(failure) => self.doubt(&failure),
            Effect::StartSave => tasks.run_guarded(self.start_save(tasks.stream_guard())),
            Effect::Converge => tasks.run_stream(self.converge()),
            Effect::SetState(Move { index, from, to }) => {
                let log = self.parts.log.clone();
                self.run_on(index, |device| {
                    device.set_state(from, to, move |traced| log.device(traced.at, traced.change))
                });
            }
            Effect::ReadState(index) => self.run_on(index, vm::read_state),
            Effect::PreCopy(index) => self.run_sender(index, |sender| vm::pre_copy(index, sender)),
            Effect::Pause => tasks.run(self.call(|vmm| vmm.pause(), Event::Paused, Event::PauseFailed)),
            Effect::FinishSave => tasks.run_guarded(self.finish_save(tasks.stream_guard())),
            Effect::Capture(index) => self.run_sender(index, |sender| vm::capture(index, sender)),
            Effect::SendCommit => {
                if let Some(decisions) = &self.decisions {
                    decisions.commit();
                }
                tasks.run_until_end(self.expect_start());
            }
            Effect::SendAbort(why) => {
                if let Some(decisions) = &self.decisions {
                    decisions.abort(why);
                }
                tasks.detach(self.repeat_abort());
            }
            Effect::CloseStreams => tasks.run(self.close_streams()),
            Effect::Reset(index) => self.run_on(index, EndDevice::reset),
            Effect::Resume => tasks.run(self.take_back()),
            Effect::Release => tasks.run(self.release()),
            Effect::Finish(end) => self.end = Some(end),
        }
    }

    fn record(&self, record: Record, again: bool) {
        let (signals, marks, stated) = (self.tasks.signals(), self.marks, self.stated_because.clone());
        self.parts.ledger.amend(move |entry| {
            if let EndEntry::Source { marks: place, .. } = &mut entry.end {
                *place = marks;
            }
            entry.stated_because = stated;
        });
        self.parts.ledger.record(record, self.failure.clone(), again, move |result| {
            signals.send(match result {
                Ok(()) => Event::Recorded(record),
                Err(failure) => Event::RecordFailed(record, failure),
            });
        });
    }

    fn reach(&mut self, phase: ReportedPhase) {
        let now = Clock::now();
        self.marks.reach(phase, now.monotonic_ns);
        self.parts.log.phase(now, phase);
        info!(migration = self.parts.peer.attempt.migration_id, ?phase, "source");
    }

    fn report_progress(&mut self) {
        let progress =
            Progress { device_bytes: self.device_bytes().iter().sum(), vmm_bytes: self.vmm_bytes() };
        let total = progress.device_bytes + progress.vmm_bytes;
        if total > self.reported_bytes {
            self.reported_bytes = total;
            self.parts.log.progress(Clock::now(), progress);
        }
    }

    fn device_blobs(&self) -> usize {
        self.parts.vmm.driver().device_blobs(self.parts.features.len())
    }

    fn device_bytes(&self) -> Vec<u64> {
        let devices = self.device_blobs();
        self.flows.iter().take(devices).map(|flow| flow.bytes()).collect()
    }

    fn vmm_bytes(&self) -> u64 {
        self.flows.last().map_or(0, |flow| flow.bytes())
    }

    async fn finish(&mut self, end: End) {
        if let Some(phase) = convert::last_phase(&end) {
            self.reach(phase);
        }
        let now = Clock::now();
        let failure = match &end {
            End::Succeeded => None,
            End::RolledBack(failure) | End::Refused(failure) | End::Lost(failure) => Some(failure.clone()),
        };
        let mut finished = Finished::from(end);
        let timings = self.marks.timings(now.monotonic_ns);
        finished.timings = Some(timings);
        finished.device_bytes = self.device_bytes();
        finished.vmm_bytes = self.vmm_bytes();
        info!(
            migration = self.parts.peer.attempt.migration_id,
            outcome = ?finished.outcome(), reason = finished.reason, message = finished.message,
            "source: the migration has ended"
        );
        let ended = Ended::at_source(&finished);
        self.parts.ledger.finish(failure, ended).await;
        self.parts.log.finished(now, finished);
    }
}
