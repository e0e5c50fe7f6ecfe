//! How long a guest may stand still, and what becomes of a migration that cannot keep to that.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::transfer::flow::Flow;
use crate::vfio::worker::DeviceHandle;

/// The budget of a migration that was given none.
pub const DEFAULT_BUDGET: Duration = Duration::from_millis(300);
/// The greatest budget.
pub const MAX_BUDGET: Duration = Duration::from_secs(60);
/// Bytes per second that a migration may take of the wire, where nobody says more or less: 1 GiB.
pub const DEFAULT_BANDWIDTH: u64 = 1 << 30;

/// What to do when the state does not fit the budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExceeded {
    /// The migration is given up; the guest runs on where it is.
    #[default]
    Abort,
    /// The guest is stopped for longer.
    Proceed,
}

/// What a migration may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// For so long the VMM may expect to need for what is left when it stops the guest.
    pub downtime: Duration,
    /// What to do when it expects to need longer.
    pub on_exceeded: OnExceeded,
    /// What it may take of the wire.
    pub bandwidth_bytes_per_second: u64,
    /// By how many connections it may go besides the main one.
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

/// What a VMM expects of the blackout while it copies a guest that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// For so long the guest would stand still if it were stopped now, as far as the bytes go that are left.
    pub downtime: Duration,
    /// It may stand still for so long from now on, where that is more than the budget.
    pub allowed: Option<Duration>,
}

/// What a VMM needs to watch its own copying by.
#[derive(Debug)]
pub struct Copying {
    /// What it may cost.
    pub budget: Budget,
    /// The VM's devices: their drivers tell how much state they have.
    pub devices: Vec<DeviceHandle>,
    /// How the VMM's own state gets on, on all its connections together.
    pub flow: Arc<Flow>,
    /// Who hears of estimates.
    pub tell: mpsc::UnboundedSender<Estimate>,
}

/// The blackout would take longer than it may.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest would stand still for about {expected:?}, and its downtimeBudget is {:?}; {passes} passes over its RAM in {:?} \
     have not changed that. A larger downtimeBudget, onBudgetExceeded: Proceed, or more bandwidth would let it move (it is reckoned \
     with {bandwidth_bytes_per_second} bytes per second; the agent's --migration-bandwidth allows {})",
    budget.downtime, whole_seconds(*elapsed), budget.bandwidth_bytes_per_second
)]
pub struct BudgetExceeded {
    /// What was allowed.
    pub budget: Budget,
    /// What is expected.
    pub expected: Duration,
    /// How often the guest's RAM has been gone through.
    pub passes: u64,
    /// What the wire is reckoned to carry.
    pub bandwidth_bytes_per_second: u64,
    /// Since the copying began.
    pub elapsed: Duration,
}

fn whole_seconds(elapsed: Duration) -> Duration {
    Duration::from_secs(elapsed.as_secs())
}
