//! The source's end of an attempt, from outside: what it needs, and the handle to it.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use slackwater_handover::policy::StopPlan;
use slackwater_handover::source::Event;
use slackwater_handover::state::{Features, MigrationState};
use slackwater_handover::{Failure, Record, Word};
use slackwater_proto::node::{JournalRecord, JournalState};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Signal, SourceAttempt};
use crate::attempt::entry::Marks;
use crate::attempt::events::EventLog;
use crate::attempt::ledger::{EndRecord, Ledger};
use crate::attempt::link::Peer;
use crate::attempt::tasks::Signals;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::Vmm;
use crate::vmm::budget::Budget;

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
    /// Where an agent that has started again found it; None for a new attempt.
    pub recovered: Option<Recovered>,
    /// The commit must have happened by then.
    pub pre_commit_timeout: Duration,
    /// What the copying may cost.
    pub budget: Budget,
    /// Gives back the rest of the VM here, once it runs elsewhere.
    pub release: Box<dyn FnOnce() -> BoxFuture<'static, ()> + Send>,
    /// The events of this attempt.
    pub log: EventLog,
}

/// What an agent that has started again found of an attempt.
pub struct Recovered {
    /// The last record in the journal.
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

/// A request to give the migration up.
pub(super) struct AbortRequest {
    pub(super) why: String,
    pub(super) answer: oneshot::Sender<Result<(), PastTheCommit>>,
}

/// The point of no return has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the migration has been committed: the VM is, or will be, running at the destination")]
pub struct PastTheCommit;

/// A running attempt.
#[derive(Clone, Debug)]
pub struct SourceRun {
    abort_requests: mpsc::Sender<AbortRequest>,
    signals: Signals<Signal>,
    log: EventLog,
    ledger: Ledger,
    done: watch::Receiver<bool>,
    waits: watch::Receiver<bool>,
}

impl SourceRun {
    /// Starts the attempt, or goes on with one that was recovered.
    pub fn start(parts: SourceParts) -> Self {
        let (abort_requests, requested) = mpsc::channel(1);
        let (finished, done) = watch::channel(false);
        let (log, ledger) = (parts.log.clone(), parts.ledger.clone());
        let (report, waits) = watch::channel(false);
        let attempt = SourceAttempt::new(parts, report);
        let signals = attempt.tasks.signals();
        tokio::spawn(async move {
            attempt.run(requested).await;
            finished.send_replace(true);
        });
        Self { abort_requests, signals, log, ledger, done, waits }
    }

    /// An attempt that ended under an earlier agent: only its log and its journal are left.
    pub fn over(log: EventLog, ledger: Ledger) -> Self {
        let (abort_requests, _) = mpsc::channel(1);
        let (_, done) = watch::channel(true);
        let (_, waits) = watch::channel(false);
        Self { abort_requests, signals: Signals::of_ended(), log, ledger, done, waits }
    }

    /// Its word: what its journal says.
    pub fn journalled(&self) -> JournalState {
        self.ledger.state()
    }

    /// Whether its end is durable: before that, the VM and its devices are not free.
    pub fn end_record(&self) -> watch::Receiver<EndRecord> {
        self.ledger.end()
    }

    /// The operator relays what the destination has journalled.
    pub fn peer_says(&self, word: Word) {
        self.signals.send(Event::Relayed(word));
    }

    /// Its events.
    pub fn log(&self) -> &EventLog {
        &self.log
    }

    /// Waits for the end: the VM runs where it is to run then, or nowhere.
    pub async fn ended(&self) {
        let _ = self.done.clone().wait_for(|done| *done).await;
    }

    /// Gives the migration up and waits until the VM runs here again, or until it is certain that it stays
    /// here and only a device that hangs keeps it from running: the events name that. An attempt that has
    /// ended is left as it ended.
    ///
    /// # Errors
    /// If the point of no return has passed.
    pub async fn abort(&self, why: String) -> Result<(), PastTheCommit> {
        let (answer, answered) = oneshot::channel();
        if self.abort_requests.send(AbortRequest { why, answer }).await.is_err() {
            return self.ended_without_commit();
        }
        match answered.await {
            Ok(answer) => answer?,
            Err(_) => return self.ended_without_commit(),
        }
        let mut waits = self.waits.clone();
        tokio::select! {
            () = self.ended() => {}
            Ok(_) = waits.wait_for(|waits| *waits) => {}
        }
        Ok(())
    }

    fn ended_without_commit(&self) -> Result<(), PastTheCommit> {
        match self.journalled().record() {
            JournalRecord::Committed | JournalRecord::Released => Err(PastTheCommit),
            _ => Ok(()),
        }
    }
}
