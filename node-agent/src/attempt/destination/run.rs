//! An attempt, as others see it: what it needs, and the handle on it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::future::BoxFuture;
use slackwater_handover::destination::{End, Event};
use slackwater_handover::policy::Driver;
use slackwater_handover::state::{Features, MigrationState};
use slackwater_handover::{Blob, Failure, Reason, Record, Word};
use slackwater_proto::channel::words;
use slackwater_proto::node::JournalState;
use slackwater_proto::tonic::{Status, Streaming};
use slackwater_proto::transfer::{HandoverRequest, HandoverResponse, SendBlobRequest, handover_request};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::{TaskTracker, TaskTrackerToken};
use tracing::info;

use super::{Shell, Signal, failed};
use crate::attempt::Seen;
use crate::attempt::entry::Process;
use crate::attempt::ledger::Ledger;
use crate::attempt::receiving::Receiver;
use crate::transfer::channel::Channel;
use crate::transfer::incoming::{self, ReceiveError};
use crate::vfio::worker::DeviceHandle;
use crate::vmm::Vmm;

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
    /// The end of what the twin has said, for people who want to know why it has ended.
    fn last_words(&self) -> String;
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

/// A blob that may arrive now.
pub(super) struct OpenBlob {
    pub(super) receiver: Receiver,
    pub(super) given_up: CancellationToken,
    /// Held until the blob's last byte has been handed on, or none will be any more.
    pub(super) _under_way: TaskTrackerToken,
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
        // Why the twin has ended is said on the hand-over's stream, with what it said last.
        ReceiveError::Sink(failure) if failure.reason == Reason::TwinFailed => {
            let status = Status::aborted(failure.message.clone());
            (failure, status)
        }
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
