//! I1: at no time do both ends run the VM. The source's last run, of a vCPU or of a device, is before the
//! destination's first, by more than the uncertainty of their clocks.

use super::{Invariant, Violation, changes, describe, describe_state, leaves_stop};
use crate::witness::{
    state::State,
    trace::{Change, Trace},
};

/// How far apart the two ends were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Separation {
    /// From the source's last run to the destination's first, nanoseconds: at least, as the clocks are known
    /// no better.
    pub at_least_ns: i64,
}

/// A sign that a node ran the VM: when, on its own clock, and what it was.
struct Sign {
    at_ns: u64,
    what: String,
}

/// Judges both ends of a migration that succeeded.
///
/// # Errors
/// When a device of the source had not stopped, the source ran again, or ran on, after the destination may
/// have, or one of them was not seen to run at all.
pub fn one_runner(source: &Trace, destination: &Trace) -> Result<Separation, Violation> {
    let i1 = Invariant::OneRunner;
    for (name, device) in &source.devices {
        // A reset after the stop releases the device: what runs then is no longer the VM's.
        let last = device.changes.iter().rfind(|change| change.from.is_some());
        if let Some(change) = last.filter(|change| change.to.unwrap_or(State::Error).moves()) {
            let what = format!(
                "device {name} was never stopped for good: the last that was seen is {}",
                describe(change)
            );
            return Err(i1.broken(source, change.ended_ns, what));
        }
        if last.is_none() {
            return Err(i1.unjudged(
                source,
                format!("device {name} was {} all the time", describe_state(device, u64::MAX)),
            ));
        }
    }
    if source.vcpus.runs.is_empty() {
        return Err(i1.unjudged(source, "no vCPU was seen to run"));
    }
    let last = last_sign(source)?;
    let first = first_sign(destination).ok_or_else(|| i1.unjudged(destination, "it was not seen to run"))?;
    let (_, latest) = source.clock.host_interval(last.at_ns);
    let (earliest, _) = destination.clock.host_interval(first.at_ns);
    if latest >= earliest {
        let what = format!(
            "{} is not certainly after {} on node {}: by the lab's clock {} ns at the latest against {} ns \
             at the earliest",
            first.what, last.what, source.node, latest, earliest
        );
        return Err(i1.broken(destination, first.at_ns, what));
    }
    Ok(Separation { at_least_ns: earliest - latest })
}

/// Judges a destination that must not have run the VM at all: its migration failed.
///
/// # Errors
/// With the first sign that it did.
pub fn never_ran(destination: &Trace) -> Result<(), Violation> {
    match first_sign(destination) {
        Some(sign) => {
            let what = format!("{} although it never had the VM", sign.what);
            Err(Invariant::OneRunner.broken(destination, sign.at_ns, what))
        }
        None => Ok(()),
    }
}

/// The last sign that the source ran the VM: the last return from KVM_RUN, or the last change of a device
/// before it was stopped.
fn last_sign(source: &Trace) -> Result<Sign, Violation> {
    let stops = |change: &Change| change.from.is_some_and(State::moves) || leaves_stop(change);
    let device = changes(source, stops)
        .map(|(name, change)| Sign {
            at_ns: change.ended_ns,
            what: format!("{} of device {name}", describe(change)),
        })
        .max_by_key(|sign| sign.at_ns);
    let mut last = device;
    for run in &source.vcpus.runs {
        let Some(ended_ns) = run.ended_ns else {
            let what = format!("the vCPU of thread {} has not come back from KVM_RUN", run.thread);
            return Err(Invariant::OneRunner.broken(source, run.began_ns, what));
        };
        if last.as_ref().is_none_or(|last| ended_ns > last.at_ns) {
            last = Some(Sign {
                at_ns: ended_ns,
                what: format!("the last return of thread {} from KVM_RUN", run.thread),
            });
        }
    }
    last.ok_or_else(|| Invariant::OneRunner.unjudged(source, "it was not seen to run"))
}

/// The first sign that the destination ran the VM: the first entry into KVM_RUN, or the first device that
/// left STOP.
fn first_sign(destination: &Trace) -> Option<Sign> {
    let device = changes(destination, |change| leaves_stop(change) || attempts_to_leave(change)).map(
        |(name, change)| Sign {
            at_ns: change.began_ns,
            what: format!("{} of device {name}", describe(change)),
        },
    );
    let vcpu = destination.vcpus.runs.iter().map(|run| Sign {
        at_ns: run.began_ns,
        what: format!("the first entry of thread {} into KVM_RUN", run.thread),
    });
    device.chain(vcpu).min_by_key(|sign| sign.at_ns)
}

/// Whether a device failed to run when requested: it may have started to.
fn attempts_to_leave(change: &Change) -> bool {
    change.to.is_none() && change.wanted.moves() && change.from.is_some_and(State::is_stopped)
}

#[cfg(test)]
mod tests {
    use super::super::test_traces::TraceBuilder;
    use super::*;
    use State::*;

    /// Runs until 100; its devices are stopped from 111 on.
    fn source() -> TraceBuilder {
        TraceBuilder::new("s")
            .run(1, 100)
            .at(105)
            .arcs(&["a", "b"], &[RunningP2p, Stop, StopCopy])
            .at(300)
            .arcs(&["a", "b"], &[StopCopy, Stop])
    }

    /// Its devices leave STOP at 200, its vCPU runs from 220 on.
    fn destination() -> TraceBuilder {
        TraceBuilder::new("d")
            .at(1)
            .arcs(&["a", "b"], &[Running, RunningP2p, Stop, Resuming, Stop])
            .at(200)
            .arcs(&["a", "b"], &[Stop, RunningP2p, Running])
            .run(220, 230)
    }

    #[test]
    fn a_destination_that_runs_after_the_source_has_ended_keeps_it() {
        let separation = one_runner(&source().trace(), &destination().trace()).unwrap();
        assert_eq!(separation, Separation { at_least_ns: 200 - 106 });
        assert!(never_ran(&destination().trace()).is_err());
    }

    #[test]
    fn a_source_whose_vcpu_comes_back_after_the_destination_began_breaks_it() {
        let broken = one_runner(&source().run(190, 201).trace(), &destination().trace()).unwrap_err();
        assert_eq!((broken.node.as_str(), broken.at_ns), ("d", Some(200)));
        assert!(broken.what.contains("KVM_RUN on node s"), "{broken}");
        assert!(one_runner(&source().run_on(150).trace(), &destination().trace()).is_err());
    }

    #[test]
    fn a_source_device_that_leaves_stop_again_breaks_it() {
        let forked = source().at(400).arcs(&["a"], &[Stop, RunningP2p, Running]);
        assert!(one_runner(&forked.trace(), &destination().trace()).is_err());
        let and_back = source().at(400).arcs(&["a"], &[Stop, RunningP2p, Stop]);
        let broken = one_runner(&and_back.trace(), &destination().trace()).unwrap_err();
        assert!(broken.what.contains("device a on node s"), "{broken}");
    }

    #[test]
    fn a_source_device_that_stops_only_after_the_destination_began_breaks_it() {
        let late = TraceBuilder::new("s")
            .run(1, 100)
            .at(105)
            .arcs(&["a"], &[RunningP2p, Stop])
            .at(210)
            .arcs(&["b"], &[RunningP2p, Stop]);
        assert!(one_runner(&late.trace(), &destination().trace()).is_err());
        let never = TraceBuilder::new("s")
            .run(1, 100)
            .at(105)
            .arcs(&["a"], &[RunningP2p, Stop])
            .at(110)
            .arcs(&["b"], &[Running, RunningP2p]);
        assert_eq!(one_runner(&never.trace(), &destination().trace()).unwrap_err().at_ns, Some(111));
    }

    #[test]
    fn a_reset_of_what_the_source_has_given_back_is_no_run() {
        assert!(one_runner(&source().reset("a", 500).trace(), &destination().trace()).is_ok());
    }

    #[test]
    fn a_destination_vcpu_that_runs_before_its_devices_counts_as_its_first_run() {
        let early = destination().run(102, 103);
        assert!(one_runner(&source().trace(), &early.trace()).is_err());
    }

    #[test]
    fn what_the_clocks_do_not_decide_is_broken() {
        // 94 ns apart: an error of 60 either way on both is too much, one of 40 is not.
        let with =
            |error: i64| (source().clock_error(error).trace(), destination().clock_error(error).trace());
        let (source, destination) = with(40);
        assert_eq!(one_runner(&source, &destination).unwrap().at_least_ns, 94 - 80);
        let (source, destination) = with(60);
        assert!(one_runner(&source, &destination).is_err());
    }

    #[test]
    fn a_destination_that_only_took_the_blob_never_ran() {
        let taken = TraceBuilder::new("d")
            .at(1)
            .arcs(&["a"], &[Running, RunningP2p, Stop, Resuming, Stop])
            .reset("a", 50);
        assert_eq!(never_ran(&taken.trace()), Ok(()));
        assert!(one_runner(&source().trace(), &taken.trace()).unwrap_err().at_ns.is_none());
        let refused =
            TraceBuilder::new("d").at(1).arcs(&["a"], &[Resuming, Stop]).attempt("a", Stop, Running, 40, 41);
        assert!(never_ran(&refused.trace()).is_err(), "it may have begun");
    }
}
