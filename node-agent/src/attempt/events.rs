//! What has happened in one attempt, numbered and complete. Every stream of events replays it from the start
//! and then follows.

use std::sync::Arc;

use futures::Stream;
use parking_lot::Mutex;
use slackwater_proto::node::{
    DeviceStateChange, Doubt, Estimate, Finished, MigrationEvent, Phase, Progress, migration_event::What,
};
use tokio::sync::watch;

use crate::host::clock::Clock;

/// The events of one attempt.
#[derive(Clone, Debug)]
pub struct EventLog {
    node: Arc<str>,
    events: Arc<Mutex<Vec<MigrationEvent>>>,
    extent: watch::Sender<Extent>,
}

/// How far the log goes.
#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    /// Events so far.
    count: usize,
    /// The last of them is Finished.
    finished: bool,
}

impl EventLog {
    /// An empty log, kept by the agent of `node`.
    pub fn new(node: &str) -> Self {
        Self { node: node.into(), events: Arc::default(), extent: watch::Sender::new(Extent::default()) }
    }

    /// A phase was reached here, at `at`.
    pub fn phase(&self, at: Clock, phase: Phase) {
        self.push(&self.node, at, What::Phase(phase.into()));
    }

    /// A phase was reached at the other end, on its clock.
    pub fn peer_phase(&self, peer: &str, at: Clock, phase: Phase) {
        self.push(peer, at, What::Phase(phase.into()));
    }

    /// A device here was read back in another state.
    pub fn device(&self, at: Clock, change: DeviceStateChange) {
        self.push(&self.node, at, What::DeviceState(change));
    }

    /// A device of the other end was read back in another state, on its clock.
    pub fn peer_device(&self, peer: &str, at: Clock, change: DeviceStateChange) {
        self.push(peer, at, What::DeviceState(change));
    }

    /// How much has been sent.
    pub fn progress(&self, at: Clock, progress: Progress) {
        self.push(&self.node, at, What::Progress(progress));
    }

    /// What the VMM expects of the blackout.
    pub fn estimate(&self, at: Clock, estimate: Estimate) {
        self.push(&self.node, at, What::Estimate(estimate));
    }

    /// Something keeps the migration from its end.
    pub fn doubt(&self, at: Clock, doubt: Doubt) {
        self.push(&self.node, at, What::Doubt(doubt));
    }

    /// The end. Nothing is recorded after it.
    pub fn finished(&self, at: Clock, finished: Finished) {
        self.push(&self.node, at, What::Finished(finished));
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<Finished> {
        let events = self.events.lock();
        events.iter().rev().find_map(|event| match &event.what {
            Some(What::Finished(finished)) => Some(finished.clone()),
            _ => None,
        })
    }

    /// All events from the first on, as they come, up to Finished.
    pub fn follow(&self) -> impl Stream<Item = MigrationEvent> + Send + use<> {
        let log = self.clone();
        let extent = self.extent.subscribe();
        futures::stream::unfold((log, extent, 0_usize), |(log, mut extent, next)| async move {
            let Extent { count, finished } =
                *extent.wait_for(|extent| extent.count > next || extent.finished).await.ok()?;
            if next >= count && finished {
                return None;
            }
            let event = log.events.lock().get(next).cloned()?;
            Some((event, (log, extent, next + 1)))
        })
    }

    fn push(&self, node: &str, at: Clock, what: What) {
        let mut events = self.events.lock();
        if self.extent.borrow().finished {
            return;
        }
        let finished = matches!(what, What::Finished(_));
        let sequence = events.len() as u64 + 1;
        events.push(MigrationEvent {
            sequence,
            node: node.to_owned(),
            monotonic_ns: at.monotonic_ns,
            unix_ns: at.unix_ns,
            what: Some(what),
        });
        self.extent.send_replace(Extent { count: events.len(), finished });
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use slackwater_proto::node::Outcome;

    use super::*;

    const AT: Clock = Clock { monotonic_ns: 7, unix_ns: 9 };

    fn finished() -> Finished {
        Finished { outcome: Outcome::Succeeded.into(), ..Finished::default() }
    }

    #[tokio::test]
    async fn a_stream_that_joins_late_gets_every_event_and_ends_after_the_last() {
        let log = EventLog::new("node-a");
        log.phase(AT, Phase::Connected);
        log.peer_phase("node-b", AT, Phase::Loaded);
        let stream = log.follow();
        log.finished(AT, finished());
        log.phase(AT, Phase::RolledBack);
        let events: Vec<_> = stream.collect().await;
        assert_eq!(events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(events[1].node, "node-b");
        assert_eq!(events[2].what, Some(What::Finished(finished())));
        assert_eq!(log.follow().count().await, 3);
    }

    #[tokio::test]
    async fn a_stream_follows_what_comes_later() {
        let log = EventLog::new("node-a");
        let mut stream = Box::pin(log.follow());
        let (first, ()) = tokio::join!(stream.next(), async { log.phase(AT, Phase::PreCopy) });
        assert_eq!(first.unwrap().what, Some(What::Phase(Phase::PreCopy.into())));
    }
}
