//! Performs what the source's state machine decides, and tells it what came of it.
//!
//! One task owns the machine. Everything that takes time runs in tasks of its own, which answer by a signal; so every device
//! changes state at the same time as the others, and nothing can keep the machine from hearing of a failure.

mod peer;
mod run;
mod vm;

pub use run::{PastTheCommit, Recovered, SourceParts, SourceRun};
use slackwater_handover::policy::Driver;
use slackwater_handover::source::{Effect, End, Event, Found, Phase, Source};
use slackwater_handover::{Failure, Reason, Record};

use std::sync::Arc;
use std::time::Duration;

use slackwater_proto::node::{Outcome, Phase as ToldPhase, Progress};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use self::run::AbortWish;
use super::link::{BlobLink, Decisions, Link};
use super::pump::DevicePump;
use super::{Seen, limits, phases, resume};
use crate::attempt::entry::{EndEntry, Ended, Marks};
use crate::faults;
use crate::host::clock::Clock;
use crate::transfer::flow::Flow;
use crate::vmm::DeviceSeen;

/// How often progress is told while bytes are moving.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What the tasks tell the machine's task.
#[derive(Debug)]
enum Signal {
    Event(Event),
    Connected(Box<Link>),
    /// A device that its VMM drives: the VMM has told where it took it.
    Seen(DeviceSeen),
    /// The same, read back.
    Looked(DeviceSeen),
    /// A pump has drained a device's initial data, and waits for the final data.
    PreCopied(usize, Box<DevicePump>),
}

struct Shell {
    parts: SourceParts,
    signals: mpsc::UnboundedSender<Signal>,
    heard: mpsc::UnboundedReceiver<Signal>,
    decisions: Option<Decisions>,
    pumps: Vec<Option<Box<DevicePump>>>,
    /// Of each blob; the VMM's own comes last.
    flows: Vec<Arc<Flow>>,
    /// The main one first.
    vmm_links: Vec<BlobLink>,
    seen: Seen,
    streams: CancellationToken,
    stream_tasks: TaskTracker,
    save_started: bool,
    told_progress: u64,
    marks: Marks,
    /// Why the machine gives up, if it does: it goes into the journal.
    failure: Option<Failure>,
    /// An administrator has stated the destination's word, and why.
    stated: Option<String>,
    /// The pause before the destination is asked the next time.
    ask_pause: Duration,
    end: Option<End>,
}

impl Shell {
    fn new(parts: SourceParts) -> Self {
        let (signals, heard) = mpsc::unbounded_channel();
        Self {
            seen: Seen::new(&parts.devices),
            parts,
            signals,
            heard,
            decisions: None,
            pumps: Vec::new(),
            flows: Vec::new(),
            vmm_links: Vec::new(),
            streams: CancellationToken::new(),
            stream_tasks: TaskTracker::new(),
            save_started: false,
            told_progress: 0,
            marks: Marks::default(),
            failure: None,
            stated: None,
            ask_pause: Duration::ZERO,
            end: None,
        }
    }

    async fn run(mut self, mut wishes: mpsc::Receiver<AbortWish>) {
        let mut machine = self.machine();
        let deadline = tokio::time::sleep(self.parts.pre_commit_timeout);
        tokio::pin!(deadline);
        let mut deadline_passed = false;
        let phase_limit = tokio::time::sleep(Duration::MAX);
        tokio::pin!(phase_limit);
        let mut bounded: Option<(Phase, Duration)> = None;
        let mut progress = tokio::time::interval(PROGRESS_EVERY);
        self.watch_vmm();
        self.watch_devices();
        let mut event = Event::Start;
        loop {
            let before = machine.phase();
            let (next, effects) = machine.step(event);
            machine = next;
            let phase = machine.phase();
            if phase != before {
                faults::halt(faults::End::Source, phase).await;
                bounded = limits::of(phase).map(|limit| (phase, limit));
                if let Some((_, limit)) = bounded {
                    phase_limit.as_mut().reset(tokio::time::Instant::now() + limit);
                }
            }
            self.failure = machine.failure().cloned();
            for effect in effects {
                self.perform(effect);
            }
            if let Some(end) = self.end.take() {
                self.finish(end).await;
                return;
            }
            event = loop {
                tokio::select! {
                    Some(signal) = self.heard.recv() => {
                        if let Some(event) = self.accept(signal) {
                            break event;
                        }
                    }
                    () = &mut deadline, if !deadline_passed => {
                        deadline_passed = true;
                        let message = format!(
                            "the migration was not committed within {:?} (preCommitTimeout); it stood in {:?}",
                            self.parts.pre_commit_timeout, machine.phase()
                        );
                        break Event::Failed(Failure::new(Reason::TimedOut, message));
                    }
                    () = &mut phase_limit, if bounded.is_some() => {
                        let Some((phase, limit)) = bounded.take() else { continue };
                        let message = format!("the migration stood in {phase:?} for {limit:?}, and was given up");
                        break Event::Failed(Failure::new(Reason::TimedOut, message));
                    }
                    Some(wish) = wishes.recv() => {
                        if machine.committed() {
                            let _ = wish.answer.send(Err(PastTheCommit));
                        } else {
                            let _ = wish.answer.send(Ok(()));
                            break Event::Failed(Failure::new(Reason::Aborted, wish.why));
                        }
                    }
                    _ = progress.tick() => self.tell_progress(),
                }
            };
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
                // Whether the agent before had begun a save is not known; a VMM without one refuses to abort it.
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

    fn accept(&mut self, signal: Signal) -> Option<Event> {
        Some(match signal {
            Signal::Event(Event::Relayed(word)) => {
                self.stated.clone_from(&word.stated_because);
                Event::Relayed(word)
            }
            Signal::Event(event) => event,
            Signal::Connected(link) => {
                self.connected(*link);
                Event::PeerReady
            }
            Signal::PreCopied(index, pump) => {
                if let Some(place) = self.pumps.get_mut(index) {
                    *place = Some(pump);
                }
                Event::PreCopied(index)
            }
            Signal::Seen(seen) => {
                self.trace(seen);
                return None;
            }
            Signal::Looked(seen) => {
                self.trace(seen);
                Event::DeviceReached(seen.index, seen.state)
            }
        })
    }

    fn trace(&mut self, seen: DeviceSeen) {
        let device = self.parts.devices.get(seen.index);
        if let Some(change) = device.and_then(|device| self.seen.change(device, seen)) {
            self.parts.log.device(seen.at, change);
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Report(phase) => {
                if let Some(phase) = phases::told(phase) {
                    self.reach(phase);
                }
            }
            Effect::Connect => self.connect(),
            Effect::Record(record) => self.record(record, false),
            Effect::RecordAgain(record) => self.record(record, true),
            Effect::AskPeer => self.ask_peer(),
            Effect::Doubt(failure) => self.doubt(&failure),
            Effect::StartSave => self.start_save(),
            Effect::Converge => self.converge(),
            Effect::SetState(index, to) => self.set_state(index, to),
            Effect::ReadState(index) => self.read_state(index),
            Effect::PreCopy(index) => self.pre_copy(index),
            Effect::Pause => self.call(|vmm| vmm.pause(), Event::Paused, Event::PauseFailed),
            Effect::FinishSave => self.finish_save(),
            Effect::Capture(index) => self.capture(index),
            Effect::SendCommit => {
                if let Some(decisions) = &self.decisions {
                    decisions.commit();
                }
                self.expect_start();
            }
            Effect::SendAbort(why) => {
                if let Some(decisions) = &self.decisions {
                    decisions.abort(why);
                }
                self.tell_aborted();
            }
            Effect::CloseStreams => self.close_streams(),
            Effect::Reset(index) => self.reset(index),
            Effect::Resume if self.parts.vmm.driver() == Driver::Vmm => self.resume_and_look(),
            Effect::Resume => self.call(resume, Event::Resumed, Event::ResumeFailed),
            Effect::Release => self.release(),
            Effect::Finish(end) => self.end = Some(end),
        }
    }

    fn record(&self, record: Record, again: bool) {
        let (signals, marks, stated) = (self.signals.clone(), self.marks, self.stated.clone());
        self.parts.ledger.amend(move |entry| {
            if let EndEntry::Source { marks: place, .. } = &mut entry.end {
                *place = marks;
            }
            entry.stated_because = stated;
        });
        self.parts.ledger.record(record, self.failure.clone(), again, move |result| {
            let event = match result {
                Ok(()) => Event::Recorded(record),
                Err(failure) => Event::RecordFailed(record, failure),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn reach(&mut self, phase: ToldPhase) {
        let now = Clock::now();
        self.marks.reach(phase, now.monotonic_ns);
        self.parts.log.phase(now, phase);
        info!(migration = self.parts.peer.attempt.migration_id, ?phase, "source");
    }

    fn tell_progress(&mut self) {
        let progress =
            Progress { device_bytes: self.device_bytes().iter().sum(), vmm_bytes: self.vmm_bytes() };
        let total = progress.device_bytes + progress.vmm_bytes;
        if total > self.told_progress {
            self.told_progress = total;
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
        if let Some(phase) = phases::last(&end) {
            self.reach(phase);
        }
        let now = Clock::now();
        let mut finished = phases::finished(end);
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
        let failure = (finished.outcome() != Outcome::Succeeded).then(|| {
            Failure::new(Reason::parse(&finished.reason).unwrap_or(Reason::Aborted), finished.message.clone())
        });
        self.parts.ledger.finish(failure, ended).await;
        self.parts.log.finished(now, finished);
    }
}
