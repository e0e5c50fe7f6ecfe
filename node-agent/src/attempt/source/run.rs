//! An attempt, as others see it: what it needs, and the handle on it.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use slackwater_handover::policy::StopPlan;
use slackwater_handover::source::Event;
use slackwater_handover::state::{Features, MigrationState};
use slackwater_handover::{Failure, Record, Word};
use slackwater_proto::node::{JournalRecord, JournalState};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Shell, Signal};
use crate::attempt::entry::Marks;
use crate::attempt::events::EventLog;
use crate::attempt::ledger::Ledger;
use crate::attempt::link::Peer;
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
pub(super) struct AbortWish {
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
