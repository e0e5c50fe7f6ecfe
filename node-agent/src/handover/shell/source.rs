//! Performs what the source's state machine decides, and tells it what came of it.
//!
//! One task owns the machine. Everything that takes time runs in tasks of its own, which answer by a signal; so every device
//! changes state at the same time as the others, and nothing can keep the machine from hearing of a failure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use slackwater_proto::channel::words;
use slackwater_proto::node::{Phase as ToldPhase, Progress};
use slackwater_proto::transfer::HandoverResponse;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::answers::{self, Answer};
use super::events::EventLog;
use super::link::{Answers, BlobLink, Decisions, Link, Peer};
use super::phases;
use super::pump::{self, DevicePump};
use super::timings::Marks;
use super::{VmmCall, refused, traced};
use crate::handover::policy::StopPlan;
use crate::handover::source::{Effect, End, Event, Source};
use crate::handover::{Blob, Failure, Reason};
use crate::host::clock::Clock;
use crate::vfio::state::{Features, MigrationState};
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{RunState, Vmm, VmmError};

/// How often progress is told while bytes are moving.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long a process whose socket has closed may take to be gone.
const ENDING: Duration = Duration::from_secs(1);

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
    /// The commit must have happened by then.
    pub pre_commit_timeout: Duration,
    /// Gives back what is left of the VM here, once it runs elsewhere.
    pub release: Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>,
    /// Where everything is told.
    pub log: EventLog,
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
    log: EventLog,
    done: watch::Receiver<bool>,
}

impl SourceRun {
    /// Begins.
    pub fn start(parts: SourceParts) -> Self {
        let (wishes, wanted) = mpsc::channel(1);
        let (finished, done) = watch::channel(false);
        let log = parts.log.clone();
        tokio::spawn(async move {
            Shell::new(parts).run(wanted).await;
            finished.send_replace(true);
        });
        Self { wishes, log, done }
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
        use slackwater_proto::node::Outcome;
        match self.log.end().map(|end| end.outcome()) {
            Some(Outcome::Succeeded | Outcome::InDoubt) => Err(PastTheCommit),
            _ => Ok(()),
        }
    }
}

/// What the tasks tell the machine's task.
enum Signal {
    Event(Event),
    Connected(Box<Link>),
    /// A pump has drained a device's initial data, and waits for the final data.
    PreCopied(usize, Box<DevicePump>),
}

struct Shell {
    parts: SourceParts,
    signals: mpsc::UnboundedSender<Signal>,
    heard: mpsc::UnboundedReceiver<Signal>,
    decisions: Option<Decisions>,
    pumps: Vec<Option<Box<DevicePump>>>,
    sent_bytes: Vec<Arc<AtomicU64>>,
    vmm_link: Option<BlobLink>,
    streams: CancellationToken,
    stream_tasks: TaskTracker,
    save_started: bool,
    told_progress: u64,
    marks: Marks,
    end: Option<End>,
}

impl Shell {
    fn new(parts: SourceParts) -> Self {
        let (signals, heard) = mpsc::unbounded_channel();
        Self {
            parts,
            signals,
            heard,
            decisions: None,
            pumps: Vec::new(),
            sent_bytes: Vec::new(),
            vmm_link: None,
            streams: CancellationToken::new(),
            stream_tasks: TaskTracker::new(),
            save_started: false,
            told_progress: 0,
            marks: Marks::default(),
            end: None,
        }
    }

    async fn run(mut self, mut wishes: mpsc::Receiver<AbortWish>) {
        self.marks.begin(Clock::now().monotonic_ns);
        let mut machine = Source::new(&self.parts.features, self.parts.plan);
        let deadline = tokio::time::sleep(self.parts.pre_commit_timeout);
        tokio::pin!(deadline);
        let mut deadline_passed = false;
        let mut progress = tokio::time::interval(PROGRESS_EVERY);
        self.watch_vmm();
        let mut event = Event::Start;
        loop {
            let (next, effects) = machine.step(event);
            machine = next;
            for effect in effects {
                self.perform(effect);
            }
            if let Some(end) = self.end.take() {
                self.finish(end);
                return;
            }
            event = loop {
                tokio::select! {
                    Some(signal) = self.heard.recv() => break self.accept(signal),
                    () = &mut deadline, if !deadline_passed => {
                        deadline_passed = true;
                        let message = format!(
                            "the migration was not committed within {:?} (preCommitTimeout); it stood in {:?}",
                            self.parts.pre_commit_timeout, machine.phase()
                        );
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

    fn accept(&mut self, signal: Signal) -> Event {
        match signal {
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
            // The journal's place: nothing is written yet, so every record is confirmed at once.
            Effect::Record(record) => self.signal(Event::Recorded(record)),
            Effect::StartSave => self.start_save(),
            Effect::SetState(index, to) => self.set_state(index, to),
            Effect::PreCopy(index) => self.pre_copy(index),
            Effect::Pause => self.call(|vmm| vmm.pause(), Event::Paused, Event::PauseFailed),
            Effect::FinishSave => self.finish_save(),
            Effect::Capture(index) => self.capture(index),
            Effect::SendCommit => {
                if let Some(decisions) = &self.decisions {
                    decisions.commit();
                }
            }
            Effect::SendAbort(why) => {
                if let Some(decisions) = &self.decisions {
                    decisions.abort(why);
                }
            }
            Effect::CloseStreams => self.close_streams(),
            Effect::Reset(index) => self.reset(index),
            Effect::Resume => self.call(resume, Event::Resumed, Event::ResumeFailed),
            Effect::Release => self.release(),
            Effect::Finish(end) => self.end = Some(end),
        }
    }

    fn signal(&self, event: Event) {
        let _ = self.signals.send(Signal::Event(event));
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

    fn connect(&self) {
        let (peer, devices, signals) =
            (self.parts.peer.clone(), self.parts.devices.len(), self.signals.clone());
        tokio::spawn(async move {
            let signal = match peer.connect(devices).await {
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
        self.sent_bytes = blobs.iter().map(|link| Arc::clone(&link.sent_bytes)).collect();
        for link in blobs {
            match link.blob {
                Blob::Vmm => self.vmm_link = Some(link),
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
        let Some(link) = self.vmm_link.take() else { return };
        let (vmm, signals, streams) =
            (Arc::clone(&self.parts.vmm), self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let event = match vmm.start_save(false).await {
                Ok(stream) => {
                    let _ = signals.send(Signal::Event(Event::SaveStarted));
                    tokio::select! {
                        sent = pump::vmm(stream, link) => sent,
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

    /// The stream's end, which [`pump::vmm`] waits for, is the answer; only a refusal is told from here.
    fn finish_save(&self) {
        let (vmm, signals, streams) =
            (Arc::clone(&self.parts.vmm), self.signals.clone(), self.streams.clone());
        self.stream_tasks.spawn(async move {
            let answer = tokio::select! {
                answer = vmm.finish_save() => answer,
                () = streams.cancelled() => return,
            };
            if let Err(error) = answer {
                let failure = Failure::new(Reason::VmmFailed, error.to_string());
                let _ = signals.send(Signal::Event(Event::Failed(failure)));
            }
        });
    }

    fn close_streams(&mut self) {
        self.streams.cancel();
        self.stream_tasks.close();
        self.pumps.clear();
        self.vmm_link = None;
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

    fn call(&self, call: VmmCall, done: Event, failed: fn(Failure) -> Event) {
        let (vmm, signals) = (Arc::clone(&self.parts.vmm), self.signals.clone());
        tokio::spawn(async move {
            let event = match call(vmm.as_ref()).await {
                Ok(()) => done,
                Err(error) => {
                    // A call breaks off because the process is ending: that it has ended is the better reason.
                    if matches!(error, VmmError::Lost { .. })
                        && tokio::time::timeout(ENDING, vmm.exited()).await.is_ok()
                    {
                        let _ = signals.send(Signal::Event(Event::VmmExited));
                    }
                    failed(Failure::new(Reason::VmmFailed, error.to_string()))
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
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
        let devices = self.parts.features.len();
        self.sent_bytes.iter().take(devices).map(|bytes| bytes.load(Ordering::Relaxed)).collect()
    }

    fn vmm_bytes(&self) -> u64 {
        self.sent_bytes.last().map_or(0, |bytes| bytes.load(Ordering::Relaxed))
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

    fn finish(&mut self, end: End) {
        if let Some(phase) = phases::last(&end) {
            self.reach(phase);
        }
        let now = Clock::now();
        let mut finished = phases::finished(end);
        finished.timings = Some(self.marks.timings(now.monotonic_ns));
        finished.device_bytes = self.device_bytes();
        finished.vmm_bytes = self.vmm_bytes();
        info!(
            migration = self.parts.peer.attempt.migration_id,
            outcome = ?finished.outcome(), reason = finished.reason, message = finished.message,
            "source: the migration has ended"
        );
        self.parts.log.finished(now, finished);
    }
}

fn lost(peer: &str, why: &str) -> Event {
    Event::Failed(Failure::new(Reason::PeerLost, format!("the destination {peer} was lost: {why}")))
}

/// After a pause that failed it is not known whether the vCPUs run; to resume a VM that runs would be refused.
fn resume(vmm: &dyn Vmm) -> BoxFuture<'_, Result<(), VmmError>> {
    Box::pin(async move {
        match vmm.describe().await?.run_state {
            RunState::Running => Ok(()),
            RunState::Paused | RunState::Incoming => vmm.resume().await,
        }
    })
}
