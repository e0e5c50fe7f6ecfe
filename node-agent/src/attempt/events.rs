//! What has happened in one attempt, numbered. Every stream of events replays it from the start and then
//! follows.
//!
//! It stays in memory with the attempt, and a part of it comes from the other end, so it is bounded: texts are
//! cut, and beyond a number of events more of them are counted instead of kept. Of what only counts as it is
//! now (progress, estimates, doubts), the latest are kept. The migration goes on whatever is dropped.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use futures::Stream;
use parking_lot::Mutex;
use slackwater_proto::node::{
    DeviceStateChange, Doubt, Estimate, Finished, MigrationEvent, Phase, Progress, migration_event::What,
};
use tokio::sync::watch;
use tracing::warn;

use crate::host::clock::Clock;

/// At most this many events of the other end are kept: a device takes about eight steps there.
const PEER_EVENTS: usize = 1024;
/// At most this many phases and device steps of this end are kept.
const OWN_EVENTS: usize = 4096;
/// At most this many reports of progress, estimates and doubts are kept, each.
const LATEST: usize = 16;
/// A device's name: a PCI address, or the UUID of a mediated device.
const NAME_BYTES: usize = 128;
/// A reason, as Kubernetes allows it.
const REASON_BYTES: usize = 128;
/// A message for a person, as everywhere on the wire.
const MESSAGE_BYTES: usize = 4096;
/// A blob is one device's, and a request has at most 256.
const DEVICES: usize = 256;

/// The events of one attempt.
#[derive(Clone, Debug)]
pub struct EventLog {
    node: Arc<str>,
    events: Arc<Mutex<Events>>,
    extent: watch::Sender<Extent>,
}

/// What is kept.
#[derive(Debug, Default)]
struct Events {
    /// By their sequence.
    kept: BTreeMap<u64, MigrationEvent>,
    last: u64,
    own: usize,
    peer: usize,
    progress: VecDeque<u64>,
    estimates: VecDeque<u64>,
    doubts: VecDeque<u64>,
    /// Phases and device steps that were not kept.
    dropped: u64,
}

impl Events {
    /// Whether there is room for an event, of this end or the other. Makes some for what is replaced.
    fn has_room(&mut self, what: &What, of_peer: bool) -> bool {
        let next = self.last + 1;
        let latest = match what {
            What::Finished(_) => return true,
            What::Progress(_) => &mut self.progress,
            What::Estimate(_) => &mut self.estimates,
            What::Doubt(_) => &mut self.doubts,
            What::Phase(_) | What::DeviceState(_) => {
                let (count, limit) = match of_peer {
                    true => (&mut self.peer, PEER_EVENTS),
                    false => (&mut self.own, OWN_EVENTS),
                };
                let has_room = *count < limit;
                match has_room {
                    true => *count += 1,
                    false => self.dropped += 1,
                }
                return has_room;
            }
        };
        latest.push_back(next);
        if latest.len() > LATEST
            && let Some(oldest) = latest.pop_front()
        {
            self.kept.remove(&oldest);
        }
        true
    }
}

/// Cuts the texts and lists of an event.
fn bounded(what: What) -> What {
    match what {
        What::DeviceState(change) => {
            What::DeviceState(DeviceStateChange { device: cut(change.device, NAME_BYTES), ..change })
        }
        What::Doubt(doubt) => What::Doubt(Doubt {
            reason: cut(doubt.reason, REASON_BYTES),
            message: cut(doubt.message, MESSAGE_BYTES),
        }),
        What::Finished(mut finished) => {
            finished.device_bytes.truncate(DEVICES);
            finished.reason = cut(finished.reason, REASON_BYTES);
            finished.message = cut(finished.message, MESSAGE_BYTES);
            What::Finished(finished)
        }
        What::Phase(_) | What::Progress(_) | What::Estimate(_) => what,
    }
}

/// At most `limit` bytes, between characters.
fn cut(mut text: String, limit: usize) -> String {
    if text.len() > limit {
        let room = limit.saturating_sub("...".len());
        let end = (0..=room).rev().find(|index| text.is_char_boundary(*index)).unwrap_or_default();
        text.truncate(end);
        text.push_str("...");
        // The capacity would stay.
        text.shrink_to_fit();
    }
    text
}

/// How far the log goes.
#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    /// The last sequence.
    last: u64,
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
        match events.kept.last_key_value()?.1.what.as_ref()? {
            What::Finished(finished) => Some(finished.clone()),
            _ => None,
        }
    }

    /// All events that are kept, from the first on, as they come, up to Finished.
    pub fn follow(&self) -> impl Stream<Item = MigrationEvent> + Send + use<> {
        let log = self.clone();
        let extent = self.extent.subscribe();
        futures::stream::unfold((log, extent, 0_u64), |(log, mut extent, seen)| async move {
            extent.wait_for(|extent| extent.last > seen || extent.finished).await.ok()?;
            // The latest is never dropped, so there is one unless the end has been seen.
            let after = (Bound::Excluded(seen), Bound::Unbounded);
            let event = log.events.lock().kept.range(after).next().map(|(_, event)| event.clone())?;
            let seen = event.sequence;
            Some((event, (log, extent, seen)))
        })
    }

    fn push(&self, node: &str, at: Clock, what: What) {
        let mut events = self.events.lock();
        if self.extent.borrow().finished {
            return;
        }
        let mut what = bounded(what);
        if !events.has_room(&what, *node != *self.node) {
            if events.dropped == 1 {
                warn!(node, "there are more events than are kept: {what:?} and later ones are only counted");
            }
            return;
        }
        if let What::Finished(finished) = &mut what {
            finished.dropped_events = events.dropped;
        }
        let finished = matches!(what, What::Finished(_));
        events.last += 1;
        let sequence = events.last;
        let event = MigrationEvent {
            sequence,
            node: node.to_owned(),
            monotonic_ns: at.monotonic_ns,
            unix_ns: at.unix_ns,
            what: Some(what),
        };
        events.kept.insert(sequence, event);
        self.extent.send_replace(Extent { last: sequence, finished });
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use proptest::prelude::*;
    use slackwater_proto::node::Outcome;
    use slackwater_proto::prost::Message;

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

    /// What a log may take: every event kept, with its texts and the node's name at their limits.
    const LOG_LIMIT_BYTES: usize = (PEER_EVENTS + OWN_EVENTS + 3 * LATEST) * (NAME_BYTES + 320)
        + LATEST * (REASON_BYTES + MESSAGE_BYTES)
        + REASON_BYTES
        + MESSAGE_BYTES
        + 10 * DEVICES;

    /// A run of the same event, from one end.
    fn run() -> impl Strategy<Value = (bool, What, usize)> {
        let text = || "[a-zä]{0,8}".prop_flat_map(|piece| (0..3000_usize).prop_map(move |n| piece.repeat(n)));
        let change = |device| DeviceStateChange { device, from: u32::MAX, to: u32::MAX, took_ns: u64::MAX };
        let what = prop_oneof![
            text().prop_map(move |device| What::DeviceState(change(device))),
            any::<i32>().prop_map(What::Phase),
            any::<u64>().prop_map(|vmm_bytes| What::Progress(Progress { device_bytes: 0, vmm_bytes })),
            any::<u64>().prop_map(|downtime_ns| What::Estimate(Estimate { downtime_ns, allowed_ns: 0 })),
            (text(), text()).prop_map(|(reason, message)| What::Doubt(Doubt { reason, message })),
        ];
        (any::<bool>(), what, 1..3000_usize)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn whatever_comes_the_log_stays_below_its_limit_and_has_its_end(
            runs in proptest::collection::vec(run(), 1..12),
            message in "[a-zä]{0,64}",
        ) {
            let log = EventLog::new(&"n".repeat(253));
            for (of_peer, what, times) in runs {
                for _ in 0..times {
                    let node: &str = if of_peer { "peer" } else { &log.node };
                    log.push(node, AT, what.clone());
                }
            }
            let end = Finished { message: message.repeat(1000), device_bytes: vec![u64::MAX; 9999], ..finished() };
            log.finished(AT, end);
            let events = log.events.lock();
            let bytes: usize = events.kept.values().map(Message::encoded_len).sum();
            prop_assert!(bytes <= LOG_LIMIT_BYTES, "{bytes} bytes");
            let last = events.kept.last_key_value().unwrap().1;
            prop_assert!(matches!(last.what, Some(What::Finished(_))));
            let kept = u64::try_from(events.kept.len()).unwrap();
            prop_assert!(kept <= last.sequence);
            prop_assert!(events.kept.iter().all(|(sequence, event)| *sequence == event.sequence));
        }
    }

    #[tokio::test]
    async fn a_destination_that_floods_is_counted_and_leaves_room_for_what_happens_here() {
        let log = EventLog::new("node-a");
        let change = |device: &str| DeviceStateChange { device: device.to_owned(), ..Default::default() };
        for _ in 0..5000 {
            log.peer_device("node-b", AT, change(&"x".repeat(1 << 16)));
            log.peer_phase("node-b", AT, Phase::Loaded);
        }
        log.device(AT, change("d"));
        log.finished(AT, finished());
        let events: Vec<_> = log.follow().collect().await;
        assert_eq!(events.len(), PEER_EVENTS + 2);
        assert_eq!(events[PEER_EVENTS].what, Some(What::DeviceState(change("d"))));
        let dropped = 10_000 - PEER_EVENTS as u64;
        assert_eq!(log.end(), Some(Finished { dropped_events: dropped, ..finished() }));
    }

    #[tokio::test]
    async fn of_progress_a_late_stream_gets_the_latest_and_an_open_one_loses_nothing_that_is_kept() {
        let log = EventLog::new("node-a");
        let mut open = Box::pin(log.follow());
        for vmm_bytes in 1..=100 {
            log.progress(AT, Progress { device_bytes: 0, vmm_bytes });
        }
        log.phase(AT, Phase::Pausing);
        let first = open.next().await.unwrap().sequence;
        assert_eq!(first, 100 - LATEST as u64 + 1);
        let late: Vec<_> = log.follow().take(LATEST + 1).map(|event| event.sequence).collect().await;
        assert_eq!(late.last(), Some(&101));
        assert!(late.is_sorted());
    }
}
