//! Performs what the source's state machine decides, and tells it what came of it.
//!
//! One task owns the machine. Everything that takes time runs in tasks of its own, which answer by a signal; so every device
//! changes state at the same time as the others, and nothing can keep the machine from hearing of a failure.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use slackwater_proto::channel::words;
use slackwater_proto::node::{
    Doubt, Estimate as ToldEstimate, JournalRecord, JournalState, Outcome, Phase as ToldPhase, Progress,
};
use slackwater_proto::transfer::HandoverResponse;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::answers::{self, Answer};
use super::events::EventLog;
use super::ledger::Ledger;
use super::link::{Answers, BlobLink, Decisions, Link, Peer};
use super::pump::{self, DevicePump};
use super::{Seen, limits, look, phases, refused, resume, traced};
use crate::handover::entry::{EndEntry, Ended, Marks};
use crate::handover::policy::{Driver, StopPlan};
use crate::handover::source::{Effect, End, Event, Phase, Source};
use crate::handover::{Blob, Failure, Reason, Record, Word};
use crate::host::clock::Clock;
use crate::transfer::flow::Flow;
use crate::vfio::state::{Features, MigrationState};
use crate::vfio::worker::DeviceHandle;
use crate::vmm::budget::{Budget, Copying, Estimate};
use crate::vmm::{DeviceSeen, Vmm, VmmError};

/// How often progress is told while bytes are moving.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long a process whose socket has closed may take to be gone.
const ENDING: Duration = Duration::from_secs(1);
/// The pause before the destination is asked again what it has journalled: the first, and the longest.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// The pause before the destination is told once more that the VM stays here, and for how long that is tried.
const TELL_AGAIN: Duration = Duration::from_secs(1);
const TELL_LIMIT: Duration = Duration::from_secs(600);

/// All that one attempt needs at the source.
pub struct SourceParts {
    /// Where it goes.
    pub peer: Peer,
    /// The VM's VMM.
    pub vmm: Arc<dyn Vmm>,
    /// The VM's devices, borrowed from the VMM, in its order.
    pub devices: Vec<DeviceHandle>,
    /// What their drivers have advertised.
    pub features: Vec<Features>,
    /// The order of stops.
    pub plan: StopPlan,
    /// The journal of this attempt.
    pub ledger: Ledger,
    /// Where an agent that has begun again found it; None for a new attempt.
    pub recovered: Option<Recovered>,
    /// The commit must have happened by then.
    pub pre_commit_timeout: Duration,
    /// What the copying may cost.
    pub budget: Budget,
    /// Gives back what is left of the VM here, once it runs elsewhere.
    pub release: Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>,
    /// Where everything is told.
    pub log: EventLog,
}

/// What an agent that has begun again found of an attempt.
pub struct Recovered {
    /// What stood in the journal.
    pub record: Record,
    /// Where each device was read back; None where it could not be.
    pub found: Vec<Option<MigrationState>>,
    /// Why it is given up, if it is.
    pub failure: Failure,
    /// The VMM's process has ended.
    pub vmm_gone: bool,
    /// What the timings need, from the same boot.
    pub marks: Marks,
}

/// Somebody wants the migration given up.
struct AbortWish {
    why: String,
    answer: oneshot::Sender<Result<(), PastTheCommit>>,
}

/// The point of no return has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the migration has been committed: the VM is, or will be, running at the destination")]
pub struct PastTheCommit;

/// A running attempt.
#[derive(Clone, Debug)]
pub struct SourceRun {
    wishes: mpsc::Sender<AbortWish>,
    signals: mpsc::UnboundedSender<Signal>,
    log: EventLog,
    ledger: Ledger,
    done: watch::Receiver<bool>,
}

impl SourceRun {
    /// Begins.
    pub fn start(parts: SourceParts) -> Self {
        let (wishes, wanted) = mpsc::channel(1);
        let (finished, done) = watch::channel(false);
        let (log, ledger) = (parts.log.clone(), parts.ledger.clone());
        let shell = Shell::new(parts);
        let signals = shell.signals.clone();
        tokio::spawn(async move {
            shell.run(wanted).await;
            finished.send_replace(true);
        });
        Self { wishes, signals, log, ledger, done }
    }

    /// An attempt that ended under an earlier agent: there is nothing left of it but its log and its journal.
    pub fn over(log: EventLog, ledger: Ledger) -> Self {
        let ((wishes, _), (signals, _), (_, done)) =
            (mpsc::channel(1), mpsc::unbounded_channel(), watch::channel(true));
        Self { wishes, signals, log, ledger, done }
    }

    /// What stands in its journal.
    pub fn journalled(&self) -> JournalState {
        self.ledger.state()
    }

    /// Somebody relays what the destination has journalled.
    pub fn peer_says(&self, word: Word) {
        let _ = self.signals.send(Signal::Event(Event::Relayed(word)));
    }

    /// Its events.
    pub fn log(&self) -> &EventLog {
        &self.log
    }

    /// Waits for the end; all that was held has been let go then.
    pub async fn ended(&self) {
        let _ = self.done.clone().wait_for(|done| *done).await;
    }

    /// Gives the migration up and waits until the VM runs here again. An attempt that has ended is left as it ended.
    ///
    /// # Errors
    /// If the point of no return has passed.
    pub async fn abort(&self, why: String) -> Result<(), PastTheCommit> {
        let (answer, answered) = oneshot::channel();
        if self.wishes.send(AbortWish { why, answer }).await.is_err() {
            return self.ended_without_commit();
        }
        match answered.await {
            Ok(answer) => answer?,
            Err(_) => return self.ended_without_commit(),
        }
        self.ended().await;
        Ok(())
    }

    fn ended_without_commit(&self) -> Result<(), PastTheCommit> {
        match self.journalled().record() {
            JournalRecord::Committed | JournalRecord::Released => Err(PastTheCommit),
            _ => Ok(()),
        }
    }
}

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
                #[cfg(feature = "faults")]
                crate::faults::halted("source", &format!("{phase:?}").to_lowercase()).await;
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
        let machine = match self.parts.recovered.take() {
            None => {
                self.marks.begin(Clock::now().monotonic_ns);
                Source::new(&self.parts.features, self.parts.plan)
            }
            Some(found) => {
                self.marks = found.marks;
                // Whether the agent before had begun a save is not known; a VMM without one refuses to abort it.
                self.save_started = true;
                Source::recover(
                    &self.parts.features,
                    &found.found,
                    self.parts.plan,
                    found.record,
                    found.failure,
                    found.vmm_gone,
                )
            }
        };
        machine.driven_by(driver)
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

    /// Asks at once, and later and later when it is asked again.
    fn ask_peer(&mut self) {
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
    fn tell_aborted(&self) {
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

    fn doubt(&self, failure: &Failure) {
        warn!(
            migration = self.parts.peer.attempt.migration_id,
            reason = failure.reason.as_str(),
            message = failure.message,
            "source: the migration cannot come to its end yet"
        );
        let doubt = Doubt { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() };
        self.parts.log.doubt(Clock::now(), doubt);
    }

    /// Says so when STARTED takes long. Nothing else follows from that.
    fn expect_start(&self) {
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

    fn reach(&mut self, phase: ToldPhase) {
        let now = Clock::now();
        self.marks.reach(phase, now.monotonic_ns);
        self.parts.log.phase(now, phase);
        info!(migration = self.parts.peer.attempt.migration_id, ?phase, "source");
    }

    fn watch_vmm(&self) {
        let (vmm, signals) = (Arc::clone(&self.parts.vmm), self.signals.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = vmm.exited() => {
                    let _ = signals.send(Signal::Event(Event::VmmExited));
                }
                () = signals.closed() => {}
            }
        });
    }

    fn watch_devices(&self) {
        let Some(mut seen) = self.parts.vmm.watch_devices() else { return };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            while let Some(seen) = seen.recv().await {
                if signals.send(Signal::Seen(seen)).is_err() {
                    return;
                }
            }
        });
    }

    fn device_blobs(&self) -> usize {
        self.parts.vmm.driver().device_blobs(self.parts.features.len())
    }

    fn connect(&self) {
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

    fn connected(&mut self, link: Link) {
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
    fn hear(&self, answers: Answers) {
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

    fn start_save(&mut self) {
        self.save_started = true;
        let links = std::mem::take(&mut self.vmm_links);
        let (vmm, signals, streams) =
            (Arc::clone(&self.parts.vmm), self.signals.clone(), self.streams.clone());
        let budget = self.parts.budget;
        self.stream_tasks.spawn(async move {
            let event = match vmm.start_save(false, budget).await {
                Ok(save) => {
                    let _ = signals.send(Signal::Event(Event::SaveStarted));
                    tokio::select! {
                        sent = pump::vmm(save, links) => sent,
                        () = streams.cancelled() => return,
                    }
                }
                Err(error) => Event::Failed(Failure::new(Reason::VmmFailed, error.to_string())),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn set_state(&self, index: usize, to: MigrationState) {
        let Some(device) = self.parts.devices.get(index).cloned() else { return };
        let (signals, log) = (self.signals.clone(), self.parts.log.clone());
        tokio::spawn(async move {
            let event = match device.set_state(to).await {
                Ok(reached) => {
                    let (at, change) = traced(device.name(), &reached);
                    log.device(at, change);
                    Event::DeviceReached(index, reached.to)
                }
                Err(error) => {
                    let (found, failure) = refused("source", &error);
                    Event::DeviceFailed(index, found, failure)
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn read_state(&self, index: usize) {
        let Some(device) = self.parts.devices.get(index).cloned() else { return };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let signal = match look(index, &device).await {
                Ok(seen) => Signal::Looked(seen),
                Err(failure) => {
                    let message = format!("at the source, {}", failure.message);
                    Signal::Event(Event::DeviceFailed(index, None, Failure::new(failure.reason, message)))
                }
            };
            let _ = signals.send(signal);
        });
    }

    /// A VMM that drives its devices wakes them before its vCPUs: where it got them is read back.
    fn resume_and_look(&self) {
        let (vmm, devices, signals) =
            (Arc::clone(&self.parts.vmm), self.parts.devices.clone(), self.signals.clone());
        tokio::spawn(async move {
            let event = match resume(vmm.as_ref()).await {
                Ok(()) => {
                    for (index, device) in devices.iter().enumerate() {
                        if let Ok(seen) = look(index, device).await {
                            let _ = signals.send(Signal::Looked(seen));
                        }
                    }
                    Event::Resumed
                }
                Err(error) => Event::ResumeFailed(Failure::new(Reason::VmmFailed, error.to_string())),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn reset(&self, index: usize) {
        let Some(device) = self.parts.devices.get(index).cloned() else { return };
        let signals = self.signals.clone();
        warn!(device = device.name(), "resetting a device that cannot be brought back otherwise");
        tokio::spawn(async move {
            let event = match device.reset().await {
                Ok(()) => Event::DeviceReached(index, MigrationState::Running),
                Err(error) => Event::DeviceFailed(
                    index,
                    None,
                    Failure::new(Reason::DeviceFailed, format!("at the source, {error}")),
                ),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn pre_copy(&mut self, index: usize) {
        let Some(pump) = self.pumps.get_mut(index).and_then(Option::take) else { return };
        let (signals, streams) = (self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let drained = tokio::select! {
                drained = pump.pre_copy() => drained,
                () = streams.cancelled() => return,
            };
            let _ = signals.send(match drained {
                Ok(pump) => Signal::PreCopied(index, pump),
                Err(failure) => Signal::Event(Event::Failed(failure)),
            });
        });
    }

    fn capture(&mut self, index: usize) {
        let Some(pump) = self.pumps.get_mut(index).and_then(Option::take) else { return };
        let (signals, streams) = (self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let event = tokio::select! {
                sent = pump.capture() => match sent {
                    Ok(()) => Event::BlobSent(Blob::Device(index)),
                    Err(failure) => Event::Failed(failure),
                },
                () = streams.cancelled() => return,
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn finish_save(&self) {
        let (vmm, signals, streams) =
            (Arc::clone(&self.parts.vmm), self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let answer = tokio::select! {
                answer = vmm.finish_save() => answer,
                () = streams.cancelled() => return,
            };
            let event = match answer {
                Ok(()) => Event::SaveFinished,
                Err(error) => Event::Failed(Failure::new(Reason::VmmFailed, error.to_string())),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn close_streams(&mut self) {
        self.streams.cancel();
        self.stream_tasks.close();
        self.pumps.clear();
        self.vmm_links.clear();
        let (tasks, devices, signals) =
            (self.stream_tasks.clone(), self.parts.devices.clone(), self.signals.clone());
        let vmm = self.save_started.then(|| Arc::clone(&self.parts.vmm));
        tokio::spawn(async move {
            tasks.wait().await;
            for device in &devices {
                if let Err(error) = device.close_data().await {
                    warn!(%error, "a device's data descriptor could not be closed");
                }
            }
            if let Some(vmm) = vmm
                && let Err(error) = vmm.abort_save().await
            {
                // The rollback goes on: if the VMM cannot resume either, it says so then.
                warn!(%error, "the VMM did not abort its save");
            }
            let _ = signals.send(Signal::Event(Event::StreamsClosed));
        });
    }

    fn converge(&self) {
        let (tell, mut told) = mpsc::unbounded_channel::<Estimate>();
        let log = self.parts.log.clone();
        tokio::spawn(async move {
            while let Some(Estimate { downtime, allowed }) = told.recv().await {
                let estimate = ToldEstimate {
                    downtime_ns: nanoseconds(downtime),
                    allowed_ns: allowed.map_or(0, nanoseconds),
                };
                log.estimate(Clock::now(), estimate);
            }
        });
        let flow = self.flows.last().map(Arc::clone).unwrap_or_default();
        let copy = Copying { budget: self.parts.budget, devices: self.parts.devices.clone(), flow, tell };
        let outcome = self.outcome(move |vmm| vmm.converged(copy), Event::Converged, Event::Failed);
        let (signals, streams) = (self.signals.clone(), self.streams.clone());
        // It has the devices, which must be closed when their VMM is gone.
        self.stream_tasks.spawn(async move {
            tokio::select! {
                event = outcome => {
                    let _ = signals.send(Signal::Event(event));
                }
                () = streams.cancelled() => {}
            }
        });
    }

    fn call<F>(&self, call: F, done: Event, failed: fn(Failure) -> Event)
    where
        F: for<'a> FnOnce(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>> + Send + 'static,
    {
        let (outcome, signals) = (self.outcome(call, done, failed), self.signals.clone());
        tokio::spawn(async move {
            let _ = signals.send(Signal::Event(outcome.await));
        });
    }

    /// What becomes of a call to the VMM.
    fn outcome<F>(
        &self,
        call: F,
        done: Event,
        failed: fn(Failure) -> Event,
    ) -> impl Future<Output = Event> + Send + use<F>
    where
        F: for<'a> FnOnce(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>> + Send + 'static,
    {
        let (vmm, signals) = (Arc::clone(&self.parts.vmm), self.signals.clone());
        async move {
            match call(vmm.as_ref()).await {
                Ok(()) => done,
                Err(error) => {
                    // A call breaks off because the process is ending: that it has ended is the better reason.
                    if matches!(error, VmmError::Lost { .. })
                        && tokio::time::timeout(ENDING, vmm.exited()).await.is_ok()
                    {
                        let _ = signals.send(Signal::Event(Event::VmmExited));
                    }
                    let reason = match error {
                        VmmError::BudgetExceeded(_) => Reason::BudgetExceeded,
                        _ => Reason::VmmFailed,
                    };
                    failed(Failure::new(reason, error.to_string()))
                }
            }
        }
    }

    /// The borrowed descriptors go first: a forgotten one would keep the devices bound after their VMM's end.
    fn release(&mut self) {
        self.pumps.clear();
        let devices = std::mem::take(&mut self.parts.devices);
        let release = std::mem::replace(&mut self.parts.release, Box::new(|| Box::pin(async {})));
        let signals = self.signals.clone();
        tokio::spawn(async move {
            for device in devices {
                // The copy here is dead for good; and some drivers keep its state past the last close, for whoever opens the
                // device next.
                if let Err(error) = device.reset().await {
                    warn!(%error, "a device that is given back could not be reset");
                }
                device.release().await;
            }
            release().await;
            let _ = signals.send(Signal::Event(Event::Released));
        });
    }

    fn device_bytes(&self) -> Vec<u64> {
        let devices = self.device_blobs();
        self.flows.iter().take(devices).map(|flow| flow.bytes()).collect()
    }

    fn vmm_bytes(&self) -> u64 {
        self.flows.last().map_or(0, |flow| flow.bytes())
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
        let ended = Ended {
            outcome: finished.outcome,
            timings_ns: [timings.pre_copy_ns, timings.blackout_ns, timings.total_ns],
            device_bytes: finished.device_bytes.clone(),
            vmm_bytes: finished.vmm_bytes,
        };
        let failure = (finished.outcome() != Outcome::Succeeded).then(|| {
            Failure::new(
                Reason::of_name(&finished.reason).unwrap_or(Reason::Aborted),
                finished.message.clone(),
            )
        });
        self.parts.ledger.finish(failure, ended).await;
        self.parts.log.finished(now, finished);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn lost(peer: &str, why: &str) -> Event {
    Event::Failed(Failure::new(Reason::PeerLost, format!("the destination {peer} was lost: {why}")))
}
