//! A point at which a fake device hangs until a test opens it.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

/// Shut when new. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    open: Mutex<bool>,
    opened: Condvar,
    reached: watch::Sender<bool>,
}

impl Gate {
    /// A shut gate.
    #[must_use]
    pub fn new() -> Self {
        let (reached, _) = watch::channel(false);
        Self(Arc::new(Inner { open: Mutex::new(false), opened: Condvar::new(), reached }))
    }

    /// Lets everything pass, now and from now on.
    pub fn open(&self) {
        *self.0.open.lock() = true;
        self.0.opened.notify_all();
    }

    /// Returns as soon as a device has reached the gate.
    pub async fn reached(&self) {
        // The sender lives as long as `self`: the wait cannot fail.
        let _ = self.0.reached.subscribe().wait_for(|reached| *reached).await;
    }

    /// Blocks the thread until the gate is open.
    pub(crate) fn pass(&self) {
        self.0.reached.send_replace(true);
        self.0.opened.wait_while(&mut self.0.open.lock(), |open| !*open);
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}
