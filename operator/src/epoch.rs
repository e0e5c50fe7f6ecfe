//! How often the leadership of the operators has changed: what the agents fence by.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// How long raising the epoch may take: as long as the API server may.
const RAISE_TIMEOUT: Duration = Duration::from_secs(20);

/// The epoch of this operator's leadership, `leaseTransitions` of the Lease plus 1. It goes into every call that an agent acts
/// by, so that an agent that has heard a newer leader refuses an older one.
#[derive(Debug, Clone)]
pub struct Epoch {
    now: watch::Receiver<u64>,
    raises: mpsc::Sender<u64>,
}

/// The other end of an [`Epoch`], for whoever holds the Lease.
pub(crate) struct EpochSource {
    pub(crate) now: watch::Sender<u64>,
    /// Epochs that an agent has seen, and that ours must be above.
    pub(crate) raises: mpsc::Receiver<u64>,
}

impl Epoch {
    /// An epoch, and the end by which it is raised.
    pub(crate) fn new(first: u64) -> (Self, EpochSource) {
        let (sender, now) = watch::channel(first);
        let (raises, asked) = mpsc::channel(16);
        (Self { now, raises }, EpochSource { now: sender, raises: asked })
    }

    /// The epoch as of now.
    #[must_use]
    pub fn now(&self) -> u64 {
        *self.now.borrow()
    }

    /// Has the Lease raised above an epoch that an agent knows, and returns when it is. `false`: it could not be.
    pub async fn above(&self, known: u64) -> bool {
        let mut now = self.now.clone();
        let raised = async {
            // Full: others ask for the same, and the answer is one for all.
            self.raises.try_send(known).ok();
            now.wait_for(|now| *now > known).await.is_ok()
        };
        timeout(RAISE_TIMEOUT, raised).await.unwrap_or(false)
    }
}
