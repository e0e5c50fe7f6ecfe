//! What the source does by the clock: it gives up what takes too long before the commit, and reports
//! progress.

use std::pin::Pin;
use std::time::Duration;

use slackwater_handover::source::Phase;
use slackwater_handover::{Failure, Reason};
use tokio::time::{Interval, Sleep, interval, sleep};

use crate::attempt::limits;

/// How often progress is reported while bytes are moving.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// The timers of one attempt.
pub(super) struct Timers {
    /// `preCommitTimeout`; None once it has passed.
    commit: Option<Limit<()>>,
    /// Of the phase in which the machine is, if that is bounded.
    phase: Option<Limit<Phase>>,
    progress: Interval,
}

/// A limit that has not passed yet.
struct Limit<T> {
    of: T,
    limit: Duration,
    passes: Pin<Box<Sleep>>,
}

/// What is due.
pub(super) enum Due {
    /// A report of the progress.
    Progress,
    /// The end of the migration: something took too long.
    GiveUp(Failure),
}

impl Timers {
    /// Starts them with the attempt.
    pub(super) fn start(pre_commit_timeout: Duration) -> Self {
        let passes = Box::pin(sleep(pre_commit_timeout));
        let commit = Some(Limit { of: (), limit: pre_commit_timeout, passes });
        Self { commit, phase: None, progress: interval(PROGRESS_EVERY) }
    }

    /// The machine has entered a phase.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = limits::of(phase).map(|limit| {
            let passes = Box::pin(sleep(limit));
            Limit { of: phase, limit, passes }
        });
    }

    /// Waits for what is due next; `phase` is where the machine is. May be cancelled. Each limit passes once.
    pub(super) async fn next(&mut self, phase: Phase) -> Due {
        let message = tokio::select! {
            ((), limit) = passed(&mut self.commit) => {
                format!("the migration was not committed within {limit:?} (preCommitTimeout); it was in {phase:?}")
            }
            (phase, limit) = passed(&mut self.phase) => {
                format!("the migration was in {phase:?} for {limit:?} and was given up")
            }
            _ = self.progress.tick() => return Due::Progress,
        };
        Due::GiveUp(Failure::new(Reason::TimedOut, message))
    }
}

/// Returns when a limit passes, and takes it then; never if there is none.
async fn passed<T>(slot: &mut Option<Limit<T>>) -> (T, Duration) {
    if let Some(limit) = slot {
        limit.passes.as_mut().await;
    }
    match slot.take() {
        Some(Limit { of, limit, .. }) => (of, limit),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_limit_passes_once_and_a_phase_that_is_left_has_none() {
        let mut timers = Timers::start(Duration::from_millis(40));
        timers.enter(Phase::Pausing);
        timers.enter(Phase::Capturing);
        assert!(timers.phase.is_none());
        let limit = Duration::from_millis(10);
        timers.phase = Some(Limit { of: Phase::Saving, limit, passes: Box::pin(sleep(limit)) });
        let mut given_up = Vec::new();
        let watch = async {
            loop {
                if let Due::GiveUp(failure) = timers.next(Phase::Saving).await {
                    given_up.push(failure.message);
                }
            }
        };
        assert!(tokio::time::timeout(Duration::from_millis(200), watch).await.is_err());
        assert_eq!(
            given_up,
            [
                "the migration was in Saving for 10ms and was given up",
                "the migration was not committed within 40ms (preCommitTimeout); it was in Saving",
            ]
        );
    }
}
