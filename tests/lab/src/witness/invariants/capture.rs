//! I3: no final byte is taken until every vCPU is paused and every device is stopped.

use super::{Invariant, Violation, describe_state};
use crate::witness::{
    state::State,
    trace::{AccessKind, DeviceTrace, Trace},
};

/// Judges the node from which the VM moves. Returns how many reads of final data were judged.
///
/// # Errors
/// With the first read that came too early, or when there was none.
pub fn captured_at_slack_water(source: &Trace) -> Result<usize, Violation> {
    let i3 = Invariant::CaptureAtSlackWater;
    let mut judged = 0;
    for (name, device) in &source.devices {
        let reads = device.accesses.iter().filter(|access| access.kind == AccessKind::Read);
        for read in reads.filter(|read| is_final(device, read.at_ns)) {
            judged += 1;
            let moving =
                source.devices.iter().find(|(_, other)| !other.holds_at(read.at_ns, State::is_stopped));
            if let Some((other_name, other)) = moving {
                let what = format!(
                    "final data of device {name} were read while device {other_name} was {}",
                    describe_state(other, read.at_ns)
                );
                return Err(i3.broken(source, read.at_ns, what));
            }
            let reading = format!("while final data of device {name} were read");
            i3.no_vcpu_ran(source, read.at_ns, read.at_ns, &reading)?;
        }
    }
    if judged == 0 {
        return Err(i3.unjudged(source, "no final data were seen to be read"));
    }
    Ok(judged)
}

/// Whether data read at this time are a device's final data: read in STOP_COPY, or on the way there.
fn is_final(device: &DeviceTrace, at_ns: u64) -> bool {
    let begun = device.changes.iter().rfind(|change| change.began_ns <= at_ns);
    begun.is_some_and(|change| change.to == Some(State::StopCopy))
}

#[cfg(test)]
mod tests {
    use super::super::test_traces::TraceBuilder;
    use super::*;
    use State::*;

    fn stopped() -> TraceBuilder {
        TraceBuilder::new("s").run(1, 5).at(10).arcs(&["a", "b"], &[RunningP2p, Stop, StopCopy])
    }

    #[test]
    fn reading_when_all_are_stopped_keeps_it() {
        let trace = stopped().read("a", 50, 36).read("b", 51, 36).trace();
        assert_eq!(captured_at_slack_water(&trace), Ok(2));
    }

    #[test]
    fn reading_pre_copy_data_while_the_guest_runs_is_no_capture() {
        let builder =
            TraceBuilder::new("s").run(1, 35).at(10).arcs(&["a"], &[Running, PreCopy]).read("a", 20, 24);
        let trace = builder.at(40).arcs(&["a"], &[PreCopy, PreCopyP2p, StopCopy]).read("a", 50, 36).trace();
        assert_eq!(captured_at_slack_water(&trace), Ok(1));
    }

    #[test]
    fn reading_final_data_while_another_device_moves_breaks_it() {
        let builder = TraceBuilder::new("s")
            .at(10)
            .arcs(&["a", "b"], &[Running, RunningP2p])
            .at(20)
            .arcs(&["a"], &[RunningP2p, Stop, StopCopy]);
        let broken = captured_at_slack_water(&builder.read("a", 30, 36).trace()).unwrap_err();
        assert_eq!(broken.at_ns, Some(30));
        assert!(broken.what.ends_with("while device b was RUNNING_P2P"), "{broken}");
    }

    #[test]
    fn reading_final_data_while_another_device_is_still_stopping_breaks_it() {
        let builder = stopped().arc("c", RunningP2p, Some(Stop), 10, 60);
        assert!(captured_at_slack_water(&builder.read("a", 50, 36).trace()).is_err());
    }

    #[test]
    fn reading_while_the_device_itself_is_on_its_way_breaks_it() {
        let builder = TraceBuilder::new("s").arc("a", PreCopyP2p, Some(StopCopy), 10, 40).read("a", 20, 1);
        assert!(captured_at_slack_water(&builder.trace()).is_err());
    }

    #[test]
    fn reading_final_data_while_a_vcpu_runs_breaks_it() {
        let broken = captured_at_slack_water(&stopped().run(45, 55).read("a", 50, 36).trace()).unwrap_err();
        assert!(broken.what.contains("KVM_RUN"), "{broken}");
        let broken = captured_at_slack_water(&stopped().run_on(45).read("a", 50, 36).trace()).unwrap_err();
        assert!(broken.what.contains("KVM_RUN"), "{broken}");
    }

    #[test]
    fn a_gap_in_the_record_of_the_vcpus_does_not_prove_that_they_stopped() {
        let broken = captured_at_slack_water(&stopped().gap(40, 60).read("a", 50, 36).trace()).unwrap_err();
        assert_eq!(broken.at_ns, None);
    }

    #[test]
    fn a_trace_without_reads_is_not_judged() {
        assert_eq!(captured_at_slack_water(&stopped().trace()).unwrap_err().at_ns, None);
    }
}
