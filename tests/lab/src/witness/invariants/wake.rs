//! I4: no device leaves STOP until all have loaded and left RESUMING; none enters RUNNING until all are in
//! RUNNING_P2P; the vCPUs run last. The same, without the loading, where a VM wakes after an aborted
//! migration.

use super::{Invariant, PeerToPeer, Violation, changes, describe, describe_state, leaves_stop};
use crate::witness::{
    state::State,
    trace::{Change, DeviceTrace, Trace},
};

/// What a VM wakes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waking {
    /// At the destination: every device has loaded its state.
    AfterLoad,
    /// At the source: the migration was aborted after devices had been stopped.
    AfterRollback,
}

/// Judges the node on which the VM wakes. Returns how many arcs were judged.
///
/// # Errors
/// With the first event that came too early, when the devices did not all end in RUNNING, or when nothing
/// woke.
pub fn woke_together(trace: &Trace, waking: Waking, peer_to_peer: PeerToPeer) -> Result<usize, Violation> {
    let i4 = Invariant::WakeTogether;
    // A VM may have been stopped and woken before: the last time counts.
    let stopped_ns = changes(trace, enters_standstill).map(|(_, change)| change.ended_ns).max();
    let stopped_ns = stopped_ns.ok_or_else(|| i4.unjudged(trace, "no device was seen to stop"))?;
    let first_ns = changes(trace, leaves_stop)
        .map(|(_, change)| change.began_ns)
        .filter(|began_ns| *began_ns >= stopped_ns || waking == Waking::AfterLoad)
        .min();
    let first_ns = first_ns.ok_or_else(|| i4.unjudged(trace, "no device was seen to leave STOP"))?;

    let mut judged = 0;
    for (name, change) in changes(trace, move |change| change.began_ns >= first_ns) {
        let ready: fn(&DeviceTrace, u64) -> bool = match () {
            () if leaves_stop(change) && waking == Waking::AfterLoad => has_loaded,
            () if leaves_stop(change) => not_resuming,
            () if enters_running(change) && peer_to_peer == PeerToPeer::Required => is_awake_to_peers,
            () => continue,
        };
        judged += 1;
        if let Some((other_name, other)) =
            trace.devices.iter().find(|(_, other)| !ready(other, change.began_ns))
        {
            let itself = if other_name == name { "itself " } else { "" };
            let what = format!(
                "device {name} began {} while {itself}device {other_name} was {}",
                describe(change),
                describe_state_and_load(other, change.began_ns, waking)
            );
            return Err(i4.broken(trace, change.began_ns, what));
        }
    }

    let awake_ns =
        changes(trace, move |change| change.to == Some(State::Running) && change.began_ns >= first_ns)
            .map(|(_, change)| change.ended_ns)
            .max();
    let awake_ns = awake_ns.ok_or_else(|| i4.unjudged(trace, "no device was seen to run again"))?;
    if let Some((name, device)) =
        trace.devices.iter().find(|(_, device)| device.state_at(awake_ns) != Some(State::Running))
    {
        let what =
            format!("device {name} was {} when the last of them ran", describe_state(device, awake_ns));
        return Err(i4.broken(trace, awake_ns, what));
    }
    // Before that, no vCPU runs at all at the destination, and none at the source after the last device was
    // stopped.
    let from_ns = match waking {
        Waking::AfterLoad => 0,
        Waking::AfterRollback => stopped_ns,
    };
    i4.no_vcpu_ran(trace, from_ns, awake_ns.saturating_sub(1), "before every device was RUNNING")?;
    Ok(judged)
}

fn enters_standstill(change: &Change) -> bool {
    change.from.is_some_and(State::moves) && change.to.is_some_and(|to| !to.moves())
}

fn enters_running(change: &Change) -> bool {
    change.from == Some(State::RunningP2p) && change.to.unwrap_or(change.wanted) == State::Running
}

/// Whether a device had gone from RESUMING to STOP with its loaded state, and had not gone back since.
fn has_loaded(device: &DeviceTrace, at_ns: u64) -> bool {
    let loaded = device.changes.iter().any(|change| {
        change.from == Some(State::Resuming) && change.to == Some(State::Stop) && change.ended_ns <= at_ns
    });
    loaded && not_resuming(device, at_ns)
}

/// Whether a device was neither in RESUMING nor on its way out of it.
fn not_resuming(device: &DeviceTrace, at_ns: u64) -> bool {
    let begun = device.changes.iter().rfind(|change| change.began_ns <= at_ns);
    let leaving = begun.is_some_and(|change| change.from == Some(State::Resuming) && change.ended_ns > at_ns);
    !leaving && device.state_at(at_ns) != Some(State::Resuming)
}

/// Whether a device answers its peers.
fn is_awake_to_peers(device: &DeviceTrace, at_ns: u64) -> bool {
    device.holds_at(at_ns, State::moves)
}

fn describe_state_and_load(device: &DeviceTrace, at_ns: u64, waking: Waking) -> String {
    let loaded = if waking == Waking::AfterLoad && !has_loaded(device, at_ns) { ", not loaded" } else { "" };
    format!("{}{loaded}", describe_state(device, at_ns))
}

#[cfg(test)]
mod tests {
    use super::super::test_traces::TraceBuilder;
    use super::*;
    use State::*;

    const REQUIRED: PeerToPeer = PeerToPeer::Required;

    /// Both devices take a blob, and have loaded by 30.
    fn loaded() -> TraceBuilder {
        TraceBuilder::new("d")
            .at(1)
            .arcs(&["a", "b"], &[Running, RunningP2p, Stop, Resuming])
            .at(20)
            .arcs(&["a", "b"], &[Resuming, Stop])
    }

    fn awake() -> TraceBuilder {
        loaded()
            .at(40)
            .arcs(&["a", "b"], &[Stop, RunningP2p])
            .at(50)
            .arcs(&["a", "b"], &[RunningP2p, Running])
    }

    #[test]
    fn devices_that_wake_together_before_the_vcpus_keep_it() {
        assert_eq!(woke_together(&awake().run(60, 70).trace(), Waking::AfterLoad, REQUIRED), Ok(4));
    }

    #[test]
    fn a_device_that_leaves_stop_while_another_loads_breaks_it() {
        let builder = TraceBuilder::new("d")
            .at(1)
            .arcs(&["a", "b"], &[Running, RunningP2p, Stop, Resuming])
            .at(20)
            .arcs(&["a"], &[Resuming, Stop, RunningP2p])
            .at(30)
            .arcs(&["b"], &[Resuming, Stop, RunningP2p])
            .at(40)
            .arcs(&["a", "b"], &[RunningP2p, Running]);
        let broken = woke_together(&builder.trace(), Waking::AfterLoad, REQUIRED).unwrap_err();
        assert!(
            broken.what.contains("STOP -> RUNNING_P2P while device b was RESUMING, not loaded"),
            "{broken}"
        );
    }

    #[test]
    fn a_device_that_never_loaded_breaks_it() {
        let builder = TraceBuilder::new("d")
            .at(1)
            .arcs(&["a"], &[Running, RunningP2p, Stop, Resuming, Stop])
            .at(1)
            .arcs(&["b"], &[Running, RunningP2p, Stop])
            .at(40)
            .arcs(&["a", "b"], &[Stop, RunningP2p])
            .at(50)
            .arcs(&["a", "b"], &[RunningP2p, Running]);
        assert!(woke_together(&builder.trace(), Waking::AfterLoad, REQUIRED).is_err());
    }

    #[test]
    fn a_device_that_runs_before_all_answer_their_peers_breaks_it() {
        let builder = loaded()
            .at(40)
            .arcs(&["a"], &[Stop, RunningP2p, Running])
            .at(50)
            .arcs(&["b"], &[Stop, RunningP2p, Running]);
        let broken = woke_together(&builder.trace(), Waking::AfterLoad, REQUIRED).unwrap_err();
        assert_eq!(broken.at_ns, Some(41));
        assert!(broken.what.contains("RUNNING_P2P -> RUNNING while device b was STOP"), "{broken}");
    }

    #[test]
    fn isolated_devices_need_not_wait_for_each_other_to_run() {
        let builder = loaded().at(40).arcs(&["a"], &[Stop, Running]).at(50).arcs(&["b"], &[Stop, Running]);
        assert_eq!(woke_together(&builder.trace(), Waking::AfterLoad, PeerToPeer::AssumeIsolated), Ok(2));
    }

    #[test]
    fn a_vcpu_that_runs_before_every_device_does_breaks_it() {
        for builder in [awake().run(45, 46), awake().run(10, 11), awake().run_on(50)] {
            let broken = woke_together(&builder.trace(), Waking::AfterLoad, REQUIRED).unwrap_err();
            assert!(broken.what.contains("KVM_RUN"), "{broken}");
        }
    }

    #[test]
    fn a_device_that_is_left_behind_breaks_it() {
        let builder = loaded()
            .at(40)
            .arcs(&["a", "b"], &[Stop, RunningP2p])
            .at(50)
            .arcs(&["a"], &[RunningP2p, Running]);
        let broken = woke_together(&builder.trace(), Waking::AfterLoad, REQUIRED).unwrap_err();
        assert!(broken.what.contains("device b was RUNNING_P2P when"), "{broken}");
    }

    /// The VM ran until 5, and its devices were in STOP_COPY from 20 on.
    fn aborted() -> TraceBuilder {
        TraceBuilder::new("s")
            .run(1, 5)
            .at(10)
            .arcs(&["a", "b"], &[Running, RunningP2p])
            .at(15)
            .arcs(&["a", "b"], &[RunningP2p, Stop, StopCopy])
    }

    #[test]
    fn a_rollback_that_wakes_all_together_keeps_it() {
        let builder = aborted()
            .at(30)
            .arcs(&["a", "b"], &[StopCopy, Stop, RunningP2p])
            .at(40)
            .arcs(&["a", "b"], &[RunningP2p, Running])
            .run(50, 60);
        assert_eq!(woke_together(&builder.trace(), Waking::AfterRollback, REQUIRED), Ok(4));
    }

    #[test]
    fn a_rollback_one_device_after_the_other_or_with_the_vcpus_first_breaks_it() {
        let one_by_one = aborted()
            .at(30)
            .arcs(&["a"], &[StopCopy, Stop, RunningP2p, Running])
            .at(40)
            .arcs(&["b"], &[StopCopy, Stop, RunningP2p, Running]);
        assert!(woke_together(&one_by_one.trace(), Waking::AfterRollback, REQUIRED).is_err());
        let vcpus_first = aborted()
            .run(25, 60)
            .at(30)
            .arcs(&["a", "b"], &[StopCopy, Stop, RunningP2p])
            .at(40)
            .arcs(&["a", "b"], &[RunningP2p, Running]);
        assert!(woke_together(&vcpus_first.trace(), Waking::AfterRollback, REQUIRED).is_err());
    }

    #[test]
    fn a_trace_in_which_nothing_woke_is_not_judged() {
        assert_eq!(woke_together(&loaded().trace(), Waking::AfterLoad, REQUIRED).unwrap_err().at_ns, None);
        assert_eq!(
            woke_together(&aborted().trace(), Waking::AfterRollback, REQUIRED).unwrap_err().at_ns,
            None
        );
    }
}
