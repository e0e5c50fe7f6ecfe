//! The shells around the pure halves of the hand-over: they perform effects, and turn what happens into events.

mod answers;
pub mod destination;
pub mod entry;
pub mod events;
pub mod ledger;
mod limits;
pub mod link;
mod phases;
mod pump;
pub mod receiving;
pub mod source;
#[cfg(test)]
mod tests;
mod timings;

use futures::future::BoxFuture;
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason};
use slackwater_proto::node::DeviceStateChange;

use crate::host::clock::Clock;
use crate::vfio::error::SetStateError;
use crate::vfio::worker::{DeviceHandle, Reached};
use crate::vmm::{DeviceSeen, RunState, Vmm, VmmError};

/// A call to a VMM that is answered by nothing but success or failure.
type VmmCall = for<'a> fn(&'a dyn Vmm) -> BoxFuture<'a, Result<(), VmmError>>;

/// A state change that was read back, for the trace: when, and what.
fn traced(device: &str, reached: &Reached) -> (Clock, DeviceStateChange) {
    let now = Clock::now();
    let since = now.monotonic_ns.saturating_sub(reached.at_ns);
    let at = Clock {
        monotonic_ns: reached.at_ns,
        unix_ns: now.unix_ns.saturating_sub(i64::try_from(since).unwrap_or(i64::MAX)),
    };
    let change = DeviceStateChange {
        device: device.to_owned(),
        from: reached.from.number(),
        to: reached.to.number(),
        took_ns: u64::try_from(reached.took.as_nanos()).unwrap_or(u64::MAX),
    };
    (at, change)
}

/// Where devices were last seen that their VMM drives: each change goes into the trace once, whether the VMM told of it or the agent
/// read it back.
#[derive(Debug)]
struct Seen(Vec<MigrationState>);

impl Seen {
    fn new(devices: &[DeviceHandle]) -> Self {
        Self(vec![MigrationState::Running; devices.len()])
    }

    /// The change, if it is one.
    fn change(&mut self, device: &DeviceHandle, seen: DeviceSeen) -> Option<DeviceStateChange> {
        let last = self.0.get_mut(seen.index)?;
        let from = std::mem::replace(last, seen.state);
        (from != seen.state).then(|| DeviceStateChange {
            device: device.name().to_owned(),
            from: from.number(),
            to: seen.state.number(),
            took_ns: 0,
        })
    }
}

/// Reads where a device stands that its VMM drives.
async fn look(index: usize, device: &DeviceHandle) -> Result<DeviceSeen, Failure> {
    let state =
        device.state().await.map_err(|error| Failure::new(Reason::DeviceFailed, error.to_string()))?;
    Ok(DeviceSeen { index, state, at: Clock::now() })
}

/// A call to the twin that failed: the twin's own refusal, or its end, whichever way that is heard of first.
fn of_twin(error: &VmmError) -> Failure {
    let reason = match error {
        VmmError::Lost { .. } => Reason::TwinFailed,
        _ => Reason::VmmFailed,
    };
    Failure::new(reason, format!("at the destination, {error}"))
}

/// Asks the twin for a sign of life. A process that is being killed gives none, though it may not have been seen to end yet.
fn confirm(vmm: &dyn Vmm) -> BoxFuture<'_, Result<(), VmmError>> {
    Box::pin(async move { vmm.run_state().await.map(drop) })
}

/// Lets the vCPUs run, if they do not yet: after a pause that failed, or an agent that ended, it is not known whether they do, and
/// to resume a VM that runs would be refused.
fn resume(vmm: &dyn Vmm) -> BoxFuture<'_, Result<(), VmmError>> {
    Box::pin(async move {
        match vmm.run_state().await? {
            RunState::Running => Ok(()),
            RunState::Paused | RunState::Incoming => vmm.resume().await,
        }
    })
}

/// A state change that failed at one end: where the device stands, and why, in words.
fn refused(end: &str, error: &SetStateError) -> (Option<MigrationState>, Failure) {
    (error.found(), Failure::new(Reason::DeviceFailed, format!("at the {end}, {error}")))
}
