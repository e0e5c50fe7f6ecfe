//! The events of one attempt, as an agent streams them, and what a status shows of them.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use slackwater_api::{DeviceMigration, DeviceStep, TimelineEntry, format_duration};
use slackwater_proto::node::{DeviceStateChange, MigrationEvent, Phase, migration_event::What};

/// At most this many steps of a device, and entries of the timeline, go into a status: an object has an upper size.
const SHOWN: usize = 64;

/// The names of `enum vfio_device_mig_state` (include/uapi/linux/vfio.h), by number.
const KERNEL_STATES: [&str; 8] =
    ["ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"];

/// The events of one attempt, in order and each once.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    events: Vec<MigrationEvent>,
    last_sequence: u64,
}

impl Trace {
    /// Takes the next event. `false`: it has been seen before (an agent that is joined again tells all from the start).
    pub fn push(&mut self, event: MigrationEvent) -> bool {
        if event.sequence <= self.last_sequence {
            return false;
        }
        self.last_sequence = event.sequence;
        self.events.push(event);
        true
    }

    /// Nothing has been told yet.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// What happened when.
    pub fn timeline(&self) -> Vec<TimelineEntry> {
        let entry = |event: &MigrationEvent| match &event.what {
            Some(What::Phase(phase)) => Some(TimelineEntry {
                phase: phase_name(*phase),
                node: event.node.clone(),
                time: wall_clock(event.unix_ns),
                elapsed: self.elapsed(event),
            }),
            _ => None,
        };
        self.events.iter().filter_map(entry).take(SHOWN).collect()
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
                elapsed: self.elapsed(event),
                took: format_duration(Duration::from_nanos(change.took_ns)),
            }),
            _ => None,
        };
        // What the target did before the source connected to it is told late.
        let mut events: Vec<_> = self.events.iter().collect();
        events.sort_by_key(|event| event.unix_ns);
        events.into_iter().filter_map(step).take(SHOWN).collect()
    }

    /// Since the first of all events. The agent that streams them has put both nodes' times on its own wall clock.
    fn elapsed(&self, event: &MigrationEvent) -> String {
        let start = self.events.iter().map(|event| event.unix_ns).min().unwrap_or(event.unix_ns);
        let elapsed = event.unix_ns.saturating_sub(start);
        format_duration(Duration::from_nanos(u64::try_from(elapsed).unwrap_or_default()))
    }
}

fn wall_clock(unix_ns: i64) -> MicroTime {
    MicroTime(Timestamp::from_nanosecond(i128::from(unix_ns)).unwrap_or(Timestamp::UNIX_EPOCH))
}

fn state_name(number: u32) -> String {
    let known = usize::try_from(number).ok().and_then(|index| KERNEL_STATES.get(index));
    known.map_or_else(|| format!("state {number}"), |name| (*name).to_owned())
}

fn phase_name(number: i32) -> String {
    let name = Phase::try_from(number).map(|phase| phase.as_str_name());
    name.map_or_else(|_| format!("phase {number}"), |name| name.trim_start_matches("PHASE_").to_owned())
}

#[cfg(test)]
mod tests {
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
    fn what_is_told_late_stands_where_it_happened() {
        let mut trace = Trace::default();
        trace.push(event(1, "a", 200, change("x", 6)));
        trace.push(event(2, "b", 100, change("y", 4)));
        let device = DeviceMigration { source: "x".into(), target: "y".into(), ..Default::default() };
        let states: Vec<_> = trace.steps(&device, "a", "b").into_iter().map(|step| step.state).collect();
        assert_eq!(states, ["RESUMING", "PRE_COPY"]);
    }

    #[test]
    fn an_event_told_again_is_not_counted_again() {
        let mut trace = Trace::default();
        let phase = |p: Phase| What::Phase(p.into());
        assert!(trace.push(event(1, "a", 0, phase(Phase::Connected))));
        assert!(!trace.push(event(1, "a", 0, phase(Phase::Connected))));
        assert!(trace.push(event(2, "a", 40, phase(Phase::PreCopy))));
        let timeline = trace.timeline();
        assert_eq!(timeline.iter().map(|e| e.phase.as_str()).collect::<Vec<_>>(), ["CONNECTED", "PRE_COPY"]);
        assert_eq!(timeline[1].elapsed, "40ms");
    }

    #[test]
    fn numbers_that_are_not_known_are_shown_as_numbers() {
        assert_eq!(state_name(7), "PRE_COPY_P2P");
        assert_eq!(state_name(8), "state 8");
        assert_eq!(phase_name(99), "phase 99");
    }
}
