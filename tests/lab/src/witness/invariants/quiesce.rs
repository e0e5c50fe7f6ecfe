//! I2: with two or more devices, none enters STOP or STOP_COPY until every one has reached a P2P state. Where
//! they are assumed to be isolated, none enters STOP_COPY until every one is in STOP.

use super::{Invariant, PeerToPeer, Violation, changes, describe, describe_state};
use crate::witness::{
    state::State,
    trace::{Change, Trace},
};

/// Judges the node from which the VM moves. Returns how many arcs were judged.
///
/// # Errors
/// With the first arc that came too early, or when there was none.
pub fn quiesced_together(source: &Trace, peer_to_peer: PeerToPeer) -> Result<usize, Violation> {
    let i2 = Invariant::QuiesceTogether;
    let isolated = peer_to_peer == PeerToPeer::AssumeIsolated;
    let guarded = |change: &Change| if isolated { enters_stop_copy(change) } else { enters_stop(change) };
    let ready = |state: State| if isolated { state.is_stopped() } else { state.is_quiet_to_peers() };
    let mut judged = 0;
    for (name, change) in changes(source, guarded) {
        judged += 1;
        for (other_name, other) in source.devices.iter().filter(|(other, _)| *other != name) {
            if !other.holds_at(change.began_ns, ready) {
                let what = format!(
                    "device {name} began {} while device {other_name} was {}",
                    describe(change),
                    describe_state(other, change.began_ns)
                );
                return Err(i2.broken(source, change.began_ns, what));
            }
        }
    }
    if judged == 0 {
        return Err(i2.unjudged(source, "no device was seen to stop"));
    }
    Ok(judged)
}

fn enters_stop(change: &Change) -> bool {
    // From STOP to STOP_COPY, and out of RESUMING, a device moves no more than before.
    change.from.is_none_or(State::moves) && towards(change, &[State::Stop, State::StopCopy])
}

fn enters_stop_copy(change: &Change) -> bool {
    towards(change, &[State::StopCopy])
}

/// Whether an arc leads there. One that failed may have gone half of the way: it counts by what was wanted.
fn towards(change: &Change, states: &[State]) -> bool {
    change.from.is_some() && states.contains(&change.to.unwrap_or(change.wanted))
}

#[cfg(test)]
mod tests {
    use super::super::test_traces::TraceBuilder;
    use super::*;
    use State::*;

    fn together() -> TraceBuilder {
        TraceBuilder::new("s")
            .at(10)
            .arcs(&["a", "b"], &[Running, RunningP2p])
            .at(20)
            .arcs(&["a", "b"], &[RunningP2p, Stop, StopCopy])
    }

    #[test]
    fn devices_that_are_quiet_before_any_stops_keep_it() {
        assert_eq!(quiesced_together(&together().trace(), PeerToPeer::Required), Ok(2));
        let with_pre_copy = TraceBuilder::new("s")
            .at(10)
            .arcs(&["a", "b"], &[PreCopy, PreCopyP2p])
            .at(20)
            .arcs(&["a", "b"], &[PreCopyP2p, StopCopy]);
        assert_eq!(quiesced_together(&with_pre_copy.trace(), PeerToPeer::Required), Ok(2));
    }

    #[test]
    fn a_device_that_stops_while_another_runs_breaks_it() {
        let builder = TraceBuilder::new("s")
            .at(10)
            .arcs(&["a"], &[Running, RunningP2p, Stop])
            .at(20)
            .arcs(&["b"], &[Running, RunningP2p, Stop]);
        let broken = quiesced_together(&builder.trace(), PeerToPeer::Required).unwrap_err();
        assert_eq!(broken.at_ns, Some(11));
        assert_eq!(
            broken.to_string(),
            "I2, quiesce together: node s at 0.000000 s: device a began its arc RUNNING_P2P -> STOP \
             while device b was RUNNING"
        );
    }

    #[test]
    fn a_device_that_stops_while_another_is_on_its_way_to_p2p_breaks_it() {
        let builder = TraceBuilder::new("s")
            .at(10)
            .arcs(&["a"], &[Running, RunningP2p])
            .arc("b", Running, Some(RunningP2p), 10, 30)
            .at(20)
            .arcs(&["a"], &[RunningP2p, Stop])
            .at(40)
            .arcs(&["b"], &[RunningP2p, Stop]);
        let broken = quiesced_together(&builder.trace(), PeerToPeer::Required).unwrap_err();
        assert!(broken.what.contains("in the middle of its arc RUNNING -> RUNNING_P2P"), "{broken}");
    }

    #[test]
    fn a_pre_copy_that_ends_while_another_device_still_pre_copies_breaks_it() {
        let builder = TraceBuilder::new("s")
            .at(10)
            .arcs(&["a"], &[PreCopyP2p, StopCopy])
            .at(20)
            .arcs(&["b"], &[PreCopy, PreCopyP2p]);
        assert!(quiesced_together(&builder.trace(), PeerToPeer::Required).is_err());
    }

    #[test]
    fn an_attempt_that_fails_breaks_it_as_well() {
        let builder = TraceBuilder::new("s").arc("a", RunningP2p, None, 10, 12).arc(
            "b",
            Running,
            Some(RunningP2p),
            20,
            22,
        );
        assert!(quiesced_together(&builder.trace(), PeerToPeer::Required).is_err());
    }

    #[test]
    fn isolated_devices_may_stop_one_by_one_but_not_begin_to_give_up_their_state() {
        let isolated = |between: &[State]| {
            TraceBuilder::new("s")
                .at(10)
                .arcs(&["a"], &[Running, Stop])
                .at(20)
                .arcs(&["b"], between)
                .at(30)
                .arcs(&["a"], &[Stop, StopCopy])
        };
        let good = isolated(&[Running, Stop]).trace();
        assert_eq!(quiesced_together(&good, PeerToPeer::AssumeIsolated), Ok(1));
        assert!(quiesced_together(&good, PeerToPeer::Required).is_err(), "the same is not good for peers");
        let bad = isolated(&[Running, PreCopy]).trace();
        assert!(quiesced_together(&bad, PeerToPeer::AssumeIsolated).is_err());
    }

    #[test]
    fn a_trace_without_stops_is_not_judged() {
        let broken = quiesced_together(
            &TraceBuilder::new("s").at(1).arcs(&["a"], &[Running, PreCopy]).trace(),
            PeerToPeer::Required,
        );
        assert_eq!(broken.unwrap_err().at_ns, None);
    }
}
