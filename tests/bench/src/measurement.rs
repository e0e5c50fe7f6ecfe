//! One migration, measured.

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::{MigrationEvent, Phase};

use super::marks::{Blackout, DestinationMarks, SourceMarks};

/// What moved the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mover {
    /// QEMU alone.
    Plain,
    /// Operator and agents.
    Product,
}

/// The measurement of one migration.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// What moved it.
    pub mover: Mover,
    /// How many devices the VM had.
    pub devices: usize,
    /// From 1, counted for each mover.
    pub round: usize,
    /// The node that it left.
    pub from: String,
    /// By the kernels' traces.
    pub kernels: Blackout,
    /// QEMU's own times at the source.
    pub qemu: QemuTimes,
    /// From `kubectl apply`, or the start of the destination's QEMU, until it was seen to have ended,
    /// milliseconds.
    pub total_ms: f64,
    /// The times that the agents and the status report. Plain has none.
    #[serde(rename = "told")]
    pub reported: Option<ReportedTimes>,
}

/// The result of `query-migrate` at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct QemuTimes {
    /// How long the VM was stopped, milliseconds.
    pub downtime_ms: u64,
    /// The migration as a whole, milliseconds.
    pub total_ms: u64,
}

/// The times that the product reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReportedTimes {
    /// `status.timings.blackout`, milliseconds.
    pub blackout_ms: f64,
    /// `status.timings.total`, milliseconds.
    pub total_ms: f64,
    /// The agents' own steps within the gate and the hand-over, milliseconds, in order.
    pub steps_ms: Vec<(&'static str, f64)>,
}

impl QemuTimes {
    /// From the answer to `query-migrate`.
    ///
    /// # Errors
    /// When the migration has not completed.
    pub fn from_answer(answer: &Value) -> anyhow::Result<Self> {
        let status = answer.get("status").and_then(Value::as_str);
        anyhow::ensure!(status == Some("completed"), "QEMU's migration has not completed: {answer}");
        let number = |name: &str| {
            answer
                .get(name)
                .and_then(Value::as_u64)
                .with_context(|| format!("query-migrate has no {name}: {answer}"))
        };
        Ok(Self { downtime_ms: number("downtime")?, total_ms: number("total-time")? })
    }

    /// From the last line with QEMU's times in an agent's log.
    ///
    /// # Errors
    /// When there is none.
    pub fn from_log(log: &str) -> anyhow::Result<Self> {
        let line = log.lines().rev().find(|line| line.contains("QEMU has saved"));
        let line = line.context("the agent's log has no line \"QEMU has saved\"")?;
        let number = |name: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.and_then(|value| value.parse().ok()).with_context(|| format!("no {name} in: {line}"))
        };
        Ok(Self { downtime_ms: number("downtime_ms")?, total_ms: number("total_ms")? })
    }
}

/// The agents' steps between the kernels' marks: each on one node's clock.
///
/// # Errors
/// When the agents did not report a phase.
pub(super) fn steps(
    events: &[MigrationEvent],
    source: &SourceMarks,
    destination: &DestinationMarks,
) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let at = |phase: Phase| {
        let is = |event: &&MigrationEvent| event.what == Some(What::Phase(phase.into()));
        let event = events.iter().find(is);
        event
            .map(|event| event.monotonic_ns)
            .with_context(|| format!("the agents did not report {}", phase.as_str_name()))
    };
    let (capturing, loaded, starting) = (at(Phase::Capturing)?, at(Phase::Loaded)?, at(Phase::Starting)?);
    let ms = |from_ns: u64, to_ns: u64| (to_ns as f64 - from_ns as f64) / 1e6;
    Ok(vec![
        (
            "gate: all devices in STOP_COPY -> pre-switchover seen, devices read, CAPTURING",
            ms(source.stopped_ns, capturing),
        ),
        ("gate: CAPTURING -> migrate-continue, first read of final data", ms(capturing, source.reading_ns)),
        (
            "hand-over: all devices in STOP -> read back, LOADED journalled",
            ms(destination.in_stop_ns, loaded),
        ),
        ("hand-over: LOADED -> source's COMMITTED and COMMIT, STARTING journalled", ms(loaded, starting)),
        ("hand-over: STARTING -> first device leaves STOP", ms(starting, destination.waking_ns)),
    ])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn qemus_figures_are_read_from_its_answer_and_from_the_agents_log() {
        let answer = json!({"status": "completed", "downtime": 87, "total-time": 412, "ram": {}});
        let times = QemuTimes { downtime_ms: 87, total_ms: 412 };
        assert_eq!(QemuTimes::from_answer(&answer).unwrap(), times);
        let line = |downtime: u32| {
            format!(
                "2026-01-01T00:00:00Z  INFO slackwater: QEMU has saved pid=7 downtime_ms={downtime} \
                 total_ms=412 vfio_bytes=120\n"
            )
        };
        assert_eq!(QemuTimes::from_log(&(line(3) + &line(87) + "later\n")).unwrap(), times);
    }

    #[test]
    fn missing_figures_are_an_error() {
        assert!(
            QemuTimes::from_answer(&json!({"status": "failed", "downtime": 1, "total-time": 2})).is_err()
        );
        assert!(QemuTimes::from_answer(&json!({"status": "completed", "total-time": 2})).is_err());
        assert!(QemuTimes::from_log("nothing\n").is_err());
        assert!(QemuTimes::from_log("QEMU has saved pid=7 total_ms=1\n").is_err());
    }

    #[test]
    fn the_agents_steps_lie_between_the_kernels_marks_of_their_own_node() {
        const MS: u64 = 1_000_000;
        let event = |phase: Phase, ms: u64| MigrationEvent {
            monotonic_ns: ms * MS,
            what: Some(What::Phase(phase.into())),
            ..MigrationEvent::default()
        };
        let source = SourceMarks { paused_ns: 0, stopped_ns: 10 * MS, reading_ns: 19 * MS };
        let destination = DestinationMarks {
            written_ns: 100 * MS,
            leaving_ns: 101 * MS,
            in_stop_ns: 102 * MS,
            waking_ns: 130 * MS,
            awake_ns: 131 * MS,
            running_ns: 132 * MS,
        };
        let events = [
            event(Phase::Capturing, 14),
            event(Phase::Loaded, 105),
            event(Phase::Committed, 12),
            event(Phase::Starting, 120),
        ];
        let measured: Vec<f64> =
            steps(&events, &source, &destination).unwrap().into_iter().map(|(_, ms)| ms).collect();
        assert_eq!(measured, [4.0, 5.0, 3.0, 15.0, 10.0]);
        let error = steps(&events[..3], &source, &destination).unwrap_err().to_string();
        assert!(error.contains("PHASE_STARTING"), "{error}");
    }
}
