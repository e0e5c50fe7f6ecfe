//! How often the leadership has changed: the number by which the agents fence operators.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// How long raising the epoch may take: as long as the API server may.
const RAISE_TIMEOUT: Duration = Duration::from_secs(20);

/// The epoch of this operator's leadership, `leaseTransitions` of the Lease plus 1. It goes into every call
/// that an agent acts upon, so that an agent that has seen a newer leader's epoch refuses an older one.
#[derive(Debug, Clone)]
pub struct Epoch {
    now: watch::Receiver<u64>,
    raises: mpsc::Sender<u64>,
}

/// The other end of an [`Epoch`], for the code that holds the Lease.
pub(crate) struct EpochSource {
    pub(crate) now: watch::Sender<u64>,
    /// Epochs that an agent has seen. This operator's must be higher.
    pub(crate) raises: mpsc::Receiver<u64>,
}

impl Epoch {
    /// An epoch, and the end that raises it.
    pub(crate) fn new(first: u64) -> (Self, EpochSource) {
        let (sender, now) = watch::channel(first);
        let (raises, requests) = mpsc::channel(16);
        (Self { now, raises }, EpochSource { now: sender, raises: requests })
    }

    /// The current epoch.
    #[must_use]
    pub fn now(&self) -> u64 {
        *self.now.borrow()
    }

    /// Asks for an epoch above one that an agent knows, and returns when it is in force. `false`: it could
    /// not be raised.
    pub async fn above(&self, known: u64) -> bool {
        let mut now = self.now.clone();
        let raised = async {
            // Full: other calls ask for the same, and one answer serves all.
            self.raises.try_send(known).ok();
            now.wait_for(|now| *now > known).await.is_ok()
        };
        timeout(RAISE_TIMEOUT, raised).await.unwrap_or(false)
    }
}
