//! The journal of one attempt at one end. Records are written one after the other, in the order in which they
//! are asked for, and never block the task that owns the state machine.
//!
//! An attempt has ended when its end is durable, and not before: the next agent acts on every journal without
//! an end. The end is written again and again until it is ([`Ledger::end`]). Callers hear of it after a few
//! tries, since what it says is true already; the VM and the devices stay held.

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::{Failure, Reason, Record};
use slackwater_proto::node::JournalState;
use tokio::sync::{mpsc, watch};
use tracing::{error, info};

use crate::attempt::entry::{Ended, Entry, FailureEntry};
use crate::host::clock::Clock;
use crate::journal::{Journal, JournalError, JournalFile, Key};

/// The pause before a record that must not fail is written again.
const AGAIN: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 1000 });

/// After so many tries to record the end of an attempt, callers hear of it all the same.
const FINISH_TRIES: u32 = 5;

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 60_000 });

/// Whether the end of an attempt is in its journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndRecord {
    /// It has not ended, or its end is being recorded.
    Open,
    /// It has ended, and that could not be recorded yet, for this reason.
    Failing(String),
    /// It is durable that it has ended, or that it never began.
    Durable,
}

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
    end: watch::Receiver<EndRecord>,
}

struct Keeper {
    journal: Arc<Journal>,
    key: Key,
    book: Book,
    entry: Entry,
    state: watch::Sender<JournalState>,
    end: watch::Sender<EndRecord>,
}

/// The file of the journal.
#[derive(Debug)]
enum Book {
    /// Nothing has been written.
    New,
    /// The first record could not be written. What is left of that is not known.
    Doubtful,
    Open(JournalFile),
    /// It is there, and must be opened again.
    Closed,
}

impl Ledger {
    /// A ledger without a record; `entry` is written with the first one.
    pub fn new(journal: Arc<Journal>, key: Key, entry: Entry) -> Self {
        Self::keep(journal, key, Book::New, entry, JournalState::default())
    }

    /// A ledger that contains `entry` already.
    pub fn go_on(journal: Arc<Journal>, key: Key, file: JournalFile, entry: Entry) -> Self {
        let state = entry.state();
        Self::keep(journal, key, Book::Open(file), entry, state)
    }

    /// The ledger of an attempt that has ended.
    pub fn ended(entry: &Entry) -> Self {
        let (jobs, _) = mpsc::unbounded_channel();
        Self { jobs, state: watch::channel(entry.state()).1, end: watch::channel(EndRecord::Durable).1 }
    }

    fn keep(journal: Arc<Journal>, key: Key, book: Book, entry: Entry, state: JournalState) -> Self {
        let (jobs, mut inbox) = mpsc::unbounded_channel();
        let (publish, state) = watch::channel(state);
        let (recorded, end) = watch::channel(EndRecord::Open);
        let mut keeper = Keeper { journal, key, book, entry, state: publish, end: recorded };
        tokio::spawn(async move {
            while let Some(job) = inbox.recv().await {
                keeper.perform(job).await;
            }
        });
        Self { jobs, state, end }
    }

    /// Whether the end is durable.
    pub fn end(&self) -> watch::Receiver<EndRecord> {
        self.end.clone()
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

    /// Records the end: nothing is recorded after it. Returns when that has succeeded, or has failed a few
    /// times. It goes on then: see [`Ledger::end`].
    pub(super) async fn finish(&self, failure: Option<Failure>, ended: Ended) {
        let (done, finished) = tokio::sync::oneshot::channel();
        let done: Done = Box::new(move |result| {
            let _ = done.send(result);
        });
        let _ = self.jobs.send(Job::Finish { failure, ended, done });
        let _ = finished.await;
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
                let entry = Entry { ended: Some(ended), ..self.changed(failure.as_ref()) };
                self.finish(&entry, done).await;
            }
        }
    }

    /// Until it succeeds: the next agent would act on a journal without an end.
    async fn finish(&mut self, entry: &Entry, done: Done) {
        let mut done = Some(done);
        let mut pause = AGAIN;
        for tries in 1_u32.. {
            let Err(failure) = self.write(entry.clone(), true).await else { break };
            if tries >= FINISH_TRIES {
                let file = self.journal.file(&self.key);
                let why =
                    format!("the end of the migration cannot be put into {}: {failure}", file.display());
                if let Some(done) = done.take() {
                    let migration = self.key.id();
                    error!(migration, why, "the VM and its devices stay held until it is; trying again");
                    // It has ended, recorded or not, and a caller that asks may know.
                    if matches!(self.book, Book::Open(_) | Book::Closed) {
                        self.state.send_replace(entry.state());
                    }
                    done(Err(failure));
                }
                self.end.send_if_modified(|end| {
                    let changed = *end != EndRecord::Failing(why.clone());
                    *end = EndRecord::Failing(why);
                    changed
                });
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            tokio::time::sleep(pause).await;
        }
        self.end.send_replace(EndRecord::Durable);
        match done {
            Some(done) => done(Ok(())),
            None => info!(migration = self.key.id(), "the end of the migration has been recorded after all"),
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
        let (journal, key) = (Arc::clone(&self.journal), self.key.clone());
        // If the task ends early, what it has done to the file is not known.
        let book = match &self.book {
            Book::New | Book::Doubtful => Book::Doubtful,
            Book::Open(_) | Book::Closed => Book::Closed,
        };
        let book = std::mem::replace(&mut self.book, book);
        let written = tokio::task::spawn_blocking(move || put(&journal, &key, book, &content, last)).await;
        let (book, result) = written.map_err(|error| failed(error.to_string()))?;
        self.book = book;
        result.map_err(|error| failed(error.with_causes()))?;
        if matches!(self.book, Book::Open(_)) {
            self.state.send_replace(entry.state());
            self.entry = entry;
        }
        Ok(())
    }
}

fn put(
    journal: &Journal,
    key: &Key,
    book: Book,
    content: &[u8],
    last: bool,
) -> (Book, Result<(), JournalError>) {
    let mut file = match book {
        Book::Open(file) => file,
        // Where nothing was to be recorded, nothing was begun.
        Book::New if last => return (Book::New, Ok(())),
        Book::Doubtful if last => match journal.left_by_failed_creation(key) {
            Ok(Some(file)) => file,
            Ok(None) => return (Book::New, Ok(())),
            Err(error) => return (Book::Doubtful, Err(error)),
        },
        Book::New | Book::Doubtful => {
            return match journal.create(key, content) {
                Ok(file) => (Book::Open(file), Ok(())),
                Err(error) => (Book::Doubtful, Err(error)),
            };
        }
        Book::Closed => match journal.reopen(key) {
            Ok(file) => file,
            Err(error) => return (Book::Closed, Err(error)),
        },
    };
    let result = if last { file.finish(content) } else { file.write(content) };
    (Book::Open(file), result)
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
