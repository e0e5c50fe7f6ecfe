//! The blackout of a migration, split up by the two kernels' traces. The marks are the same for both movers.
//!
//! ```text
//! source       last vCPU run ─ all in STOP_COPY ─ first read of final data
//!                                                   │  two clocks
//! destination                            last write of device data ─ first leaves RESUMING ─ all in STOP
//!                                                     ─ first leaves STOP ─ all RUNNING ─ first vCPU run
//! ```
//!
//! Between two marks is a [`BlackoutPart`]; the parts add up to the blackout.

use serde::Serialize;
use slackwater_lab::witness::{AccessKind, Change, State, Trace};
use strum::VariantArray;

/// A part of the blackout, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, VariantArray)]
#[serde(rename_all = "kebab-case")]
pub enum BlackoutPart {
    /// The vCPUs are paused; the devices are being stopped.
    Stop,
    /// All devices are in STOP_COPY; nothing is read yet.
    Gate,
    /// The final data are read, sent and written. It spans both nodes' clocks.
    Carry,
    /// The devices have all of their data; the rest of the VM is loaded, and this is noticed.
    Load,
    /// The devices go from RESUMING to STOP. Plain QEMU does this on the way to RUNNING: for it, this is the
    /// first device only.
    Check,
    /// All devices are in STOP; the two ends agree on who runs the VM.
    HandOver,
    /// The devices go to RUNNING.
    Wake,
    /// The devices run; the vCPUs do not yet.
    Cont,
}

impl BlackoutPart {
    /// Its name, and the marks at which it begins and ends.
    #[must_use]
    pub fn describe(self) -> (&'static str, &'static str) {
        match self {
            Self::Stop => ("stop", "last vCPU run -> all devices in STOP_COPY"),
            Self::Gate => ("gate", "-> first read of final data"),
            Self::Carry => ("carry", "-> last write of device data (two clocks)"),
            Self::Load => ("load", "-> first device leaves RESUMING"),
            Self::Check => ("check", "-> all devices in STOP"),
            Self::HandOver => ("hand-over", "-> first device leaves STOP"),
            Self::Wake => ("wake", "-> all devices RUNNING"),
            Self::Cont => ("cont", "-> first vCPU run"),
        }
    }
}

/// The source's marks, nanoseconds of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceMarks {
    /// The last return of a vCPU from KVM_RUN.
    pub paused_ns: u64,
    /// The last device's arrival in STOP_COPY.
    pub stopped_ns: u64,
    /// The first read after that.
    pub reading_ns: u64,
}

/// The destination's marks, nanoseconds of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationMarks {
    /// The last write of any device's data.
    pub written_ns: u64,
    /// The first device begins to leave RESUMING.
    pub leaving_ns: u64,
    /// The last device reaches STOP, or the first leaves it, whichever is earlier.
    pub in_stop_ns: u64,
    /// The first device begins to leave STOP.
    pub waking_ns: u64,
    /// The last device's arrival in RUNNING.
    pub awake_ns: u64,
    /// The first entry of a vCPU into KVM_RUN.
    pub running_ns: u64,
}

/// A blackout and its parts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Blackout {
    /// From the source's last vCPU run to the destination's first, milliseconds.
    pub blackout_ms: f64,
    /// From the first device that stopped at the source to the last that ran at the destination,
    /// milliseconds.
    pub devices_ms: f64,
    /// The error of these, and of the part that spans both clocks, milliseconds either way.
    pub clock_error_ms: f64,
    /// The parts, milliseconds, in the order of [`BlackoutPart`].
    pub parts_ms: Vec<(BlackoutPart, f64)>,
}

/// A mark that is missing, or contradicts another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarkError {
    /// No such event.
    #[error("node {node}: the kernel saw no {what}")]
    Missing {
        /// Where.
        node: String,
        /// What was looked for.
        what: &'static str,
    },
    /// Two marks in the wrong order.
    #[error("node {node}: {later} at {later_ns} ns is before {earlier} at {earlier_ns} ns")]
    Order {
        /// Where.
        node: String,
        /// What must be first.
        earlier: &'static str,
        /// Its time.
        earlier_ns: u64,
        /// What must follow.
        later: &'static str,
        /// Its time.
        later_ns: u64,
    },
}

impl SourceMarks {
    /// Finds them in the trace of the VM's devices at the source.
    ///
    /// # Errors
    /// [`MarkError`].
    pub fn of(trace: &Trace) -> Result<Self, MarkError> {
        let stopped_ns =
            arcs(trace).filter(|arc| arc.to == Some(State::StopCopy)).map(|arc| arc.ended_ns).max();
        let stopped_ns = found(trace, stopped_ns, "arrival of a device in STOP_COPY")?;
        let paused_ns =
            found(trace, trace.vcpus.runs.iter().filter_map(|run| run.ended_ns).max(), "run of a vCPU")?;
        let reads = accesses(trace, AccessKind::Read).filter(|at_ns| *at_ns >= stopped_ns);
        let reading_ns = found(trace, reads.min(), "read of final data")?;
        in_order(
            trace,
            &[("the last run of a vCPU", paused_ns), ("the last arrival in STOP_COPY", stopped_ns)],
        )?;
        Ok(Self { paused_ns, stopped_ns, reading_ns })
    }
}

impl DestinationMarks {
    /// Finds them in the trace of the VM's devices at the destination.
    ///
    /// # Errors
    /// [`MarkError`].
    pub fn of(trace: &Trace) -> Result<Self, MarkError> {
        let leaving = |from: State| arcs(trace).filter(move |arc| arc.from == Some(from) && arc.to.is_some());
        let written_ns = found(trace, accesses(trace, AccessKind::Write).max(), "write of device data")?;
        let leaving_ns = leaving(State::Resuming).map(|arc| arc.began_ns).min();
        let leaving_ns = found(trace, leaving_ns, "device that leaves RESUMING")?;
        // Before its data came, a device may have passed through STOP on its way to RESUMING.
        let loaded = |arc: &&Change| arc.began_ns >= leaving_ns && arc.to != Some(State::Resuming);
        let waking_ns = leaving(State::Stop).filter(loaded).map(|arc| arc.began_ns).min();
        let waking_ns = found(trace, waking_ns, "device that leaves STOP")?;
        let all_in_stop = leaving(State::Resuming).map(|arc| arc.ended_ns).max();
        let in_stop_ns = found(trace, all_in_stop, "arrival of a device in STOP")?.min(waking_ns);
        let awake = arcs(trace).filter(|arc| arc.to == Some(State::Running)).filter(loaded);
        let awake_ns = found(trace, awake.map(|arc| arc.ended_ns).max(), "arrival of a device in RUNNING")?;
        let runs = trace.vcpus.runs.iter().map(|run| run.began_ns).min();
        let running_ns = found(trace, runs, "run of a vCPU")?;
        in_order(
            trace,
            &[
                ("the last write of device data", written_ns),
                ("the first device's leaving RESUMING", leaving_ns),
                ("the last arrival in STOP", in_stop_ns),
                ("the first device's leaving STOP", waking_ns),
                ("the last arrival in RUNNING", awake_ns),
                ("the first run of a vCPU", running_ns),
            ],
        )?;
        Ok(Self { written_ns, leaving_ns, in_stop_ns, waking_ns, awake_ns, running_ns })
    }
}

impl Blackout {
    /// The blackout of a migration that succeeded, from the traces of the VM's devices at both ends.
    ///
    /// # Errors
    /// [`MarkError`].
    pub fn of(source: &Trace, destination: &Trace) -> Result<Self, MarkError> {
        let (s, d) = (SourceMarks::of(source)?, DestinationMarks::of(destination)?);
        let across = |from_ns: u64, to_ns: u64| middle(destination, to_ns) - middle(source, from_ns);
        let within = |from_ns: u64, to_ns: u64| i128::from(to_ns) - i128::from(from_ns);
        let parts = BlackoutPart::VARIANTS.iter().map(|&part| {
            let ns = match part {
                BlackoutPart::Stop => within(s.paused_ns, s.stopped_ns),
                BlackoutPart::Gate => within(s.stopped_ns, s.reading_ns),
                BlackoutPart::Carry => across(s.reading_ns, d.written_ns),
                BlackoutPart::Load => within(d.written_ns, d.leaving_ns),
                BlackoutPart::Check => within(d.leaving_ns, d.in_stop_ns),
                BlackoutPart::HandOver => within(d.in_stop_ns, d.waking_ns),
                BlackoutPart::Wake => within(d.waking_ns, d.awake_ns),
                BlackoutPart::Cont => within(d.awake_ns, d.running_ns),
            };
            (part, ms(ns))
        });
        let stopping =
            arcs(source).filter(|arc| arc.to == Some(State::StopCopy)).map(|arc| arc.began_ns).min();
        let stopping = found(source, stopping, "arrival of a device in STOP_COPY")?;
        Ok(Self {
            blackout_ms: ms(across(s.paused_ns, d.running_ns)),
            devices_ms: ms(across(stopping, d.awake_ns)),
            clock_error_ms: ms(i128::from(source.clock.error_ns()) + i128::from(destination.clock.error_ns())),
            parts_ms: parts.collect(),
        })
    }
}

/// Every arc of a device, without resets.
fn arcs(trace: &Trace) -> impl Iterator<Item = &Change> {
    trace.devices.values().flat_map(|device| &device.changes).filter(|change| change.from.is_some())
}

fn accesses(trace: &Trace, kind: AccessKind) -> impl Iterator<Item = u64> {
    let all = trace.devices.values().flat_map(|device| &device.accesses);
    all.filter(move |access| access.kind == kind).map(|access| access.at_ns)
}

fn found(trace: &Trace, mark: Option<u64>, what: &'static str) -> Result<u64, MarkError> {
    mark.ok_or_else(|| MarkError::Missing { node: trace.node.clone(), what })
}

fn in_order(trace: &Trace, marks: &[(&'static str, u64)]) -> Result<(), MarkError> {
    for pair in marks.windows(2) {
        if let [(earlier, earlier_ns), (later, later_ns)] = *pair
            && later_ns < earlier_ns
        {
            return Err(MarkError::Order { node: trace.node.clone(), earlier, earlier_ns, later, later_ns });
        }
    }
    Ok(())
}

/// A node's time on this machine's clock: the best estimate.
fn middle(trace: &Trace, node_ns: u64) -> i128 {
    let (early, late) = trace.clock.host_interval(node_ns);
    i128::midpoint(early.into(), late.into())
}

/// Nanoseconds as milliseconds. A blackout fits a double to the nanosecond.
#[allow(clippy::cast_precision_loss, reason = "a blackout has no 2^53 nanoseconds")]
fn ms(ns: i128) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use slackwater_lab::node::ClockRelation;
    use slackwater_lab::witness::{Access, DeviceTrace, Run, VcpuTrace};

    use State::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

    fn device(arcs: &[(State, State, u64, u64)], kind: AccessKind, accesses: &[u64]) -> DeviceTrace {
        let change = |&(from, to, began_ns, ended_ns): &(State, State, u64, u64)| Change {
            from: Some(from),
            to: Some(to),
            wanted: to,
            began_ns,
            ended_ns,
        };
        let access = |&at_ns: &u64| Access { kind, at_ns, bytes: 8 };
        DeviceTrace {
            changes: arcs.iter().map(change).collect(),
            accesses: accesses.iter().map(access).collect(),
        }
    }

    fn trace(node: &str, devices: Vec<DeviceTrace>, runs: &[(u64, u64)]) -> Trace {
        let named = |(index, device): (usize, DeviceTrace)| (format!("d{index}"), device);
        let run = |&(began_ns, ended_ns): &(u64, u64)| Run {
            thread: 1,
            vcpu: 1,
            began_ns,
            ended_ns: Some(ended_ns),
        };
        Trace {
            node: node.to_owned(),
            clock: ClockRelation::exact(),
            devices: devices.into_iter().enumerate().map(named).collect(),
            vcpus: VcpuTrace { runs: runs.iter().map(run).collect(), gap_ns: None },
        }
    }

    /// Milliseconds, for readability.
    const MS: u64 = 1_000_000;

    fn source() -> Trace {
        let saved = |late: u64| {
            let arcs = [
                (Running, PreCopy, MS, 2 * MS),
                (PreCopy, PreCopyP2p, (11 + late) * MS, (12 + late) * MS),
                (PreCopyP2p, StopCopy, (13 + late) * MS, (14 + late) * MS),
            ];
            device(&arcs, AccessKind::Read, &[3 * MS, (20 + late) * MS])
        };
        trace("a", vec![saved(0), saved(1)], &[(0, 5 * MS), (6 * MS, 10 * MS)])
    }

    /// As the agent does it: all to STOP, and later all further.
    fn checked() -> Trace {
        let loaded = |late: u64| {
            let arcs = [
                (Running, RunningP2p, 0, 1),
                (RunningP2p, Stop, 1, 2),
                (Stop, Resuming, 2, 3),
                (Resuming, Stop, (30 + late) * MS, (31 + late) * MS),
                (Stop, RunningP2p, (40 + late) * MS, (41 + late) * MS),
                (RunningP2p, Running, (44 + late) * MS, (45 + late) * MS),
            ];
            device(&arcs, AccessKind::Write, &[4 * MS, (25 + late) * MS])
        };
        trace("b", vec![loaded(0), loaded(1)], &[(50 * MS, 51 * MS)])
    }

    /// As QEMU alone does it: one device after the other.
    fn unchecked() -> Trace {
        let loaded = |late: u64| {
            let arcs = [
                (Resuming, Stop, (30 + late) * MS, (31 + late) * MS),
                (Stop, RunningP2p, (31 + late) * MS, (32 + late) * MS),
                (RunningP2p, Running, (44 + late) * MS, (45 + late) * MS),
            ];
            device(&arcs, AccessKind::Write, &[(25 + late) * MS])
        };
        trace("b", vec![loaded(0), loaded(3)], &[(50 * MS, 51 * MS)])
    }

    fn parts(blackout: &Blackout) -> Vec<f64> {
        blackout.parts_ms.iter().map(|(_, ms)| *ms).collect()
    }

    #[test]
    fn the_parts_lie_between_the_marks_and_add_up_to_the_blackout() {
        let blackout = Blackout::of(&source(), &checked()).unwrap();
        assert_eq!(parts(&blackout), [5.0, 5.0, 6.0, 4.0, 2.0, 8.0, 6.0, 4.0]);
        assert_eq!((blackout.blackout_ms, blackout.devices_ms), (40.0, 33.0));
        assert_eq!(parts(&blackout).iter().sum::<f64>(), blackout.blackout_ms);
    }

    #[test]
    fn where_devices_do_not_wait_for_each_other_in_stop_there_is_no_hand_over() {
        let blackout = Blackout::of(&source(), &unchecked()).unwrap();
        assert_eq!(parts(&blackout), [5.0, 5.0, 8.0, 2.0, 1.0, 0.0, 17.0, 2.0]);
        assert_eq!(parts(&blackout).iter().sum::<f64>(), blackout.blackout_ms);
    }

    #[test]
    fn a_reset_is_no_mark() {
        let (mut before, mut after) = (source(), checked());
        let reset = |at_ns| Change {
            from: None,
            to: Some(Running),
            wanted: Running,
            began_ns: at_ns,
            ended_ns: at_ns,
        };
        before.devices.get_mut("d0").unwrap().changes.push(reset(90 * MS));
        after.devices.get_mut("d0").unwrap().changes.push(reset(90 * MS));
        assert_eq!(Blackout::of(&before, &after), Blackout::of(&source(), &checked()));
    }

    #[test]
    fn an_error_names_the_mark_that_is_missing_or_in_the_wrong_order() {
        let mut silent = checked();
        silent.vcpus.runs.clear();
        let missing = MarkError::Missing { node: "b".to_owned(), what: "run of a vCPU" };
        assert_eq!(Blackout::of(&source(), &silent), Err(missing));
        let mut early = checked();
        early.vcpus.runs[0].began_ns = 42 * MS;
        let error = Blackout::of(&source(), &early).unwrap_err().to_string();
        assert!(
            error.contains("the first run of a vCPU at 42000000 ns is before the last arrival in RUNNING"),
            "{error}"
        );
        let mut unread = source();
        for device in unread.devices.values_mut() {
            device.accesses.truncate(1);
        }
        assert!(matches!(
            SourceMarks::of(&unread),
            Err(MarkError::Missing { what: "read of final data", .. })
        ));
    }
}
