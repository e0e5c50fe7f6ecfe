//! Questions to the kernel that may never be answered: opening a free device, taking one out of a VMM's
//! process, reading sysfs and procfs.
//!
//! Each runs in a thread of its own, which nothing waits for longer than [`ANSWER_LIMIT`]. Of one device there
//! is one question at a time, which everybody who asks waits for together: a device that hangs costs one
//! thread, and whoever asks for it later has the answer at once. It is asked again when the thread returns.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout, timeout_at};

/// How long an answer is waited for.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// At most this many threads wait for the kernel.
const THREADS: usize = 32;

/// There is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoAnswer {
    /// The kernel does not return.
    #[error("{about} hangs: the kernel has not returned from {question} for {} s", for_how_long.as_secs())]
    Hangs {
        /// What was asked about.
        about: String,
        /// What was asked.
        question: &'static str,
        /// For how long, when that was noticed.
        for_how_long: Duration,
    },
    /// Too many questions are open.
    #[error("{about} was not looked at: {threads} other questions to the kernel have no answer")]
    Busy {
        /// What was to be asked about.
        about: String,
        /// How many.
        threads: usize,
    },
    /// No thread could be started, or it ended early.
    #[error("{about} could not be looked at: {why}")]
    Failed {
        /// What was to be asked about.
        about: String,
        /// Why not.
        why: String,
    },
}

/// A question without an answer.
#[derive(Debug)]
struct Open<T> {
    question: &'static str,
    since: Instant,
    answer: watch::Receiver<Option<T>>,
}

impl<T> Clone for Open<T> {
    fn clone(&self) -> Self {
        Self { question: self.question, since: self.since, answer: self.answer.clone() }
    }
}

/// The open questions.
#[derive(Debug)]
pub(super) struct Asking<T> {
    open: Arc<Mutex<HashMap<String, Open<T>>>>,
    threads: Arc<Semaphore>,
    limit: Duration,
    /// Counts the answers that have come late.
    late: watch::Sender<u64>,
}

impl<T: Clone + Send + Sync + 'static> Asking<T> {
    /// None yet.
    pub(super) fn new() -> Self {
        Self::with(THREADS, ANSWER_LIMIT)
    }

    pub(super) fn with(threads: usize, limit: Duration) -> Self {
        let threads = Arc::new(Semaphore::new(threads));
        Self { open: Arc::default(), threads, limit, late: watch::Sender::new(0) }
    }

    /// Changes when an answer comes that nobody has waited for any more.
    pub(super) fn late_answers(&self) -> watch::Receiver<u64> {
        self.late.subscribe()
    }

    /// The question about `about` that hangs now.
    pub(super) fn hangs(&self, about: &str) -> Option<NoAnswer> {
        let open = self.open.lock();
        let Open { question, since, .. } = open.get(about)?;
        let for_how_long = since.elapsed();
        let hangs = || NoAnswer::Hangs { about: about.to_owned(), question, for_how_long };
        (for_how_long >= self.limit).then(hangs)
    }

    /// The answer to a question, or to the one about the same that is open.
    ///
    /// # Errors
    /// [`NoAnswer`]. The question stays open then.
    pub(super) async fn ask(
        &self,
        about: &str,
        question: &'static str,
        answer: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NoAnswer> {
        if let Some(open) = self.open_about(about) {
            return self.wait(about, open).await;
        }
        let Ok(Ok(thread)) = timeout(self.limit, Arc::clone(&self.threads).acquire_owned()).await else {
            let threads = self.open.lock().len();
            return Err(NoAnswer::Busy { about: about.to_owned(), threads });
        };
        let open = self.begin(about, question, answer, thread)?;
        self.wait(about, open).await
    }

    fn open_about(&self, about: &str) -> Option<Open<T>> {
        self.open.lock().get(about).cloned()
    }

    fn begin(
        &self,
        about: &str,
        question: &'static str,
        answer: impl FnOnce() -> T + Send + 'static,
        thread: OwnedSemaphorePermit,
    ) -> Result<Open<T>, NoAnswer> {
        let (give, given) = watch::channel(None);
        let asked = Open { question, since: Instant::now(), answer: given };
        // Held until the thread is known to have begun, so that the question is open before its answer comes.
        let mut open = self.open.lock();
        if let Some(asked_meanwhile) = open.get(about) {
            return Ok(asked_meanwhile.clone());
        }
        let (all, late, limit) = (Arc::clone(&self.open), self.late.clone(), self.limit);
        let (name, since) = (about.to_owned(), asked.since);
        let asking = move || {
            // Dropped in any case, also if the question panics.
            let closed = Closed { all, name };
            let answered = answer();
            drop(closed);
            give.send_replace(Some(answered));
            drop(thread);
            if since.elapsed() >= limit {
                late.send_modify(|count| *count += 1);
            }
        };
        thread::Builder::new()
            .name(format!("ask-{about}"))
            .spawn(asking)
            .map_err(|error| NoAnswer::Failed { about: about.to_owned(), why: error.to_string() })?;
        open.insert(about.to_owned(), asked.clone());
        Ok(asked)
    }

    async fn wait(&self, about: &str, open: Open<T>) -> Result<T, NoAnswer> {
        let Open { question, since, mut answer } = open;
        let answered = timeout_at(since + self.limit, answer.wait_for(Option::is_some)).await;
        let about = || about.to_owned();
        match answered {
            Ok(Ok(answer)) => {
                answer.clone().ok_or_else(|| NoAnswer::Failed { about: about(), why: "no answer".to_owned() })
            }
            Ok(Err(_)) => Err(NoAnswer::Failed { about: about(), why: "its thread ended early".to_owned() }),
            Err(_) => Err(NoAnswer::Hangs { about: about(), question, for_how_long: since.elapsed() }),
        }
    }
}

/// Closes a question when it is dropped.
struct Closed<T> {
    all: Arc<Mutex<HashMap<String, Open<T>>>>,
    name: String,
}

impl<T> Drop for Closed<T> {
    fn drop(&mut self) {
        self.all.lock().remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::vfio::fake::Gate;

    /// More than a thread takes to start on a loaded machine.
    const LIMIT: Duration = Duration::from_secs(2);

    #[tokio::test]
    async fn a_device_that_hangs_is_named_and_costs_one_thread_and_no_other_device_waits_for_it() {
        let (asking, gate, asked) = (Asking::with(2, LIMIT), Gate::new(), Arc::new(AtomicUsize::new(0)));
        let hanging = || {
            let (gate, asked) = (gate.clone(), Arc::clone(&asked));
            move || {
                asked.fetch_add(1, Ordering::Relaxed);
                gate.pass();
                1
            }
        };
        let (first, second, other) = tokio::join!(
            asking.ask("device a", "opening it", hanging()),
            asking.ask("device a", "opening it", hanging()),
            asking.ask("device b", "opening it", || 2),
        );
        assert_eq!(other, Ok(2));
        let words = first.unwrap_err().to_string();
        assert!(
            words.starts_with("device a hangs: the kernel has not returned from opening it for "),
            "{words}"
        );
        assert!(matches!(second, Err(NoAnswer::Hangs { .. })));
        assert!(matches!(asking.hangs("device a"), Some(NoAnswer::Hangs { .. })));
        assert_eq!(asking.hangs("device b"), None);
        // It is not waited for again.
        let began = Instant::now();
        assert!(asking.ask("device a", "opening it", hanging()).await.is_err());
        assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
        assert_eq!(asked.load(Ordering::Relaxed), 1);

        let mut late = asking.late_answers();
        gate.open();
        late.changed().await.unwrap();
        assert_eq!(asking.hangs("device a"), None);
        assert_eq!(asking.ask("device a", "opening it", hanging()).await, Ok(1));
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn only_so_many_threads_wait_for_the_kernel_and_the_rest_is_refused_in_time() {
        let (asking, gate) = (Asking::with(1, LIMIT), Gate::new());
        let hanging = gate.clone();
        assert!(asking.ask("device a", "opening it", move || hanging.pass()).await.is_err());
        let refused = asking.ask("device b", "opening it", || ()).await.unwrap_err();
        assert_eq!(refused, NoAnswer::Busy { about: "device b".to_owned(), threads: 1 });
        gate.open();
        asking.ask("device b", "opening it", || ()).await.unwrap();
    }

    #[tokio::test]
    async fn a_question_that_panics_is_closed() {
        // A thread that panics may take long to say so.
        let asking = Asking::<()>::with(1, Duration::from_secs(60));
        let failed = asking.ask("device a", "opening it", || panic!("as the test wants")).await;
        assert!(matches!(failed, Err(NoAnswer::Failed { .. })), "{failed:?}");
        asking.ask("device a", "opening it", || ()).await.unwrap();
    }

    #[tokio::test]
    async fn a_caller_that_stops_waiting_leaves_the_question_to_the_others() {
        let (asking, gate) = (Arc::new(Asking::with(1, Duration::from_secs(60))), Gate::new());
        let (hanging, first) = (gate.clone(), Arc::clone(&asking));
        let asker = tokio::spawn(async move {
            let ask = first.ask("device a", "opening it", move || {
                hanging.pass();
                7
            });
            ask.await
        });
        gate.reached().await;
        asker.abort();
        assert!(asker.await.unwrap_err().is_cancelled());
        let (answer, ()) = tokio::join!(asking.ask("device a", "opening it", || 8), async { gate.open() });
        assert_eq!(answer, Ok(7));
    }
}
