//! The invariants that a migration must keep, judged by the kernel's traces alone.
//!
//! | | |
//! |---|---|
//! | I1 one runner | [`one_runner`], [`never_ran`] |
//! | I2 quiesce together | [`quiesced_together`] |
//! | I3 capture at slack water | [`captured_at_slack_water`] |
//! | I4 wake together | [`woke_together`] |
//!
//! Each takes traces that have only the devices of one VM ([`Trace::of_devices`]), and of nodes on which no
//! other VM's vCPUs ran. Each also fails when there was no event to judge.

mod capture;
mod one_runner;
mod quiesce;
#[cfg(test)]
mod test_traces;
mod wake;

use std::fmt;

use super::{
    parse::seconds,
    state::State,
    trace::{Change, DeviceTrace, Trace},
};

pub use capture::captured_at_slack_water;
pub use one_runner::{Separation, never_ran, one_runner};
pub use quiesce::quiesced_together;
pub use wake::{Waking, woke_together};

/// The administrator's statement about the VM's devices, and the barrier that follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerToPeer {
    /// They may talk to each other: the barrier is the P2P states.
    Required,
    /// They never do, and one at least has no P2P states: the barrier is STOP.
    AssumeIsolated,
}

/// An invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Invariant {
    OneRunner,
    QuiesceTogether,
    CaptureAtSlackWater,
    WakeTogether,
}

/// An invariant was broken, or could not be judged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{invariant}: node {node}{}: {what}", at(*at_ns))]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// Where.
    pub node: String,
    /// When, on that node's clock: the event that broke it.
    pub at_ns: Option<u64>,
    /// How.
    pub what: String,
}

fn at(at_ns: Option<u64>) -> String {
    at_ns.map(|ns| format!(" at {}", seconds(ns))).unwrap_or_default()
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneRunner => "I1, one runner",
            Self::QuiesceTogether => "I2, quiesce together",
            Self::CaptureAtSlackWater => "I3, capture at slack water",
            Self::WakeTogether => "I4, wake together",
        })
    }
}

impl Invariant {
    fn broken(self, trace: &Trace, at_ns: u64, what: String) -> Violation {
        Violation { invariant: self, node: trace.node.clone(), at_ns: Some(at_ns), what }
    }

    fn unjudged(self, trace: &Trace, what: impl Into<String>) -> Violation {
        Violation { invariant: self, node: trace.node.clone(), at_ns: None, what: what.into() }
    }

    /// Fails if a vCPU was in KVM_RUN at any time in this period.
    fn no_vcpu_ran(self, trace: &Trace, from_ns: u64, to_ns: u64, while_what: &str) -> Result<(), Violation> {
        if let Some((begin, end)) = trace.vcpus.gap_ns.filter(|(begin, end)| *begin < to_ns && *end > from_ns)
        {
            let what = format!(
                "what the vCPUs did from {} to {} was not kept, and it matters {while_what}",
                seconds(begin),
                seconds(end)
            );
            return Err(self.unjudged(trace, what));
        }
        match trace.vcpus.runs.iter().find(|run| run.overlaps(from_ns, to_ns)) {
            Some(run) => {
                let ended = run.ended_ns.map_or("the trace's end".to_owned(), seconds);
                let what =
                    format!("the vCPU of thread {} was in KVM_RUN, until {ended}, {while_what}", run.thread);
                Err(self.broken(trace, run.began_ns.max(from_ns), what))
            }
            None => Ok(()),
        }
    }
}

/// Describes a change, for a message.
fn describe(change: &Change) -> String {
    let name = |state: Option<State>| state.map_or("?", State::name);
    match change.from {
        None => "its reset".to_owned(),
        Some(_) if change.to.is_none() => {
            format!("its failed arc from {} towards {}", name(change.from), change.wanted)
        }
        Some(_) => format!("its arc {} -> {}", name(change.from), name(change.to)),
    }
}

/// Describes the state of a device at a time, for a message.
fn describe_state(device: &DeviceTrace, at_ns: u64) -> String {
    let changing = device.changes.iter().find(|change| change.began_ns <= at_ns && at_ns < change.ended_ns);
    match (changing, device.state_at(at_ns)) {
        (Some(change), _) => format!("in the middle of {}", describe(change)),
        (None, Some(state)) => state.to_string(),
        (None, None) => "in an unknown state".to_owned(),
    }
}

/// Every change of any device that `kind` selects.
fn changes<'a>(
    trace: &'a Trace,
    kind: impl Fn(&Change) -> bool + 'a,
) -> impl Iterator<Item = (&'a String, &'a Change)> + 'a {
    trace
        .devices
        .iter()
        .flat_map(|(name, device)| device.changes.iter().map(move |change| (name, change)))
        .filter(move |(_, change)| kind(change))
}

/// Whether a change takes a stopped device to a state in which it works, by a request and not by a reset.
fn leaves_stop(change: &Change) -> bool {
    change.from.is_some_and(|from| !from.moves()) && change.to.is_some_and(State::moves)
}
