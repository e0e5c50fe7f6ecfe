//! The events of one attempt, as an agent streams them, and what a status shows of them.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use slackwater_api::{DeviceMigration, DeviceStep, TimelineEntry, format_duration};
use slackwater_proto::node::{
    DeviceStateChange, Doubt, Finished, MigrationEvent, Phase, migration_event::What,
};

/// At most this many steps of a device, and entries of the timeline, go into a status: an object has an upper
/// size.
const SHOWN: usize = 64;

/// Bytes that the steps of all devices may take in a status. An object has at most 1.5 MiB.
const STEPS_BYTES: usize = 768 * 1024;
/// Bytes of a step as JSON, without its node's name.
const STEP_BYTES: usize = 192;

/// Steps that are kept of an attempt: some times more than 256 devices take at both ends. What an agent
/// reports beyond that is counted.
const KEPT: usize = 16 * 1024;
/// Events by which a repeated one is known. Beyond that a repeated one is taken for new.
const KNOWN: usize = 4 * KEPT;
/// Bytes of a node's or a device's name in an event.
const NAME_BYTES: usize = 253;

/// The names of `enum vfio_device_mig_state` (include/uapi/linux/vfio.h), by number.
const KERNEL_STATES: [&str; 8] =
    ["ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"];

/// The events of one attempt, each once, in the order in which they were reported.
///
/// An agent that is joined again reports all from the start. An agent that was restarted numbers its events
/// from 1 again, and may report less than it did before; what it reported before is kept.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// The first event of each phase at each node.
    phases: Vec<Reached>,
    steps: Vec<Step>,
    /// Steps that were reported and are not kept.
    left_out: u64,
    /// When the first of all events happened.
    first_ns: Option<i64>,
    /// Of the current stream.
    last_sequence: u64,
    /// What is known by earlier streams, and by this one: hashes.
    earlier: BTreeSet<u64>,
    current: BTreeSet<u64>,
}

/// A phase that was reached.
#[derive(Debug, Clone)]
struct Reached {
    phase: i32,
    node: String,
    unix_ns: i64,
}

/// A device that was read back in another state.
#[derive(Debug, Clone)]
struct Step {
    node: String,
    unix_ns: i64,
    change: DeviceStateChange,
}

/// The states of a device, as far as a status shows them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Steps {
    /// The first of them.
    pub shown: Vec<DeviceStep>,
    /// How many more there were.
    pub left_out: u64,
}

impl Trace {
    /// Another stream begins.
    pub fn begin_again(&mut self) {
        self.last_sequence = 0;
        self.earlier.append(&mut self.current);
    }

    /// Takes the next event. `false`: it is known already.
    pub fn push(&mut self, event: MigrationEvent) -> bool {
        if event.sequence <= self.last_sequence {
            return false;
        }
        self.last_sequence = event.sequence;
        let MigrationEvent { node, unix_ns, what, .. } = event;
        // Only the latest of these counts, and none is kept.
        if matches!(what, None | Some(What::Progress(_) | What::Estimate(_))) {
            return true;
        }
        let hash = hash_of(unix_ns, &node, what.as_ref());
        if self.earlier.contains(&hash) {
            return false;
        }
        if self.earlier.len() + self.current.len() < KNOWN {
            self.current.insert(hash);
        }
        self.first_ns = Some(self.first_ns.map_or(unix_ns, |first| first.min(unix_ns)));
        match what {
            Some(What::Phase(phase)) => {
                let is_kept = self.phases.iter().any(|kept| kept.phase == phase && kept.node == node);
                if !is_kept && self.phases.len() < SHOWN && node.len() <= NAME_BYTES {
                    self.phases.push(Reached { phase, node, unix_ns });
                }
            }
            Some(What::DeviceState(change)) => {
                let is_short = node.len() <= NAME_BYTES && change.device.len() <= NAME_BYTES;
                if is_short && self.steps.len() < KEPT {
                    self.steps.push(Step { node, unix_ns, change });
                } else {
                    self.left_out += 1;
                    if self.left_out == 1 {
                        tracing::warn!(
                            kept = self.steps.len(),
                            "more states of devices are reported than are kept"
                        );
                    }
                }
            }
            _ => {}
        }
        true
    }

    /// The current stream has reported nothing yet.
    pub fn is_silent(&self) -> bool {
        self.last_sequence == 0
    }

    /// What happened when: what a status shows already, and what is new. Each phase appears once per node.
    pub fn timeline(&self, shown: &[TimelineEntry]) -> Vec<TimelineEntry> {
        let mut timeline = shown.to_vec();
        let earlier = shown.first().and_then(start_of);
        for reached in &self.phases {
            let phase = phase_name(reached.phase);
            if timeline.len() < SHOWN && !is_shown(&timeline, &phase, &reached.node) {
                timeline.push(TimelineEntry {
                    phase,
                    node: reached.node.clone(),
                    time: wall_clock(reached.unix_ns),
                    elapsed: self.elapsed(reached.unix_ns, earlier),
                });
            }
        }
        timeline
    }

    /// The states in which a device was read back, at either end, as many as a status with so many devices can
    /// show.
    pub fn steps(&self, device: &DeviceMigration, source: &str, target: &str, devices: usize) -> Steps {
        let is_this = |step: &&Step| {
            (step.node == source && step.change.device == device.source)
                || (step.node == target && step.change.device == device.target)
        };
        // What the target did before the source connected to it is reported late.
        let mut steps: Vec<_> = self.steps.iter().filter(is_this).collect();
        steps.sort_by_key(|step| step.unix_ns);
        let limit = shown_steps(devices, source.len().max(target.len()));
        let left_out = u64::try_from(steps.len().saturating_sub(limit)).unwrap_or(u64::MAX);
        let shown = |step: &Step| DeviceStep {
            node: step.node.clone(),
            state: state_name(step.change.to),
            time: wall_clock(step.unix_ns),
            elapsed: self.elapsed(step.unix_ns, None),
            took: format_duration(Duration::from_nanos(step.change.took_ns)),
        };
        Steps { shown: steps.into_iter().take(limit).map(shown).collect(), left_out }
    }

    /// Since the first of all events, including those that an earlier operator took in. The agent that
    /// streams them has converted both nodes' times to its own wall clock.
    fn elapsed(&self, unix_ns: i64, earlier: Option<i64>) -> String {
        let start = self.first_ns.into_iter().chain(earlier).min();
        let elapsed = unix_ns.saturating_sub(start.unwrap_or(unix_ns));
        format_duration(Duration::from_nanos(u64::try_from(elapsed).unwrap_or_default()))
    }
}

/// How many steps of each device a status shows.
fn shown_steps(devices: usize, node_bytes: usize) -> usize {
    (STEPS_BYTES / devices.max(1) / (STEP_BYTES + node_bytes)).clamp(1, SHOWN)
}

/// What tells an event from another one: all of it but its number, which a restarted agent gives anew.
fn hash_of(unix_ns: i64, node: &str, what: Option<&What>) -> u64 {
    let mut hasher = DefaultHasher::new();
    (unix_ns, node).hash(&mut hasher);
    match what {
        Some(What::Phase(phase)) => (1, phase).hash(&mut hasher),
        Some(What::DeviceState(DeviceStateChange { device, from, to, took_ns })) => {
            (2, device, from, to, took_ns).hash(&mut hasher);
        }
        Some(What::Doubt(Doubt { reason, message })) => (3, reason, message).hash(&mut hasher),
        Some(What::Finished(Finished { outcome, reason, message, .. })) => {
            (4, outcome, reason, message).hash(&mut hasher);
        }
        Some(What::Progress(_) | What::Estimate(_)) | None => {}
    }
    hasher.finish()
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
        let steps = trace.steps(&device, "a", "b", 1).shown;
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
        let states: Vec<_> =
            trace.steps(&device, "a", "b", 1).shown.into_iter().map(|step| step.state).collect();
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
        assert_eq!(trace.steps(&device, "a", "b", 1).shown.len(), 1);
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

    /// As by an agent that is joined again: the same events, from the start.
    fn flood(trace: &mut Trace, events: u64) -> u64 {
        trace.begin_again();
        let mut new = 0;
        for n in 1..=events {
            let what = if n % 2 == 0 { change("x", 6) } else { phase(Phase::PreCopy) };
            new += u64::from(trace.push(event(n, "a", n, what)));
        }
        new
    }

    #[test]
    fn a_flood_of_events_fills_no_memory_and_no_status_and_is_known_again_in_linear_time() {
        let mut trace = Trace::default();
        let began = std::time::Instant::now();
        assert_eq!(flood(&mut trace, 60_000), 60_000);
        assert_eq!(flood(&mut trace, 60_000), 0);
        flood(&mut trace, 200_000);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(trace.steps.len() <= KEPT && trace.left_out > 0);
        assert!(trace.earlier.len() + trace.current.len() <= KNOWN);
        assert_eq!(trace.phases.len(), 1);
        let device = DeviceMigration { source: "x".into(), ..Default::default() };
        let steps = trace.steps(&device, "a", "b", 1);
        assert_eq!((steps.shown.len(), steps.left_out), (SHOWN, (KEPT - SHOWN) as u64));
    }

    #[test]
    fn the_steps_of_any_number_of_devices_fit_into_an_object() {
        for devices in [1, 2, 64, 256, 1024] {
            for name in ["n".to_owned(), "n".repeat(NAME_BYTES)] {
                let mut trace = Trace::default();
                for n in 1..=100 {
                    trace.push(event(n, &name, n, change("x", 6)));
                }
                let device = DeviceMigration { source: "x".into(), ..Default::default() };
                let steps = trace.steps(&device, &name, "b", devices);
                let bytes = devices * serde_json::to_string(&steps.shown).unwrap().len();
                assert!(bytes < 1 << 20, "{devices} devices: {bytes} bytes");
                assert_eq!(steps.shown.len() as u64 + steps.left_out, 100);
            }
        }
        assert_eq!(shown_steps(2, 20), SHOWN);
        assert!(shown_steps(256, 20) > 12, "what a device takes at both ends is shown");
    }

    #[test]
    fn unknown_phases_and_long_names_do_not_grow_a_timeline() {
        let mut trace = Trace::default();
        trace.push(event(1, &"n".repeat(1 << 20), 1, phase(Phase::PreCopy)));
        for n in 2..=10_000 {
            trace.push(event(n, "a", n, What::Phase(1000 + n as i32)));
        }
        assert_eq!(trace.timeline(&[]).len(), SHOWN);
        assert!(trace.timeline(&[]).iter().all(|entry| entry.node == "a"));
    }

    #[test]
    fn unknown_numbers_are_shown_as_numbers() {
        assert_eq!(state_name(7), "PRE_COPY_P2P");
        assert_eq!(state_name(8), "state 8");
        assert_eq!(phase_name(99), "phase 99");
    }
}
