//! Performs what the destination's state machine decides, and tells it what came of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use slackwater_proto::channel::words;
use slackwater_proto::node::{DeviceStateChange, JournalState};
use slackwater_proto::tonic::{Status, Streaming};
use slackwater_proto::transfer::{
    self, DeviceStep, Failed, HandoverRequest, HandoverResponse, Loaded, Ready, SendBlobRequest, Started,
    Starting, VmmReply, handover_request, handover_response,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::{TaskTracker, TaskTrackerToken};
use tracing::{info, warn};

use super::ledger::Ledger;
use super::receiving::{Receiver, TwinLoad};
use super::{Seen, VmmCall, confirm, look, of_twin, refused, resume, traced};
use crate::handover::destination::{Destination, Effect, End, Event, Phase};
use crate::handover::entry::{Ended, Process};
use crate::handover::policy::Driver;
use crate::handover::{Blob, Failure, Reason, Record, Word};
use crate::host::clock::Clock;
use crate::transfer::channel::Channel;
use crate::transfer::incoming::{self, ReceiveError};
use crate::vfio::state::{Features, MigrationState};
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{DeviceSeen, Vmm};

/// The twin when it has been started, paused.
pub struct Twin {
    /// Its VMM.
    pub vmm: Arc<dyn Vmm>,
    /// Its devices, borrowed from it, in the VM's order.
    pub devices: Vec<DeviceHandle>,
    /// Its process, for the journal: an agent that begins again finds it by this.
    pub process: Option<Process>,
}

/// The place where the VM lands: what is the node's own about starting a twin, keeping it, or clearing it away.
pub trait Site: Send + Sync {
    /// Prepares the devices' identity, starts the twin paused and borrows its devices.
    fn start_twin(&self) -> BoxFuture<'_, Result<Twin, Failure>>;
    /// Lets the devices take over the VM's network identity.
    fn activate_identity(&self) -> BoxFuture<'_, Result<(), Failure>>;
    /// The VM runs here: makes it known.
    fn keep(&self) -> BoxFuture<'_, ()>;
    /// Nothing has run: ends the twin and clears everything away.
    fn discard(&self) -> BoxFuture<'_, ()>;
}

/// All that one attempt needs at the destination.
pub struct DestinationParts {
    /// For logs.
    pub migration_id: String,
    /// What the drivers of the devices have advertised.
    pub features: Vec<Features>,
    /// Who drives them.
    pub driver: Driver,
    /// The place.
    pub site: Arc<dyn Site>,
    /// For so long the source may leave a reservation unused.
    pub silence_timeout: Duration,
    /// The journal of this attempt.
    pub ledger: Ledger,
    /// Where an agent that has begun again found it; None for a new attempt.
    pub recovered: Option<Recovered>,
}

/// What an agent that has begun again found of an attempt.
pub struct Recovered {
    /// What stood in the journal.
    pub record: Record,
    /// The twin, if its process is still the one that was started.
    pub twin: Option<Twin>,
    /// Where each of its devices was read back; None where it could not be.
    pub found: Vec<Option<MigrationState>>,
    /// Why it is given up, if it is.
    pub failure: Failure,
}

/// The twin may have run: nothing can be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the migration has been committed: the VM is, or may have been, running here")]
pub struct MayHaveRun;

type Answers = mpsc::UnboundedSender<Result<HandoverResponse, Status>>;

/// A blob that may arrive now.
struct OpenBlob {
    receiver: Receiver,
    given_up: CancellationToken,
    /// Held until the blob's last byte has been handed on, or none will be any more.
    _under_way: TaskTrackerToken,
}

enum Signal {
    Event(Event),
    Peer(Answers),
    TwinReady(Twin),
    Step(DeviceStep),
    /// A device that its VMM drives, as the VMM tells or as it was read back.
    Seen(DeviceSeen),
    /// What the twin says to the VMM at the source.
    Reply(Bytes),
    OpenBlob(Blob, Channel, oneshot::Sender<Result<OpenBlob, Status>>),
    Release(Failure, oneshot::Sender<Result<(), MayHaveRun>>),
}

/// A reservation, and what becomes of it.
#[derive(Clone, Debug)]
pub struct DestinationRun {
    signals: mpsc::UnboundedSender<Signal>,
    reserved: watch::Receiver<Option<Result<(), Failure>>>,
    end: watch::Receiver<Option<End>>,
    free: watch::Receiver<bool>,
    ledger: Ledger,
}

impl DestinationRun {
    /// Begins.
    pub fn start(parts: DestinationParts) -> Self {
        let (signals, heard) = mpsc::unbounded_channel();
        let (tell_reserved, reserved) = watch::channel(None);
        let (tell_end, end) = watch::channel(None);
        let (tell_free, free) = watch::channel(false);
        let ledger = parts.ledger.clone();
        let shell = Shell {
            parts,
            signals: signals.clone(),
            heard,
            twin: None,
            seen: Seen::new(&[]),
            answers: None,
            steps: Vec::new(),
            opened: BTreeSet::new(),
            load: None,
            streams: CancellationToken::new(),
            stream_tasks: TaskTracker::new(),
            tell_reserved,
            failure: None,
            stated: None,
            end: None,
        };
        tokio::spawn(async move {
            let site = Arc::clone(&shell.parts.site);
            let (end, left) = shell.run().await;
            let stuck = matches!(end, End::Stuck(_));
            tell_end.send_replace(Some(end));
            if stuck {
                // What could not be started is kept as it is, for a person to look at, until that person, or its own death, ends it.
                if let Some(vmm) = left {
                    vmm.exited().await;
                }
                site.discard().await;
            }
            tell_free.send_replace(true);
        });
        Self { signals, reserved, end, free, ledger }
    }

    /// An attempt that ended under an earlier agent: there is nothing left of it but its journal.
    pub fn over(ledger: Ledger, end: End) -> Self {
        let (signals, _) = mpsc::unbounded_channel();
        let reserved = match &end {
            End::Discarded(failure) => Err(failure.clone()),
            End::Running | End::Stuck(_) => Ok(()),
        };
        let (reserved, end, free) =
            (watch::channel(Some(reserved)).1, watch::channel(Some(end)).1, watch::channel(true).1);
        Self { signals, reserved, end, free, ledger }
    }

    /// What stands in its journal.
    pub fn journalled(&self) -> JournalState {
        self.ledger.state()
    }

    /// What the source has journalled: by its own question, or relayed.
    pub fn peer_says(&self, word: Word) {
        let _ = self.signals.send(Signal::Event(Event::PeerSays(word)));
    }

    /// Waits until the devices stand in RESUMING.
    ///
    /// # Errors
    /// Why they do not; all that had been claimed is given back then.
    pub async fn reserved(&self) -> Result<(), Failure> {
        let mut reserved = self.reserved.clone();
        match reserved.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone().unwrap_or(Ok(())),
            Err(_) => Err(Failure::new(Reason::TwinFailed, "the reservation ended early")),
        }
    }

    /// Waits for the end; all that was held has been let go then.
    pub async fn ended(&self) -> Option<End> {
        self.end.clone().wait_for(Option::is_some).await.ok()?.clone()
    }

    /// Waits until nothing is held any more: after the end, or, of a VM that could not be started, after its process has ended.
    pub async fn free(&self) {
        let _ = self.free.clone().wait_for(|free| *free).await;
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// The source has connected and said Hello. Returns what it is answered.
    pub fn handover(
        &self,
        requests: Streaming<HandoverRequest>,
    ) -> impl Stream<Item = Result<HandoverResponse, Status>> + Send + use<> {
        let (answers, stream) = mpsc::unbounded_channel();
        if self.signals.send(Signal::Peer(answers.clone())).is_err() {
            let gone = match self.end() {
                Some(End::Discarded(failure) | End::Stuck(failure)) => failure,
                Some(End::Running) | None => {
                    Failure::new(Reason::Released, "the reservation has been given back")
                }
            };
            let _ = answers.send(Ok(failed(&gone)));
        } else {
            tokio::spawn(hear(requests, self.signals.clone()));
        }
        UnboundedReceiverStream::new(stream)
    }

    /// Takes a blob, or a channel of one, whose header has been read.
    ///
    /// # Errors
    /// If none is expected now, or it did not arrive whole: the reservation is given back then.
    pub async fn receive(
        &self,
        blob: Blob,
        channel: Channel,
        stream: Streaming<SendBlobRequest>,
    ) -> Result<(), Status> {
        let (answer, answered) = oneshot::channel();
        // Why is said on the hand-over's stream; the source waits for it there.
        let gone = || Status::aborted("the reservation has been given back");
        self.signals.send(Signal::OpenBlob(blob, channel, answer)).map_err(|_| gone())?;
        let OpenBlob { receiver, given_up, _under_way } = answered.await.map_err(|_| gone())??;
        let received = tokio::select! {
            received = incoming::receive(stream, receiver) => received,
            () = given_up.cancelled() => return Err(gone()),
        };
        let (event, answer) = match received {
            Ok(summary) => {
                let (bytes, digest) = (summary.length_bytes, summary.digest);
                info!(?blob, channel = channel.number(), bytes, %digest, "verified");
                // The main one waits for the others.
                (channel.is_main().then_some(Event::BlobVerified(blob)), Ok(()))
            }
            Err(error) => {
                let (failure, status) = explain(blob, error);
                (Some(Event::Failed(failure)), Err(status))
            }
        };
        if let Some(event) = event {
            let _ = self.signals.send(Signal::Event(event));
        }
        answer
    }

    /// Gives everything back and waits until that is done. One that is given back already is left as it is.
    ///
    /// # Errors
    /// If the VM may have run here.
    pub async fn release(&self, why: Failure) -> Result<(), MayHaveRun> {
        let (answer, answered) = oneshot::channel();
        if self.signals.send(Signal::Release(why, answer)).is_ok()
            && let Ok(answer) = answered.await
        {
            answer?;
        }
        match self.ended().await {
            Some(End::Running | End::Stuck(_)) => Err(MayHaveRun),
            Some(End::Discarded(_)) | None => Ok(()),
        }
    }
}

/// Passes on the source's decisions, until it says nothing more.
async fn hear(mut requests: Streaming<HandoverRequest>, signals: mpsc::UnboundedSender<Signal>) {
    loop {
        let said = tokio::select! {
            said = requests.message() => said,
            () = signals.closed() => return,
        };
        let event = match said {
            Ok(Some(HandoverRequest { message: Some(handover_request::Message::Commit(_)) })) => {
                Event::CommitReceived
            }
            Ok(Some(HandoverRequest { message: Some(handover_request::Message::Abort(abort)) })) => {
                let message = format!("the source keeps the VM: {}", abort.why);
                Event::AbortReceived(Failure::new(Reason::Released, message))
            }
            Ok(Some(_)) => continue,
            Ok(None) => {
                let message = "the source ended the hand-over's stream";
                Event::PeerLost(Failure::new(Reason::PeerLost, message))
            }
            Err(status) => {
                let message = format!("the source was lost: {}", words(&status));
                Event::PeerLost(Failure::new(Reason::PeerLost, message))
            }
        };
        let over = matches!(event, Event::PeerLost(_));
        if signals.send(Signal::Event(event)).is_err() || over {
            return;
        }
    }
}

/// Why a blob did not arrive: for the machine, and for the source.
fn explain(blob: Blob, error: ReceiveError) -> (Failure, Status) {
    let what = match blob {
        Blob::Device(index) => format!("the state of device {index}"),
        Blob::Vmm => "RAM and machine state".to_owned(),
    };
    match error {
        ReceiveError::Sink(failure) => {
            let status = Status::failed_precondition(failure.message.clone());
            (failure, status)
        }
        ReceiveError::Broken { .. } | ReceiveError::GivenUp { .. } => {
            let message = format!("{what}: {error}");
            (Failure::new(Reason::PeerLost, message.clone()), Status::data_loss(message))
        }
        ReceiveError::Mismatch(_) | ReceiveError::Order(_) => {
            let message = format!("{what} did not arrive as it was sent: {error}");
            (Failure::new(Reason::BlobRejected, message.clone()), Status::data_loss(message))
        }
    }
}

struct Shell {
    parts: DestinationParts,
    signals: mpsc::UnboundedSender<Signal>,
    heard: mpsc::UnboundedReceiver<Signal>,
    twin: Option<Twin>,
    seen: Seen,
    answers: Option<Answers>,
    /// Steps that the source has not been told, because it is not connected yet.
    steps: Vec<DeviceStep>,
    /// Devices whose state has been sent, or is being sent.
    opened: BTreeSet<usize>,
    /// What the twin takes, once its first channel has come.
    load: Option<TwinLoad>,
    streams: CancellationToken,
    stream_tasks: TaskTracker,
    tell_reserved: watch::Sender<Option<Result<(), Failure>>>,
    /// Why the machine gives up, if it does: it goes into the journal.
    failure: Option<Failure>,
    /// An administrator has stated the source's word, and why.
    stated: Option<String>,
    end: Option<End>,
}

impl Shell {
    /// The end, and the twin if it is left as it is.
    async fn run(mut self) -> (End, Option<Arc<dyn Vmm>>) {
        let mut machine = self.machine();
        let silence = tokio::time::sleep(Duration::MAX);
        tokio::pin!(silence);
        // It begins when the reservation is confirmed: before that nobody can have asked the source.
        let mut silent = false;
        let mut event = Event::Start;
        loop {
            #[cfg(feature = "faults")]
            let before = machine.phase();
            let (next, effects) = machine.step(event);
            machine = next;
            #[cfg(feature = "faults")]
            if machine.phase() != before {
                crate::faults::halted("destination", &format!("{:?}", machine.phase()).to_lowercase()).await;
            }
            self.failure = machine.failure().cloned();
            if effects.contains(&Effect::ConfirmReserved) {
                silent = true;
                silence.as_mut().reset(tokio::time::Instant::now() + self.parts.silence_timeout);
            }
            for effect in effects {
                self.perform(effect);
            }
            if let Some(end) = self.end.take() {
                return self.finish(end).await;
            }
            event = loop {
                tokio::select! {
                    Some(signal) = self.heard.recv() => {
                        if let Some(event) = self.accept(signal, &machine) {
                            break event;
                        }
                    }
                    () = &mut silence, if silent && self.answers.is_none() => {
                        silent = false;
                        let message = format!(
                            "the source did not connect within {:?} of the reservation", self.parts.silence_timeout
                        );
                        break Event::PeerLost(Failure::new(Reason::SourceSilent, message));
                    }
                }
            };
        }
    }

    fn machine(&mut self) -> Destination {
        let driver = self.parts.driver;
        let Some(found) = self.parts.recovered.take() else {
            return Destination::new(&self.parts.features).driven_by(driver);
        };
        let twin_there = found.twin.is_some();
        let features = found
            .twin
            .as_ref()
            .map(|twin| twin.devices.iter().map(DeviceHandle::features).collect::<Vec<_>>());
        if let Some(twin) = &found.twin {
            self.watch_twin(twin);
        }
        self.twin = found.twin;
        let features = features.unwrap_or_default();
        Destination::recover(&features, &found.found, found.record, found.failure, twin_there)
            .driven_by(driver)
    }

    fn accept(&mut self, signal: Signal, machine: &Destination) -> Option<Event> {
        match signal {
            Signal::Event(event) => {
                if let Event::PeerSays(word) = &event {
                    self.stated.clone_from(&word.stated_because);
                }
                Some(event)
            }
            Signal::Peer(answers) => {
                self.answers = Some(answers);
                Some(Event::PeerConnected)
            }
            Signal::TwinReady(twin) => {
                self.watch_twin(&twin);
                let process = twin.process.clone();
                self.parts.ledger.amend(move |entry| entry.vmm = process);
                if machine.phase() == Phase::StartingTwin {
                    // With its process, so that the next agent would find it. That a twin is held stands there already.
                    self.parts.ledger.record(Record::Reserved, None, false, |_| {});
                }
                self.twin = Some(twin);
                Some(Event::TwinReady)
            }
            Signal::Step(step) => {
                self.answer(handover_response::Message::DeviceStep(step));
                None
            }
            Signal::Seen(seen) => {
                self.trace(seen);
                None
            }
            Signal::Reply(data) => {
                self.answer(handover_response::Message::VmmReply(VmmReply { data }));
                None
            }
            Signal::OpenBlob(blob, channel, answer) => {
                let _ = answer.send(self.open_blob(blob, channel, machine));
                None
            }
            Signal::Release(why, answer) => {
                if machine.may_have_run() {
                    let _ = answer.send(Err(MayHaveRun));
                    return None;
                }
                let _ = answer.send(Ok(()));
                Some(Event::AbortReceived(why))
            }
        }
    }

    fn trace(&mut self, seen: DeviceSeen) {
        let device = self.twin.as_ref().and_then(|twin| twin.devices.get(seen.index));
        if let Some(change) = device.and_then(|device| self.seen.change(device, seen)) {
            let DeviceStateChange { device, from, to, took_ns } = change;
            let step = DeviceStep { at: Some(seen.at.into()), device, from, to, took_ns };
            self.answer(handover_response::Message::DeviceStep(step));
        }
    }

    fn open_blob(&mut self, blob: Blob, channel: Channel, machine: &Destination) -> Result<OpenBlob, Status> {
        let twin = self.twin.as_ref().filter(|_| machine.takes_blobs());
        let twin = twin.ok_or_else(|| {
            let phase = machine.phase();
            Status::failed_precondition(format!("no blob is taken now: the destination stands in {phase:?}"))
        })?;
        let receiver = match blob {
            Blob::Device(index) => {
                let devices = twin.devices.len();
                let device = twin.devices.get(index).cloned().ok_or_else(|| {
                    Status::invalid_argument(format!("blob.device is {index}; the VM has {devices} devices"))
                })?;
                if !self.opened.insert(index) {
                    return Err(Status::already_exists(format!(
                        "the state of device {index} has been sent in this attempt already"
                    )));
                }
                Receiver::Device(device)
            }
            Blob::Vmm => {
                let vmm = &twin.vmm;
                let load = self.load.get_or_insert_with(|| TwinLoad::begin(Arc::clone(vmm), channel.count()));
                let receiver = load.channel(channel);
                receiver.ok_or_else(|| {
                    let (number, count) = (channel.number(), channel.count());
                    Status::already_exists(format!(
                        "channel {number} of {count} of the VMM's state has been sent in this attempt already, or others were of another number"
                    ))
                })?
            }
        };
        Ok(OpenBlob { receiver, given_up: self.streams.clone(), _under_way: self.stream_tasks.token() })
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Report(phase) => {
                info!(migration = self.parts.migration_id, ?phase, "destination");
            }
            Effect::StartTwin => self.start_twin(),
            Effect::SetState(index, to) => self.set_state(index, to),
            Effect::Check(index) => self.check(index),
            Effect::ConfirmReserved => {
                self.tell_reserved.send_replace(Some(Ok(())));
            }
            Effect::SendReady => {
                self.answer(handover_response::Message::Ready(Ready { at: now() }));
                for step in std::mem::take(&mut self.steps) {
                    self.answer(handover_response::Message::DeviceStep(step));
                }
            }
            Effect::FinishLoad => {
                self.call(|vmm| vmm.finish_load(), Event::LoadFinished);
            }
            Effect::Record(record) => self.record(record, false),
            Effect::RecordAgain(record) => self.record(record, true),
            Effect::SendLoaded => self.answer(handover_response::Message::Loaded(Loaded { at: now() })),
            Effect::ConfirmTwin => self.call(confirm, Event::TwinConfirmed),
            Effect::SendStarting => self.answer(handover_response::Message::Starting(Starting { at: now() })),
            Effect::ActivateIdentity => {
                let (site, signals) = (Arc::clone(&self.parts.site), self.signals.clone());
                tokio::spawn(async move {
                    let event = match site.activate_identity().await {
                        Ok(()) => Event::IdentityActivated,
                        Err(failure) => Event::Failed(failure),
                    };
                    let _ = signals.send(Signal::Event(event));
                });
            }
            Effect::Resume if self.parts.driver == Driver::Vmm => self.resume_and_look(),
            Effect::Resume => self.call(resume, Event::Resumed),
            Effect::SendStarted => self.answer(handover_response::Message::Started(Started { at: now() })),
            Effect::SendFailed(failure) => {
                if let Some(answers) = &self.answers {
                    let _ = answers.send(Ok(failed(&failure)));
                }
            }
            Effect::Discard => self.discard(),
            Effect::Finish(end) => self.end = Some(end),
        }
    }

    fn record(&self, record: Record, again: bool) {
        let (signals, stated) = (self.signals.clone(), self.stated.clone());
        self.parts.ledger.amend(move |entry| entry.stated_because = stated);
        self.parts.ledger.record(record, self.failure.clone(), again, move |result| {
            let event = match result {
                Ok(()) => Event::Recorded(record),
                Err(failure) => {
                    warn!(%failure, "a record could not be made durable");
                    Event::RecordFailed(record, failure)
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn answer(&mut self, message: handover_response::Message) {
        match (&self.answers, message) {
            (Some(answers), message) => {
                let _ = answers.send(Ok(HandoverResponse { message: Some(message) }));
            }
            (None, handover_response::Message::DeviceStep(step)) => self.steps.push(step),
            (None, _) => {}
        }
    }

    fn start_twin(&self) {
        let (site, signals) = (Arc::clone(&self.parts.site), self.signals.clone());
        tokio::spawn(async move {
            let signal = match site.start_twin().await {
                Ok(twin) => Signal::TwinReady(twin),
                Err(failure) => Signal::Event(Event::Failed(failure)),
            };
            let _ = signals.send(signal);
        });
    }

    fn watch_twin(&mut self, twin: &Twin) {
        self.seen = Seen::new(&twin.devices);
        forward(twin.vmm.watch_devices().map(UnboundedReceiverStream::new), &self.signals, Signal::Seen);
        forward(twin.vmm.take_replies().map(ReceiverStream::new), &self.signals, Signal::Reply);
        let (vmm, signals) = (Arc::clone(&twin.vmm), self.signals.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = vmm.exited() => {
                    let _ = signals.send(Signal::Event(Event::Failed(twin_ended())));
                }
                () = signals.closed() => {}
            }
        });
    }

    fn set_state(&mut self, index: usize, to: MigrationState) {
        let Some(device) = self.twin.as_ref().and_then(|twin| twin.devices.get(index)).cloned() else {
            return;
        };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let event = match device.set_state(to).await {
                Ok(reached) => {
                    let (at, change) = traced(device.name(), &reached);
                    let step = DeviceStep {
                        at: Some(at.into()),
                        device: change.device,
                        from: change.from,
                        to: change.to,
                        took_ns: change.took_ns,
                    };
                    let _ = signals.send(Signal::Step(step));
                    Event::DeviceReached(index, reached.to)
                }
                Err(error) => {
                    let (found, failure) = refused("destination", &error);
                    Event::DeviceFailed(index, found, failure)
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    /// The driver of a device that the twin has loaded says here whether it takes its state, while it is not too late. QEMU itself
    /// would reset a device that refuses, and say that it runs.
    fn check(&self, index: usize) {
        let Some(device) = self.twin.as_ref().and_then(|twin| twin.devices.get(index)).cloned() else {
            return;
        };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let event = match check(index, &device, &signals).await {
                Ok(()) => Event::DeviceReached(index, MigrationState::Stop),
                Err((found, failure)) => {
                    let message = format!("at the destination, {}", failure.message);
                    Event::DeviceFailed(index, found, Failure::new(failure.reason, message))
                }
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    /// A VMM that drives its devices wakes them before its vCPUs: where it got them is read back, for the trace. The VM runs.
    fn resume_and_look(&self) {
        let Some(twin) = &self.twin else { return };
        let (vmm, devices, signals) = (Arc::clone(&twin.vmm), twin.devices.clone(), self.signals.clone());
        tokio::spawn(async move {
            let event = match resume(vmm.as_ref()).await {
                Ok(()) => {
                    for (index, device) in devices.iter().enumerate() {
                        if let Ok(seen) = look(index, device).await {
                            if seen.state != MigrationState::Running {
                                warn!(device = device.name(), state = %seen.state, "the VM runs, but a device of it does not");
                            }
                            let _ = signals.send(Signal::Seen(seen));
                        }
                    }
                    Event::Resumed
                }
                Err(error) => Event::Failed(of_twin(&error)),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    fn call(&self, call: VmmCall, done: Event) {
        let Some(vmm) = self.twin.as_ref().map(|twin| Arc::clone(&twin.vmm)) else { return };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            let event = match call(vmm.as_ref()).await {
                Ok(()) => done,
                Err(error) => Event::Failed(of_twin(&error)),
            };
            let _ = signals.send(Signal::Event(event));
        });
    }

    /// A device that holds part of a foreign state is reset before the twin lets go of it: its state would outlive the twin.
    fn discard(&mut self) {
        self.streams.cancel();
        self.stream_tasks.close();
        let (twin, site, signals, tasks) =
            (self.twin.take(), Arc::clone(&self.parts.site), self.signals.clone(), self.stream_tasks.clone());
        tokio::spawn(async move {
            tasks.wait().await;
            for device in twin.into_iter().flat_map(|twin| twin.devices) {
                if let Err(error) = device.reset().await {
                    warn!(%error, "a device that is given back could not be reset");
                }
                device.release().await;
            }
            site.discard().await;
            let _ = signals.send(Signal::Event(Event::Discarded));
        });
    }

    async fn finish(&mut self, end: End) -> (End, Option<Arc<dyn Vmm>>) {
        let mut left = None;
        if let Some(twin) = self.twin.take() {
            for device in twin.devices {
                device.release().await;
            }
            left = Some(twin.vmm);
        }
        match &end {
            End::Running => self.parts.site.keep().await,
            End::Discarded(failure) => {
                self.tell_reserved.send_if_modified(|told| {
                    let first = told.is_none();
                    if first {
                        *told = Some(Err(failure.clone()));
                    }
                    first
                });
            }
            End::Stuck(failure) => warn!(%failure, "the VM could not be started, and stays as it is"),
        }
        info!(migration = self.parts.migration_id, ?end, "destination: the migration has ended");
        let failure = match &end {
            End::Running => None,
            End::Discarded(failure) | End::Stuck(failure) => Some(failure.clone()),
        };
        let ended = Ended { outcome: 0, timings_ns: [0; 3], device_bytes: Vec::new(), vmm_bytes: 0 };
        self.parts.ledger.finish(failure, ended).await;
        (end, left)
    }
}

/// Passes on what the twin tells by itself.
fn forward<T: Send + 'static>(
    told: Option<impl Stream<Item = T> + Send + Unpin + 'static>,
    signals: &mpsc::UnboundedSender<Signal>,
    signal: fn(T) -> Signal,
) {
    let Some(mut told) = told else { return };
    let signals = signals.clone();
    tokio::spawn(async move {
        while let Some(item) = told.next().await {
            if signals.send(signal(item)).is_err() {
                return;
            }
        }
    });
}

/// From RESUMING to STOP. One that stands anywhere else was never given a state, or has been reset since.
async fn check(
    index: usize,
    device: &DeviceHandle,
    signals: &mpsc::UnboundedSender<Signal>,
) -> Result<(), (Option<MigrationState>, Failure)> {
    let seen = look(index, device).await.map_err(|failure| (None, failure))?;
    let _ = signals.send(Signal::Seen(seen));
    if seen.state != MigrationState::Resuming {
        let message = format!(
            "device {} was read back in {} and not in RESUMING: the twin has not loaded its state",
            device.name(),
            seen.state.name()
        );
        return Err((Some(seen.state), Failure::new(Reason::DeviceFailed, message)));
    }
    device
        .set_state(MigrationState::Stop)
        .await
        .map_err(|error| (error.found(), Failure::new(Reason::DeviceFailed, error.to_string())))?;
    let _ = signals.send(Signal::Seen(look(index, device).await.map_err(|failure| (None, failure))?));
    Ok(())
}

fn twin_ended() -> Failure {
    Failure::new(Reason::TwinFailed, "the twin's process ended")
}

fn failed(failure: &Failure) -> HandoverResponse {
    let failed = Failed { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() };
    HandoverResponse { message: Some(handover_response::Message::Failed(failed)) }
}

fn now() -> Option<transfer::Clock> {
    Some(Clock::now().into())
}
