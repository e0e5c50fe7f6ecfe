//! The journal of one attempt at one end. Records are written one after the other, in the order in which they
//! are asked for, and never block the task that owns the state machine.

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::{Failure, Reason, Record};
use slackwater_proto::node::JournalState;
use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::attempt::entry::{Ended, Entry, FailureEntry};
use crate::host::clock::Clock;
use crate::journal::{Journal, JournalError, JournalFile, Key};

/// The pause before a record that must not fail is written again.
const AGAIN: Duration = Duration::from_secs(1);

/// How many times the agent tries to record the end of an attempt.
const FINISH_TRIES: u32 = 5;

type Done = Box<dyn FnOnce(Result<(), Failure>) + Send>;
type Change = Box<dyn FnOnce(&mut Entry) + Send>;

enum Job {
    /// Goes into the next record.
    Amend(Change),
    Record {
        record: Record,
        failure: Option<Failure>,
        again: bool,
        done: Done,
    },
    Finish {
        failure: Option<Failure>,
        ended: Ended,
        done: Done,
    },
}

/// The handle to it. Clones are handles to the same journal.
#[derive(Clone, Debug)]
pub struct Ledger {
    jobs: mpsc::UnboundedSender<Job>,
    state: watch::Receiver<JournalState>,
}

struct Keeper {
    journal: Arc<Journal>,
    key: Key,
    file: Option<JournalFile>,
    entry: Entry,
    state: watch::Sender<JournalState>,
}

impl Ledger {
    /// A ledger without a record; `entry` is written with the first one.
    pub fn new(journal: Arc<Journal>, key: Key, entry: Entry) -> Self {
        Self::keep(journal, key, None, entry, JournalState::default())
    }

    /// A ledger that contains `entry` already.
    pub fn go_on(journal: Arc<Journal>, key: Key, file: JournalFile, entry: Entry) -> Self {
        let state = entry.state();
        Self::keep(journal, key, Some(file), entry, state)
    }

    /// The ledger of an attempt that has ended.
    pub fn ended(entry: &Entry) -> Self {
        let (jobs, _) = mpsc::unbounded_channel();
        Self { jobs, state: watch::channel(entry.state()).1 }
    }

    fn keep(
        journal: Arc<Journal>,
        key: Key,
        file: Option<JournalFile>,
        entry: Entry,
        state: JournalState,
    ) -> Self {
        let (jobs, mut inbox) = mpsc::unbounded_channel();
        let (publish, state) = watch::channel(state);
        let mut keeper = Keeper { journal, key, file, entry, state: publish };
        tokio::spawn(async move {
            while let Some(job) = inbox.recv().await {
                keeper.perform(job).await;
            }
        });
        Self { jobs, state }
    }

    /// What the journal says.
    pub fn state(&self) -> JournalState {
        self.state.borrow().clone()
    }

    /// Changes what the next record says besides.
    pub(super) fn amend(&self, change: impl FnOnce(&mut Entry) + Send + 'static) {
        let _ = self.jobs.send(Job::Amend(Box::new(change)));
    }

    /// Makes a record durable; `again`: it has just failed.
    pub(super) fn record(
        &self,
        record: Record,
        failure: Option<Failure>,
        again: bool,
        done: impl FnOnce(Result<(), Failure>) + Send + 'static,
    ) {
        let _ = self.jobs.send(Job::Record { record, failure, again, done: Box::new(done) });
    }

    /// Records the end: nothing is recorded after it. If that fails, the log says so, and the next agent
    /// finds out itself.
    pub(super) async fn finish(&self, failure: Option<Failure>, ended: Ended) {
        let (done, finished) = tokio::sync::oneshot::channel();
        let done: Done = Box::new(move |result| {
            let _ = done.send(result);
        });
        let _ = self.jobs.send(Job::Finish { failure, ended, done });
        if let Ok(Err(failure)) = finished.await {
            warn!(%failure, "the end of a migration could not be recorded");
        }
    }
}

impl Keeper {
    async fn perform(&mut self, job: Job) {
        match job {
            Job::Amend(change) => change(&mut self.entry),
            Job::Record { record, failure, again, done } => {
                if again {
                    tokio::time::sleep(AGAIN).await;
                }
                let entry = Entry { record, ..self.changed(failure.as_ref()) };
                done(self.write(entry, false).await);
            }
            Job::Finish { failure, ended, done } => {
                // Where not even the first record could be made, nothing was begun.
                if self.file.is_none() {
                    return done(Ok(()));
                }
                let entry = Entry { ended: Some(ended), ..self.changed(failure.as_ref()) };
                let mut result = self.write(entry.clone(), true).await;
                for _ in 1..FINISH_TRIES {
                    if result.is_ok() {
                        break;
                    }
                    tokio::time::sleep(AGAIN).await;
                    result = self.write(entry.clone(), true).await;
                }
                // The attempt has ended, recorded or not, and a caller that asks may know.
                self.state.send_replace(entry.state());
                done(result);
            }
        }
    }

    fn changed(&self, failure: Option<&Failure>) -> Entry {
        Entry {
            failure: failure.map(FailureEntry::from).or_else(|| self.entry.failure.clone()),
            recorded_unix_ns: Clock::now().unix_ns,
            ..self.entry.clone()
        }
    }

    async fn write(&mut self, entry: Entry, last: bool) -> Result<(), Failure> {
        let failed = |error: String| {
            Failure::new(Reason::JournalFailed, format!("{:?} could not be recorded: {error}", entry.record))
        };
        let content = serde_json::to_vec(&entry).map_err(|error| failed(error.to_string()))?;
        let (journal, key, file) = (Arc::clone(&self.journal), self.key.clone(), self.file.take());
        let written = tokio::task::spawn_blocking(move || put(&journal, &key, file, &content, last)).await;
        let (file, result) = written.map_err(|error| failed(error.to_string()))?;
        self.file = file;
        result.map_err(|error| failed(error.to_string()))?;
        self.state.send_replace(entry.state());
        self.entry = entry;
        Ok(())
    }
}

fn put(
    journal: &Journal,
    key: &Key,
    file: Option<JournalFile>,
    content: &[u8],
    last: bool,
) -> (Option<JournalFile>, Result<(), JournalError>) {
    match file {
        None => match journal.create(key, content) {
            Ok(file) => (Some(file), Ok(())),
            Err(error) => (None, Err(error)),
        },
        Some(file) if last => match file.finish(content) {
            Ok(()) => (None, Ok(())),
            Err(error) => (journal.reopen(key).ok(), Err(error)),
        },
        Some(mut file) => {
            let result = file.write(content);
            (Some(file), result)
        }
    }
}
