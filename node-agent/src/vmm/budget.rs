//! How long a guest may be stopped, and what happens to a migration that would exceed that.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::transfer::flow::Flow;
use crate::vfio::worker::DeviceHandle;

/// The budget of a migration that sets none.
pub const DEFAULT_BUDGET: Duration = Duration::from_millis(300);
/// The greatest budget.
pub const MAX_BUDGET: Duration = Duration::from_secs(60);
/// Bytes per second that a migration may take of the wire, by default: 1 GiB.
pub const DEFAULT_BANDWIDTH: u64 = 1 << 30;

/// What to do when the state does not fit the budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExceeded {
    /// The migration is given up; the guest runs on at the source.
    #[default]
    Abort,
    /// The guest is stopped for longer.
    Proceed,
}

/// What a migration may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// The longest time that the VMM may expect to need for the rest when it stops the guest.
    pub downtime: Duration,
    /// What to do if it expects to need longer.
    pub on_exceeded: OnExceeded,
    /// The bandwidth that it may use.
    pub bandwidth_bytes_per_second: u64,
    /// Connections that it may use besides the main one.
    pub channels: u8,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            downtime: DEFAULT_BUDGET,
            on_exceeded: OnExceeded::default(),
            bandwidth_bytes_per_second: DEFAULT_BANDWIDTH,
            channels: 0,
        }
    }
}

/// The blackout that a VMM expects while it copies a running guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// How long the guest would be stopped if it were stopped now, by the bytes that are left.
    pub downtime: Duration,
    /// How long it may be stopped from now on, if that is more than the budget.
    pub allowed: Option<Duration>,
}

/// What a VMM needs to watch its own copying.
#[derive(Debug)]
pub struct Copying {
    /// What it may cost.
    pub budget: Budget,
    /// The VM's devices: their drivers estimate the size of their state.
    pub devices: Vec<DeviceHandle>,
    /// The progress of the VMM's own state, over all its connections.
    pub flow: Arc<Flow>,
    /// Receives estimates.
    pub estimates: mpsc::UnboundedSender<Estimate>,
}

/// The blackout would take longer than it may.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest would stand still for about {expected:?}, and its downtimeBudget is {:?}; {passes} passes over its \
     RAM in {:?} \
     have not changed that. A larger downtimeBudget, onBudgetExceeded: Proceed, or more bandwidth would let it \
     move (it is reckoned \
     with {bandwidth_bytes_per_second} bytes per second; the agent's --migration-bandwidth allows {}){}",
    budget.downtime, whole_seconds(*elapsed), budget.bandwidth_bytes_per_second, unknown(without_size)
)]
pub struct BudgetExceeded {
    /// What was allowed.
    pub budget: Budget,
    /// What is expected.
    pub expected: Duration,
    /// Completed passes over the guest's RAM.
    pub passes: u64,
    /// The assumed bandwidth of the wire.
    pub bandwidth_bytes_per_second: u64,
    /// Since the copying began.
    pub elapsed: Duration,
    /// Devices whose drivers do not say how large their state is: QEMU reckons with 100 GiB for each.
    pub without_size: Vec<String>,
}

fn unknown(without_size: &[String]) -> String {
    match without_size {
        [] => String::new(),
        devices => format!(
            "; the drivers of these devices do not say how large their state is \
             (VFIO_DEVICE_FEATURE_MIG_DATA_SIZE), and QEMU reckons with 100 GiB for each: {}",
            devices.join(", ")
        ),
    }
}

fn whole_seconds(elapsed: Duration) -> Duration {
    Duration::from_secs(elapsed.as_secs())
}
