//! The events of one attempt, as an agent streams them, and what a status shows of them.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use slackwater_api::{DeviceMigration, DeviceStep, TimelineEntry, format_duration};
use slackwater_proto::node::{DeviceStateChange, MigrationEvent, Phase, migration_event::What};
use slackwater_proto::prost::Message as _;

use crate::conditions::cut;

/// At most this many steps of a device, and entries of the timeline, go into a status: an object has an upper
/// size.
const SHOWN: usize = 64;
/// At most this many events of an attempt are kept: more than any agent keeps.
const KEPT: usize = 8192;
/// A node's name, and that of a device.
const NAME_BYTES: usize = 253;
/// A message for a person.
const MESSAGE_BYTES: usize = 4096;
/// Devices of a request.
const DEVICES: usize = 256;

/// The names of `enum vfio_device_mig_state` (include/uapi/linux/vfio.h), by number.
const KERNEL_STATES: [&str; 8] =
    ["ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"];

/// The events of one attempt, each once, in the order in which they were reported.
///
/// An agent that is joined again reports all from the start. An agent that was restarted numbers its events
/// from 1 again, and may report less than it did before; what it reported before is kept.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    events: Vec<MigrationEvent>,
    /// Of the current stream.
    last_sequence: u64,
    /// The events that came by earlier streams, as hashes.
    earlier: HashSet<u64>,
    /// Those of the current stream.
    current: Vec<u64>,
    keys: RandomState,
    /// How many were not kept.
    dropped: u64,
}

/// An event as far as the operator takes it in: an agent may say anything.
pub fn bounded(mut event: MigrationEvent) -> MigrationEvent {
    let name = |text: &mut String| shorten(text, NAME_BYTES);
    name(&mut event.node);
    match &mut event.what {
        Some(What::DeviceState(change)) => name(&mut change.device),
        Some(What::Doubt(doubt)) => {
            name(&mut doubt.reason);
            shorten(&mut doubt.message, MESSAGE_BYTES);
        }
        Some(What::Finished(finished)) => {
            finished.device_bytes.truncate(DEVICES);
            name(&mut finished.reason);
            shorten(&mut finished.message, MESSAGE_BYTES);
        }
        Some(What::Phase(_) | What::Progress(_) | What::Estimate(_)) | None => {}
    }
    event
}

fn shorten(text: &mut String, limit: usize) {
    if text.len() > limit {
        *text = cut(text, limit);
    }
}

impl Trace {
    /// Another stream begins.
    pub fn begin_again(&mut self) {
        self.last_sequence = 0;
        self.earlier.extend(self.current.drain(..));
    }

    /// Takes the next event. `false`: it is known already.
    pub fn push(&mut self, event: MigrationEvent) -> bool {
        if event.sequence <= self.last_sequence {
            return false;
        }
        self.last_sequence = event.sequence;
        // Only the latest of these counts, and none is kept.
        if matches!(event.what, Some(What::Progress(_) | What::Estimate(_))) {
            return true;
        }
        let same = MigrationEvent { sequence: 0, monotonic_ns: 0, ..event.clone() };
        let hash = self.keys.hash_one(same.encode_to_vec());
        if self.earlier.contains(&hash) {
            return false;
        }
        if self.events.len() < KEPT {
            self.current.push(hash);
            self.events.push(event);
        } else {
            self.dropped += 1;
        }
        true
    }

    /// How many events were not kept, because there were too many.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The current stream has reported nothing yet.
    pub fn is_silent(&self) -> bool {
        self.last_sequence == 0
    }

    /// What happened when: what a status shows already, and what is new. Each phase appears once per node.
    pub fn timeline(&self, shown: &[TimelineEntry]) -> Vec<TimelineEntry> {
        let mut timeline = shown.to_vec();
        let earlier = shown.first().and_then(start_of);
        for event in &self.events {
            let Some(What::Phase(phase)) = &event.what else { continue };
            let phase = phase_name(*phase);
            if timeline.len() < SHOWN && !is_shown(&timeline, &phase, &event.node) {
                timeline.push(TimelineEntry {
                    phase,
                    node: event.node.clone(),
                    time: wall_clock(event.unix_ns),
                    elapsed: self.elapsed(event, earlier),
                });
            }
        }
        timeline
    }

    /// Every state in which a device was read back, at either end.
    pub fn steps(&self, device: &DeviceMigration, source: &str, target: &str) -> Vec<DeviceStep> {
        let is_this = |node: &str, change: &DeviceStateChange| {
            (node == source && change.device == device.source)
                || (node == target && change.device == device.target)
        };
        let step = |event: &MigrationEvent| match &event.what {
            Some(What::DeviceState(change)) if is_this(&event.node, change) => Some(DeviceStep {
                node: event.node.clone(),
                state: state_name(change.to),
                time: wall_clock(event.unix_ns),
                elapsed: self.elapsed(event, None),
                took: format_duration(Duration::from_nanos(change.took_ns)),
            }),
            _ => None,
        };
        // What the target did before the source connected to it is reported late.
        let is_step = |event: &&MigrationEvent| match &event.what {
            Some(What::DeviceState(change)) => is_this(&event.node, change),
            _ => false,
        };
        let mut events: Vec<_> = self.events.iter().filter(is_step).collect();
        events.sort_by_key(|event| event.unix_ns);
        let more = events.len().saturating_sub(SHOWN);
        let mut steps: Vec<_> = events.into_iter().take(SHOWN).filter_map(step).collect();
        if more > 0
            && let Some(last) = steps.last_mut()
        {
            last.state = format!("... {} more were dropped", more + 1);
        }
        steps
    }

    /// Since the first of all events, including those that an earlier operator took in. The agent that
    /// streams them has converted both nodes' times to its own wall clock.
    fn elapsed(&self, event: &MigrationEvent, earlier: Option<i64>) -> String {
        let start = self.events.iter().map(|event| event.unix_ns).chain(earlier).min();
        let elapsed = event.unix_ns.saturating_sub(start.unwrap_or(event.unix_ns));
        format_duration(Duration::from_nanos(u64::try_from(elapsed).unwrap_or_default()))
    }
}

/// A timeline shows a phase.
pub fn is_shown(timeline: &[TimelineEntry], phase: &str, node: &str) -> bool {
    timeline.iter().any(|entry| entry.phase == phase && entry.node == node)
}

/// When the attempt began, by an entry of its timeline, in nanoseconds since the Unix epoch.
fn start_of(entry: &TimelineEntry) -> Option<i64> {
    let (number, factor) = match entry.elapsed.strip_suffix("ms") {
        Some(number) => (number, 1e6),
        None => (entry.elapsed.strip_suffix('s')?, 1e9),
    };
    let elapsed = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * factor / 1e9).ok()?;
    let time = i64::try_from(entry.time.0.as_nanosecond()).ok()?;
    time.checked_sub(i64::try_from(elapsed.as_nanos()).ok()?)
}

fn wall_clock(unix_ns: i64) -> MicroTime {
    MicroTime(Timestamp::from_nanosecond(i128::from(unix_ns)).unwrap_or(Timestamp::UNIX_EPOCH))
}

fn state_name(number: u32) -> String {
    let known = usize::try_from(number).ok().and_then(|index| KERNEL_STATES.get(index));
    known.map_or_else(|| format!("state {number}"), |name| (*name).to_owned())
}

/// The name of a phase, by its number.
pub fn phase_name(number: i32) -> String {
    let name = Phase::try_from(number).map(|phase| phase.as_str_name());
    name.map_or_else(|_| format!("phase {number}"), |name| name.trim_start_matches("PHASE_").to_owned())
}

#[cfg(test)]
mod tests {
    use slackwater_proto::node::{Doubt, Finished};

    use super::*;

    fn event(sequence: u64, node: &str, ms: u64, what: What) -> MigrationEvent {
        MigrationEvent {
            sequence,
            node: node.into(),
            monotonic_ns: ms * 1_000_000,
            unix_ns: 1_700_000_000_000_000_000 + i64::try_from(ms).unwrap() * 1_000_000,
            what: Some(what),
        }
    }

    fn change(device: &str, to: u32) -> What {
        What::DeviceState(DeviceStateChange { device: device.into(), from: 2, to, took_ns: 1_500_000 })
    }

    #[test]
    fn each_device_gets_the_steps_of_its_own_two_ends() {
        let mut trace = Trace::default();
        trace.push(event(1, "a", 100, change("x", 6)));
        trace.push(event(2, "b", 9_000, change("x", 4)));
        trace.push(event(3, "b", 9_250, change("y", 4)));
        // The same name at both nodes is not the same device.
        let device = DeviceMigration { source: "x".into(), target: "y".into(), ..Default::default() };
        let steps = trace.steps(&device, "a", "b");
        let seen: Vec<_> = steps
            .iter()
            .map(|s| (s.node.as_str(), s.state.as_str(), s.elapsed.as_str(), s.took.as_str()))
            .collect();
        assert_eq!(seen, [("a", "PRE_COPY", "0ms", "1.5ms"), ("b", "RESUMING", "9.15s", "1.5ms")]);
    }

    #[test]
    fn what_is_reported_late_is_shown_where_it_happened() {
        let mut trace = Trace::default();
        trace.push(event(1, "a", 200, change("x", 6)));
        trace.push(event(2, "b", 100, change("y", 4)));
        let device = DeviceMigration { source: "x".into(), target: "y".into(), ..Default::default() };
        let states: Vec<_> = trace.steps(&device, "a", "b").into_iter().map(|step| step.state).collect();
        assert_eq!(states, ["RESUMING", "PRE_COPY"]);
    }

    fn phase(p: Phase) -> What {
        What::Phase(p.into())
    }

    fn names(timeline: &[TimelineEntry]) -> Vec<&str> {
        timeline.iter().map(|entry| entry.phase.as_str()).collect()
    }

    #[test]
    fn a_repeated_event_is_not_counted_again() {
        let mut trace = Trace::default();
        assert!(trace.push(event(1, "a", 0, phase(Phase::Connected))));
        assert!(!trace.push(event(1, "a", 0, phase(Phase::Connected))));
        assert!(trace.push(event(2, "a", 40, phase(Phase::PreCopy))));
        trace.begin_again();
        assert!(!trace.push(event(1, "a", 0, phase(Phase::Connected))));
        assert!(!trace.push(event(2, "a", 40, phase(Phase::PreCopy))));
        assert!(trace.push(event(3, "a", 60, phase(Phase::Pausing))));
        let timeline = trace.timeline(&[]);
        assert_eq!(names(&timeline), ["CONNECTED", "PRE_COPY", "PAUSING"]);
        assert_eq!(timeline[1].elapsed, "40ms");
    }

    #[test]
    fn an_agent_that_reports_without_end_is_taken_in_up_to_a_limit_in_time_and_bytes() {
        let mut trace = Trace::default();
        let flood = |sequence: u64| {
            let long = change(&"x".repeat(10_000), 6);
            bounded(event(sequence, &"n".repeat(10_000), sequence, long))
        };
        let begun = std::time::Instant::now();
        for _ in 0..3 {
            trace.begin_again();
            for sequence in 1..=20_000 {
                trace.push(flood(sequence));
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
        let bytes: usize = trace.events.iter().map(|event| event.encoded_len()).sum();
        assert!(bytes <= KEPT * (2 * NAME_BYTES + 64), "{bytes} bytes");
        // What is dropped is no repetition, but is counted.
        assert_eq!(trace.dropped(), 3 * (20_000 - KEPT as u64));
        assert_eq!(trace.earlier.len() + trace.current.len(), KEPT);
    }

    #[test]
    fn every_text_and_list_of_an_event_is_cut() {
        let long = || "ä".repeat(10_000);
        let finished =
            Finished { reason: long(), message: long(), device_bytes: vec![1; 10_000], ..Default::default() };
        let doubt = Doubt { reason: long(), message: long() };
        for what in [What::Finished(finished), What::Doubt(doubt), change(&long(), 2)] {
            let bytes = bounded(event(1, &long(), 1, what)).encoded_len();
            assert!(bytes <= 3 * NAME_BYTES + MESSAGE_BYTES + 2 * DEVICES + 64, "{bytes} bytes");
        }
    }

    #[test]
    fn steps_that_are_not_shown_are_counted_in_the_last_that_is() {
        let mut trace = Trace::default();
        for sequence in 1..=100 {
            trace.push(event(sequence, "a", sequence, change("x", 6)));
        }
        let device = DeviceMigration { source: "x".into(), ..Default::default() };
        let steps = trace.steps(&device, "a", "b");
        assert_eq!((steps.len(), steps[62].state.as_str()), (64, "PRE_COPY"));
        assert_eq!(steps[63].state, "... 37 more were dropped");
    }

    #[test]
    fn what_an_agent_reported_before_it_was_restarted_is_kept() {
        let mut trace = Trace::default();
        trace.push(event(1, "a", 10, phase(Phase::Connected)));
        trace.push(event(2, "a", 50, change("x", 3)));
        trace.push(event(3, "a", 60, phase(Phase::Committed)));
        trace.begin_again();
        // It knows from its journal that it has committed, and not exactly when.
        assert!(trace.push(event(1, "a", 900, phase(Phase::Committed))));
        assert!(trace.push(event(2, "a", 990, phase(Phase::Started))));
        let timeline = trace.timeline(&[]);
        assert_eq!(names(&timeline), ["CONNECTED", "COMMITTED", "STARTED"]);
        assert_eq!((timeline[1].elapsed.as_str(), timeline[2].elapsed.as_str()), ("50ms", "980ms"));
        let device = DeviceMigration { source: "x".into(), ..Default::default() };
        assert_eq!(trace.steps(&device, "a", "b").len(), 1);
    }

    #[test]
    fn what_an_earlier_operator_has_shown_is_kept_with_its_times() {
        let mut earlier = Trace::default();
        earlier.push(event(1, "b", 0, change("y", 4)));
        earlier.push(event(2, "a", 1_500, phase(Phase::Connected)));
        earlier.push(event(3, "a", 2_000, phase(Phase::Committed)));
        let shown = earlier.timeline(&[]);
        // The agent has been restarted, too.
        let mut trace = Trace::default();
        trace.push(event(1, "a", 2_750, phase(Phase::Started)));
        let timeline = trace.timeline(&shown);
        assert_eq!(timeline[..2], shown[..]);
        assert_eq!((timeline[2].phase.as_str(), timeline[2].elapsed.as_str()), ("STARTED", "2.75s"));
    }

    #[test]
    fn unknown_numbers_are_shown_as_numbers() {
        assert_eq!(state_name(7), "PRE_COPY_P2P");
        assert_eq!(state_name(8), "state 8");
        assert_eq!(phase_name(99), "phase 99");
    }
}
