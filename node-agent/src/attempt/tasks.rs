//! Runs what takes time, and sends what comes of it to the task that owns the state machine.
//!
//! Each effect of a machine becomes one future that yields one signal. How the future runs says what may cut
//! it short:
//!
//! | method | the future is dropped |
//! |---|---|
//! | [`Tasks::run`], [`Tasks::detach`] | never: it may outlive the attempt |
//! | [`Tasks::run_until_end`] | when the attempt ends |
//! | [`Tasks::run_stream`] | when the streams are stopped |
//! | [`Tasks::run_guarded`] | never, and stopping the streams waits for it; it may cut parts of itself short |

use std::fmt;
use std::future::Future;

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Where a task sends its signals. Clones are handles to the same attempt.
pub(super) struct Signals<S>(mpsc::UnboundedSender<S>);

impl<S> fmt::Debug for Signals<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Signals").field(&self.0).finish()
    }
}

impl<S> Clone for Signals<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Signals<S> {
    /// Sends a signal. False: the attempt has ended and receives none any more.
    pub(super) fn send(&self, signal: impl Into<S>) -> bool {
        self.0.send(signal.into()).is_ok()
    }

    /// Waits for the end of the attempt.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }

    /// Of an attempt that has ended already.
    pub(super) fn of_ended() -> Self {
        Self(mpsc::unbounded_channel().0)
    }
}

/// The tasks of one attempt. Clones are handles to the same tasks.
pub(super) struct Tasks<S> {
    signals: Signals<S>,
    stop: CancellationToken,
    streams: TaskTracker,
}

impl<S> Clone for Tasks<S> {
    fn clone(&self) -> Self {
        Self { signals: self.signals.clone(), stop: self.stop.clone(), streams: self.streams.clone() }
    }
}

/// Held by whatever sends or receives a part of the VM: stopping the streams waits until it is dropped.
#[derive(Debug)]
pub(super) struct StreamGuard {
    stop: CancellationToken,
    _token: TaskTrackerToken,
}

impl StreamGuard {
    /// Runs the future until the streams are stopped. None: they were stopped first, and the future has been
    /// dropped.
    pub(super) async fn until_stopped<F: Future>(&self, future: F) -> Option<F::Output> {
        self.stop.run_until_cancelled(future).await
    }
}

impl<S: Send + 'static> Tasks<S> {
    /// No tasks yet, and where their signals arrive.
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<S>) {
        let (signals, inbox) = mpsc::unbounded_channel();
        let (stop, streams) = (CancellationToken::new(), TaskTracker::new());
        (Self { signals: Signals(signals), stop, streams }, inbox)
    }

    /// For a future that sends more than its one signal.
    pub(super) fn signals(&self) -> Signals<S> {
        self.signals.clone()
    }

    /// Runs a future to its end, and sends the signal that it yields.
    pub(super) fn run<F>(&self, future: F)
    where
        F: Future<Output: Into<S>> + Send + 'static,
    {
        let signals = self.signals();
        self.detach(async move {
            signals.send(future.await);
        });
    }

    /// Runs a future that yields nothing to its end.
    pub(super) fn detach(&self, future: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(future);
    }

    /// Runs a future until it yields a signal or the attempt ends.
    pub(super) fn run_until_end<F>(&self, future: F)
    where
        F: Future<Output: Into<S>> + Send + 'static,
    {
        let signals = self.signals();
        self.detach(async move {
            tokio::select! {
                signal = future => {
                    signals.send(signal);
                }
                () = signals.closed() => {}
            }
        });
    }

    /// Runs a future until it yields a signal or the streams are stopped.
    pub(super) fn run_stream<F>(&self, future: F)
    where
        F: Future<Output: Into<S>> + Send + 'static,
    {
        let guard = self.stream_guard();
        self.run_guarded(async move { guard.until_stopped(future).await });
    }

    /// Runs a future to its end, and has the stopping of the streams wait for it. None: there is no signal to
    /// send.
    pub(super) fn run_guarded<T: Into<S>>(&self, future: impl Future<Output = Option<T>> + Send + 'static) {
        let signals = self.signals();
        self.streams.spawn(async move {
            if let Some(signal) = future.await {
                signals.send(signal);
            }
        });
    }

    /// Sends each item of a stream as a signal, as long as the attempt receives them.
    pub(super) fn forward<T, I>(&self, items: Option<T>, signal: fn(I) -> S)
    where
        T: Stream<Item = I> + Send + Unpin + 'static,
        I: Send + 'static,
    {
        let Some(mut items) = items else { return };
        let signals = self.signals();
        self.detach(async move {
            while let Some(item) = items.next().await {
                if !signals.send(signal(item)) {
                    return;
                }
            }
        });
    }

    /// For a future that decides itself what is cut short, or runs elsewhere.
    pub(super) fn stream_guard(&self) -> StreamGuard {
        StreamGuard { stop: self.stop.clone(), _token: self.streams.token() }
    }

    /// Stops all streams now. The future returns when they have ended.
    pub(super) fn stop_streams(&self) -> impl Future<Output = ()> + Send + use<S> {
        self.stop.cancel();
        self.streams.close();
        let streams = self.streams.clone();
        async move { streams.wait().await }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_stopped_stream_sends_no_signal_and_a_guarded_one_is_waited_for() {
        let (tasks, mut inbox) = Tasks::<&str>::new();
        let (finish, finished) = oneshot::channel();
        tasks.run_stream(std::future::pending::<&str>());
        let guard = tasks.stream_guard();
        tasks.run_guarded(async move {
            assert_eq!(guard.until_stopped(std::future::pending::<()>()).await, None);
            finished.await.ok().map(|()| "saved")
        });
        let mut stopped = Box::pin(tasks.stop_streams());
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut stopped).await.is_err());
        finish.send(()).unwrap();
        stopped.await;
        assert_eq!(inbox.recv().await, Some("saved"));
        assert_eq!(inbox.recv().now_or_never(), None);
    }

    #[tokio::test]
    async fn a_task_that_waits_for_something_ends_with_the_attempt_and_others_outlive_it() {
        let (tasks, inbox) = Tasks::<&str>::new();
        let (held, dropped) = oneshot::channel::<()>();
        tasks.run_until_end(async move {
            let _held = held;
            std::future::pending::<&str>().await
        });
        let (finish, finished) = oneshot::channel();
        let (done, outlived) = oneshot::channel();
        tasks.run(async move {
            let _ = finished.await;
            let _ = done.send(());
            "too late"
        });
        drop(inbox);
        assert!(dropped.await.is_err());
        finish.send(()).unwrap();
        outlived.await.unwrap();
        assert!(!tasks.signals().send("after the end"));
    }
}
