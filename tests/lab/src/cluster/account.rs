//! The agents' own account of what the devices did, and whether the kernel's trace agrees with it.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use slackwater_proto::node::MigrationEvent;
use slackwater_proto::node::migration_event::What;

use crate::witness::{State, Trace};

/// A change of state as an agent reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The state that was read back.
    pub to: State,
    /// When the change was read back, on the node's own clock.
    pub at_ns: u64,
    /// How long it took, read-back included.
    pub took_ns: u64,
}

/// One device at one node.
pub type DeviceAccount = BTreeMap<(String, String), Vec<Span>>;

/// The agents' reports, by node and device.
///
/// # Errors
/// When a state has a number that the kernel does not have.
pub(super) fn read(events: &[MigrationEvent]) -> anyhow::Result<DeviceAccount> {
    let mut account = DeviceAccount::new();
    for event in events {
        if let Some(What::DeviceState(change)) = &event.what {
            let to = State::from_number(change.to).with_context(|| format!("state {}", change.to))?;
            let span = Span { to, at_ns: event.monotonic_ns, took_ns: change.took_ns };
            account.entry((event.node.clone(), change.device.clone())).or_default().push(span);
        }
    }
    Ok(account)
}

/// Compares the agents' reports of a node's devices with its kernel's trace: the same states in the same
/// order, each within the time that the agent reports for it. Returns the number of changes that were
/// compared.
///
/// # Errors
/// Names the device and the first change in which they differ.
pub(super) fn agrees(account: &DeviceAccount, trace: &Trace) -> anyhow::Result<usize> {
    let mut compared = 0;
    for (device, seen) in &trace.devices {
        let reported =
            account.get(&(trace.node.clone(), device.clone())).map(Vec::as_slice).unwrap_or_default();
        // One request of the agent may be several arcs of the kernel: the agent reports the end of each
        // request.
        let ends: Vec<(State, u64, u64)> = seen
            .changes
            .iter()
            .filter(|change| change.to == Some(change.wanted) && change.from.is_some())
            .map(|change| (change.wanted, change.began_ns, change.ended_ns))
            .collect();
        if ends.iter().map(|(state, ..)| *state).ne(reported.iter().map(|span| span.to)) {
            bail!("{} {device}: the kernel saw {ends:?}, but the agent reports {reported:?}", trace.node);
        }
        for ((state, began_ns, ended_ns), span) in ends.into_iter().zip(reported) {
            let from_ns = span.at_ns.saturating_sub(span.took_ns);
            if ended_ns > span.at_ns || began_ns < from_ns && state != State::Resuming {
                bail!(
                    "{} {device}: the kernel saw {state:?} from {began_ns} to {ended_ns}, the agent reports {span:?}",
                    trace.node
                );
            }
            compared += 1;
        }
    }
    Ok(compared)
}

/// The weaker comparison for devices that their VMM drives, of which the agents report what they see: each
/// reported state is one that the kernel saw, in the same order, and is not reported before the device
/// reached it. Returns the number of states that were compared.
///
/// # Errors
/// Names the device and the first state that the kernel did not see.
pub(super) fn in_order(account: &DeviceAccount, trace: &Trace) -> anyhow::Result<usize> {
    let mut compared = 0;
    for (device, seen) in &trace.devices {
        let reported =
            account.get(&(trace.node.clone(), device.clone())).map(Vec::as_slice).unwrap_or_default();
        let mut changes = seen.changes.iter();
        for span in reported {
            let found = changes.any(|change| change.to == Some(span.to) && change.ended_ns <= span.at_ns);
            if !found {
                bail!(
                    "{} {device}: the agent reports {reported:?}, but the kernel saw {:?}",
                    trace.node,
                    seen.changes
                );
            }
            compared += 1;
        }
    }
    Ok(compared)
}
