//! Performs what the destination's state machine decides, and tells it what came of it.

mod run;
mod twin;

pub use run::{DestinationParts, DestinationRun, MayHaveRun, Recovered, Site, Twin};
use slackwater_handover::destination::{Destination, Effect, End, Event, Found, Phase};
use slackwater_handover::policy::Driver;
use slackwater_handover::{Blob, Failure, Reason, Record};

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use slackwater_proto::node::DeviceStateChange;
use slackwater_proto::tonic::Status;
use slackwater_proto::transfer::{
    self, DeviceStep, Failed, HandoverResponse, Loaded, Ready, Started, Starting, VmmReply, handover_response,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTracker;
use tracing::{info, warn};

use self::run::OpenBlob;
use super::receiving::{Receiver, TwinLoad};
use super::{Seen, confirm, resume};
use crate::attempt::entry::Ended;
use crate::faults;
use crate::host::clock::Clock;
use crate::transfer::channel::Channel;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::{DeviceSeen, Vmm};

type Answers = mpsc::UnboundedSender<Result<HandoverResponse, Status>>;

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
            let before = machine.phase();
            let (next, effects) = machine.step(event);
            machine = next;
            if machine.phase() != before {
                faults::halt(faults::End::Destination, machine.phase()).await;
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

    fn accept(&mut self, signal: Signal, machine: &Destination) -> Option<Event> {
        match signal {
            Signal::Event(mut event) => {
                match &mut event {
                    Event::PeerSays(word) => self.stated.clone_from(&word.stated_because),
                    // One that did not even start has told it already.
                    Event::Failed(failure) if failure.reason == Reason::TwinFailed && self.twin.is_some() => {
                        failure.message.push_str(&self.parts.site.last_words());
                    }
                    _ => {}
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
        self.parts.ledger.finish(failure, Ended::default()).await;
        (end, left)
    }
}

fn failed(failure: &Failure) -> HandoverResponse {
    let failed = Failed { reason: failure.reason.as_str().to_owned(), message: failure.message.clone() };
    HandoverResponse { message: Some(handover_response::Message::Failed(failed)) }
}

fn now() -> Option<transfer::Clock> {
    Some(Clock::now().into())
}
