//! The destination's end of an attempt, from outside: what it needs, and the handle to it.

use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::future::BoxFuture;
use slackwater_handover::destination::{End, Event};
use slackwater_handover::policy::Driver;
use slackwater_handover::state::{Features, MigrationState};
use slackwater_handover::{Blob, Failure, Reason, Record, Word};
use slackwater_proto::node::JournalState;
use slackwater_proto::refusal::Refusal;
use slackwater_proto::tonic::{Code, Status, Streaming};
use slackwater_proto::transfer::handover_response::Message;
use slackwater_proto::transfer::{Failed, HandoverRequest, HandoverResponse, SendBlobRequest};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tracing::info;

use super::peer::{OpenBlob, describe_loss, receive_decisions};
use super::{DestinationAttempt, Ending, Signal};
use crate::attempt::entry::Process;
use crate::attempt::ledger::{EndRecord, Ledger};
use crate::attempt::tasks::Signals;
use crate::transfer::channel::Channel;
use crate::transfer::incoming;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::Vmm;

/// The twin when it has been started, paused.
pub struct Twin {
    /// Its VMM.
    pub vmm: Arc<dyn Vmm>,
    /// Its devices, borrowed from it, in the VM's order.
    pub devices: Vec<DeviceHandle>,
    /// Its process, for the journal: an agent that starts again finds it by this.
    pub process: Option<Process>,
}

/// The place where the VM lands: what only the node knows about starting a twin, keeping it, and clearing it
/// away.
pub trait Site: Send + Sync {
    /// Prepares the devices' identity, starts the twin paused and borrows its devices.
    fn start_twin(&self) -> BoxFuture<'_, Result<Twin, Failure>>;
    /// The end of the twin's log, for a person who wants to know why it has ended.
    fn last_words(&self) -> String;
    /// Lets the devices take over the VM's network identity.
    fn activate_identity(&self) -> BoxFuture<'_, Result<(), Failure>>;
    /// The VM runs here: makes it known. May be repeated.
    ///
    /// # Errors
    /// Why it is not known yet, for a person.
    fn keep(&self) -> BoxFuture<'_, Result<(), String>>;
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
    /// Where the VM lands.
    pub site: Arc<dyn Site>,
    /// For how long the source may leave a reservation unused.
    pub silence_timeout: Duration,
    /// The journal of this attempt.
    pub ledger: Ledger,
    /// Where an agent that has started again found it; None for a new attempt.
    pub recovered: Option<Recovered>,
}

/// What an agent that has started again found of an attempt.
pub struct Recovered {
    /// The last record in the journal.
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

/// A reservation, and what becomes of it.
#[derive(Clone, Debug)]
pub struct DestinationRun {
    signals: Signals<Signal>,
    reserved: watch::Receiver<Option<Result<(), Failure>>>,
    end: watch::Receiver<Option<End>>,
    free: watch::Receiver<bool>,
    ledger: Ledger,
    doubt: watch::Receiver<Option<Failure>>,
}

impl DestinationRun {
    /// Starts the attempt, or goes on with one that was recovered.
    pub fn start(parts: DestinationParts) -> Self {
        let (reserve, reserved) = watch::channel(None);
        let (finish, end) = watch::channel(None);
        let (release, free) = watch::channel(false);
        let (site, ledger) = (Arc::clone(&parts.site), parts.ledger.clone());
        let (report, doubt) = watch::channel(None);
        let attempt = DestinationAttempt::new(parts, reserve, report);
        let signals = attempt.tasks.signals();
        tokio::spawn(async move {
            let Ending { end, vmm } = attempt.run().await;
            let stuck = matches!(end, End::Stuck(_));
            finish.send_replace(Some(end));
            if stuck {
                // A VM that could not be started is kept as it is, for a person to look at, until its process
                // ends.
                if let Some(vmm) = vmm {
                    vmm.exited().await;
                }
                site.discard().await;
            }
            release.send_replace(true);
        });
        Self { signals, reserved, end, free, ledger, doubt }
    }

    /// An attempt that ended under an earlier agent: only its journal is left.
    pub fn over(ledger: Ledger, end: End) -> Self {
        let reserved = match &end {
            End::Discarded(failure) => Err(failure.clone()),
            End::Running | End::Stuck(_) => Ok(()),
        };
        let (_, reserved) = watch::channel(Some(reserved));
        let (_, end) = watch::channel(Some(end));
        let (_, free) = watch::channel(true);
        let (_, doubt) = watch::channel(None);
        Self { signals: Signals::of_ended(), reserved, end, free, ledger, doubt }
    }

    /// Its word: what its journal says, and what it waits for.
    pub fn journalled(&self) -> JournalState {
        let mut state = self.ledger.state();
        if let Some(Failure { reason, message }) = &*self.doubt.borrow()
            && !state.ended
            && state.reason.is_empty()
        {
            state.reason = reason.as_str().to_owned();
            state.message.clone_from(message);
        }
        state
    }

    /// Whether its end is durable: before that, the VM and its devices are not free.
    pub fn end_record(&self) -> watch::Receiver<EndRecord> {
        self.ledger.end()
    }

    /// What the source has journalled: it says so when it asks, or the operator relays it.
    pub fn peer_says(&self, word: Word) {
        self.signals.send(Event::PeerSays(word));
    }

    /// Waits until the devices are in RESUMING.
    ///
    /// # Errors
    /// Why they are not: all that had been claimed is given back then.
    pub async fn reserved(&self) -> Result<(), Failure> {
        let mut reserved = self.reserved.clone();
        match reserved.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone().unwrap_or(Ok(())),
            Err(_) => Err(Failure::new(Reason::TwinFailed, "the reservation ended early")),
        }
    }

    /// Waits for the end. All that was held has been given back then, except for a VM that could not be
    /// started.
    pub async fn ended(&self) -> Option<End> {
        self.end.clone().wait_for(Option::is_some).await.ok()?.clone()
    }

    /// Waits until nothing is held any more: after the end, or, if the VM could not be started, after the end
    /// of its process.
    pub async fn free(&self) {
        let _ = self.free.clone().wait_for(|free| *free).await;
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// The source has connected and said Hello. Returns the answers to it.
    pub fn handover(
        &self,
        requests: Streaming<HandoverRequest>,
    ) -> impl Stream<Item = Result<HandoverResponse, Status>> + Send + use<> {
        let (answers, stream) = mpsc::unbounded_channel();
        if self.signals.send(Signal::Connected(answers.clone())) {
            tokio::spawn(receive_decisions(requests, self.signals.clone()));
        } else {
            let gone = match self.end() {
                Some(End::Discarded(failure) | End::Stuck(failure)) => failure,
                Some(End::Running) | None => {
                    Failure::new(Reason::Released, "the reservation has been given back")
                }
            };
            let message = Some(Message::Failed(Failed::from(&gone)));
            let _ = answers.send(Ok(HandoverResponse { message }));
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
        let (reply, replied) = oneshot::channel();
        // The hand-over's stream says why; the source waits for that.
        let gone = || -> Status {
            Refusal::new(Code::Aborted, Reason::Released, "the reservation has been given back").into()
        };
        if !self.signals.send(Signal::OpenBlob(blob, channel, reply)) {
            return Err(gone());
        }
        let OpenBlob { receiver, guard } = replied.await.map_err(|_| gone())??;
        let received = guard.until_stopped(incoming::receive(stream, receiver)).await.ok_or_else(gone)?;
        let (event, answer) = match received {
            Ok(summary) => {
                let (bytes, digest) = (summary.length_bytes, summary.digest);
                info!(?blob, channel = channel.number(), bytes, %digest, "verified");
                // The main one waits for the others.
                (channel.is_main().then_some(Event::BlobVerified(blob)), Ok(()))
            }
            Err(error) => {
                let (failure, status) = describe_loss(blob, error);
                (Some(Event::Failed(failure)), Err(status))
            }
        };
        if let Some(event) = event {
            self.signals.send(event);
        }
        answer
    }

    /// Gives everything back and waits until that is done. A reservation that has been given back already is
    /// left as it is.
    ///
    /// # Errors
    /// If the VM may have run here.
    pub async fn release(&self, why: Failure) -> Result<(), MayHaveRun> {
        let (reply, replied) = oneshot::channel();
        if self.signals.send(Signal::Release(why, reply))
            && let Ok(reply) = replied.await
        {
            reply?;
        }
        match self.ended().await {
            Some(End::Running | End::Stuck(_)) => Err(MayHaveRun),
            Some(End::Discarded(_)) | None => Ok(()),
        }
    }
}
