//! The destination's end of an attempt: carries out what the core's state machine decides, and reports to it
//! what came of that.
//!
//! ```text
//!   DestinationRun ── signals ──▶ DestinationAttempt (owns slackwater_handover::destination::Destination)
//!                                      │ effects                ▲ signals
//!                                      ▼                        │
//!                                 tasks: twin.rs (VMM, devices), peer.rs (the source)
//! ```

mod peer;
mod run;
mod twin;

pub use run::{DestinationParts, DestinationRun, MayHaveRun, Recovered, Site, Twin};

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use slackwater_handover::destination::{Destination, Effect, End, Event, Found, Phase};
use slackwater_handover::devices::Move;
use slackwater_handover::{Blob, Failure, Reason, Record};
use slackwater_proto::tonic::Status;
use slackwater_proto::transfer::handover_response::Message;
use slackwater_proto::transfer::{
    self, DeviceStep, Failed, HandoverResponse, Loaded, Ready, Started, Starting, VmmReply,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Sleep, sleep};
use tracing::{error, info, warn};

use self::peer::OpenBlob;
use super::device::{DeviceOutcome, EndDevice, Hanging, LastStates};
use super::entry::Ended;
use super::receiving::VmmLoad;
use super::tasks::Tasks;
use crate::faults;
use crate::host::clock::Clock;
use crate::transfer::channel::Channel;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{DeviceSeen, Vmm};

/// The first pause, and the longest, before a VM that runs here is made known again.
const KEEP_AGAIN: (Duration, Duration) =
    (Duration::from_millis(if cfg!(test) { 10 } else { 500 }), Duration::from_secs(10));

type AnswerSender = mpsc::UnboundedSender<Result<HandoverResponse, Status>>;

/// What the tasks and the handle send to the task that owns the machine.
enum Signal {
    Event(Event),
    /// The source has connected.
    Connected(AnswerSender),
    TwinReady(Twin),
    /// A device has changed its state, and was read back.
    Step(DeviceStep),
    /// A device that its VMM drives: reported by the VMM, or read.
    DeviceSeen(DeviceSeen),
    /// The twin is to resume the VM, and gives no answer for long.
    TwinSilent(Failure),
    /// What the twin says to the VMM at the source.
    Reply(Bytes),
    OpenBlob(Blob, Channel, oneshot::Sender<Result<OpenBlob, Status>>),
    Release(Failure, oneshot::Sender<Result<(), MayHaveRun>>),
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

struct DestinationAttempt {
    parts: DestinationParts,
    tasks: Tasks<Signal>,
    inbox: mpsc::UnboundedReceiver<Signal>,
    twin: Option<Twin>,
    last_states: LastStates,
    answers: Option<AnswerSender>,
    /// Steps that the source does not know, because it is not connected yet.
    steps: Vec<DeviceStep>,
    /// Devices whose state has been sent, or is being sent.
    opened: BTreeSet<usize>,
    /// The load of the VMM's own state, once its first channel has come.
    load: Option<VmmLoad>,
    /// The answer to the reservation.
    reserved: watch::Sender<Option<Result<(), Failure>>>,
    /// Why the machine gives up, if it does: it goes into the journal.
    failure: Option<Failure>,
    /// Why an administrator has stated the source's word in its place, if one has.
    stated_because: Option<String>,
    /// What this end waits for, for whoever asks.
    doubt: watch::Sender<Option<Failure>>,
    end: Option<End>,
}

/// How an attempt has ended at the destination.
struct Ending {
    end: End,
    /// The twin's VMM, unless it has been cleared away.
    vmm: Option<Arc<dyn Vmm>>,
}

/// For how long the source may leave the reservation unused. The time begins when the reservation is
/// confirmed: the source cannot connect before that.
struct Silence(Option<Pin<Box<Sleep>>>);

impl Silence {
    fn begin(&mut self, limit: Duration) {
        self.0 = Some(Box::pin(sleep(limit)));
    }

    /// Returns once, when the time has passed. May be cancelled.
    async fn passed(&mut self) {
        match &mut self.0 {
            Some(limit) => limit.as_mut().await,
            None => std::future::pending().await,
        }
        self.0 = None;
    }
}

impl DestinationAttempt {
    fn new(
        parts: DestinationParts,
        reserved: watch::Sender<Option<Result<(), Failure>>>,
        doubt: watch::Sender<Option<Failure>>,
    ) -> Self {
        let (tasks, inbox) = Tasks::new();
        Self {
            parts,
            tasks,
            inbox,
            twin: None,
            last_states: LastStates::running(&[]),
            answers: None,
            steps: Vec::new(),
            opened: BTreeSet::new(),
            load: None,
            reserved,
            failure: None,
            stated_because: None,
            doubt,
            end: None,
        }
    }

    async fn run(mut self) -> Ending {
        let mut machine = self.machine();
        let mut silence = Silence(None);
        let mut event = Event::Start;
        loop {
            let before = machine.phase();
            let answers = matches!(event, Event::DeviceAnswers(_));
            let (next, effects) = machine.step(event);
            machine = next;
            if machine.phase() != before {
                faults::halt(faults::End::Destination, machine.phase()).await;
            }
            self.failure = machine.failure().cloned();
            if answers || machine.phase() != before {
                self.doubt.send_replace(None);
            }
            if effects.contains(&Effect::ConfirmReserved) {
                silence.begin(self.parts.silence_timeout);
            }
            for effect in effects {
                self.perform(effect);
            }
            if let Some(end) = self.end.take() {
                return self.finish(end).await;
            }
            event = self.next_event(&machine, &mut silence).await;
        }
    }

    fn machine(&mut self) -> Destination {
        let driver = self.parts.driver;
        let Some(found) = self.parts.recovered.take() else {
            return Destination::new(&self.parts.features, driver);
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
        let found = Found { record: found.record, devices: found.found, twin_there, failure: found.failure };
        Destination::recover(&features, driver, found)
    }

    async fn next_event(&mut self, machine: &Destination, silence: &mut Silence) -> Event {
        loop {
            tokio::select! {
                Some(signal) = self.inbox.recv() => {
                    if let Some(event) = self.accept(signal, machine) {
                        return event;
                    }
                }
                () = silence.passed(), if self.answers.is_none() => {
                    let message = format!(
                        "the source did not connect within {:?} of the reservation", self.parts.silence_timeout
                    );
                    return Event::PeerLost(Failure::new(Reason::SourceSilent, message));
                }
            }
        }
    }

    /// The event that a signal means to the machine, if it means one.
    fn accept(&mut self, signal: Signal, machine: &Destination) -> Option<Event> {
        match signal {
            Signal::Event(mut event) => {
                match &mut event {
                    Event::PeerSays(word) => self.stated_because.clone_from(&word.stated_because),
                    // The failure of a twin that did not even start has its last words already.
                    Event::Failed(failure) if failure.reason == Reason::TwinFailed && self.twin.is_some() => {
                        *failure = failure.clone().and(&self.parts.site.last_words());
                    }
                    _ => {}
                }
                Some(event)
            }
            Signal::Connected(answers) => {
                self.answers = Some(answers);
                Some(Event::PeerConnected)
            }
            Signal::TwinReady(twin) => {
                self.watch_twin(&twin);
                let process = twin.process.clone();
                self.parts.ledger.amend(move |entry| entry.vmm = process);
                if machine.phase() == Phase::StartingTwin {
                    // RESERVED is in the journal already; now its process is, too, so that the next agent
                    // finds it.
                    self.parts.ledger.record(Record::Reserved, None, false, |_| {});
                }
                self.twin = Some(twin);
                Some(Event::TwinReady)
            }
            Signal::Step(step) => {
                self.answer(Message::DeviceStep(step));
                None
            }
            Signal::DeviceSeen(seen) => {
                self.trace(seen);
                None
            }
            Signal::TwinSilent(failure) => {
                self.wait_for(failure);
                None
            }
            Signal::Reply(data) => {
                self.answer(Message::VmmReply(VmmReply { data }));
                None
            }
            Signal::OpenBlob(blob, channel, reply) => {
                let _ = reply.send(self.open_blob(blob, channel, machine));
                None
            }
            Signal::Release(why, reply) => {
                if machine.may_have_run() {
                    let _ = reply.send(Err(MayHaveRun));
                    return None;
                }
                let _ = reply.send(Ok(()));
                Some(Event::AbortReceived(why))
            }
        }
    }

    fn trace(&mut self, seen: DeviceSeen) {
        let device = self.twin.as_ref().and_then(|twin| twin.devices.get(seen.index));
        if let Some(traced) = device.and_then(|device| self.last_states.update(device, seen)) {
            self.answer(Message::DeviceStep(traced.into_step()));
        }
    }

    fn perform(&mut self, effect: Effect) {
        let tasks = self.tasks.clone();
        match effect {
            Effect::Report(phase) => {
                info!(migration = self.parts.migration_id, ?phase, "destination");
            }
            Effect::StartTwin => tasks.run(self.start_twin()),
            Effect::SetState(Move { index, from, to }) => self.run_on(index, |device| {
                let signals = tasks.signals();
                device.set_state(from, to, move |traced| {
                    signals.send(Signal::Step(traced.into_step()));
                })
            }),
            Effect::Check(index) => self.run_on(index, |device| twin::check(device, tasks.signals())),
            Effect::ConfirmReserved => {
                self.reserved.send_replace(Some(Ok(())));
            }
            Effect::SendReady => {
                self.answer(Message::Ready(Ready { at: now() }));
                for step in std::mem::take(&mut self.steps) {
                    self.answer(Message::DeviceStep(step));
                }
            }
            Effect::FinishLoad => self.run_call(|vmm| vmm.finish_load(), Event::LoadFinished),
            Effect::Record(record) => self.record(record, false),
            Effect::RecordAgain(record) => self.record(record, true),
            Effect::SendLoaded => self.answer(Message::Loaded(Loaded { at: now() })),
            Effect::ConfirmTwin => self.confirm_twin(),
            Effect::SendStarting => self.answer(Message::Starting(Starting { at: now() })),
            Effect::ActivateIdentity => {
                let site = Arc::clone(&self.parts.site);
                tasks.run(async move {
                    match site.activate_identity().await {
                        Ok(()) => Event::IdentityActivated,
                        Err(failure) => Event::Failed(failure),
                    }
                });
            }
            Effect::Resume => self.resume(),
            Effect::SendStarted => self.answer(Message::Started(Started { at: now() })),
            Effect::SendFailed(failure) => self.answer(Message::Failed(Failed::from(&failure))),
            Effect::Doubt(failure) => self.wait_for(failure),
            Effect::Discard => tasks.run(self.discard()),
            Effect::Finish(end) => self.end = Some(end),
        }
    }

    /// Tells whoever asks, and the source, what the migration waits for here.
    fn wait_for(&mut self, failure: Failure) {
        let migration = &self.parts.migration_id;
        warn!(migration, %failure, "destination: the migration waits");
        self.answer(Message::Doubt(transfer::Doubt::from(&failure)));
        self.doubt.send_replace(Some(failure));
    }

    fn record(&self, record: Record, again: bool) {
        let (signals, stated) = (self.tasks.signals(), self.stated_because.clone());
        self.parts.ledger.amend(move |entry| entry.stated_because = stated);
        self.parts.ledger.record(record, self.failure.clone(), again, move |result| {
            signals.send(match result {
                Ok(()) => Event::Recorded(record),
                Err(failure) => {
                    warn!(%failure, "a record could not be made durable");
                    Event::RecordFailed(record, failure)
                }
            });
        });
    }

    /// Says something to the source. Before it has connected, only the steps of devices are kept for it.
    fn answer(&mut self, message: Message) {
        match (&self.answers, message) {
            (Some(answers), message) => {
                let _ = answers.send(Ok(HandoverResponse { message: Some(message) }));
            }
            (None, Message::DeviceStep(step)) => self.steps.push(step),
            (None, _) => {}
        }
    }

    /// Makes the VM known that runs here, again and again until that succeeds: before, nobody could find it,
    /// and the attempt has not ended.
    async fn keep(&mut self) {
        let (mut pause, longest) = KEEP_AGAIN;
        let mut told = false;
        while let Err(why) = self.parts.site.keep().await {
            if !std::mem::replace(&mut told, true) {
                let migration = &self.parts.migration_id;
                error!(migration, why, "the VM runs here, and could not be made known yet; trying again");
            }
            let mut rest = std::pin::pin!(sleep(pause));
            pause = (pause * 2).min(longest);
            loop {
                tokio::select! {
                    () = &mut rest => break,
                    // Whatever comes now comes too late.
                    Some(signal) = self.inbox.recv() => if let Signal::Release(_, reply) = signal {
                        let _ = reply.send(Err(MayHaveRun));
                    }
                }
            }
        }
        if told {
            info!(migration = self.parts.migration_id, "the VM is known now");
        }
    }

    async fn finish(&mut self, end: End) -> Ending {
        let mut vmm = None;
        if let Some(twin) = self.twin.take() {
            EndDevice::close(twin.devices).await;
            vmm = Some(twin.vmm);
        }
        match &end {
            End::Running => self.keep().await,
            End::Discarded(failure) => {
                self.reserved.send_if_modified(|answer| {
                    let first = answer.is_none();
                    if first {
                        *answer = Some(Err(failure.clone()));
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
        self.parts.ledger.finish(failure, Ended::default()).await;
        Ending { end, vmm }
    }
}

fn now() -> Option<transfer::Clock> {
    Some(Clock::now().into())
}
