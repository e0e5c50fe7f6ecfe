//! Connections to the node's VMMs, kept so that not every look connects anew.
//!
//! Each socket has a lock of its own: a monitor serves one client at a time, so only one connection to it is
//! tried at once, and a VMM that does not answer does not hold up the calls to another.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex as Lock;
use tokio::sync::Mutex;

/// The connection to what serves a socket, if there is one.
pub(super) type Slot<C> = Arc<Mutex<Option<C>>>;

/// Connections by socket.
#[derive(Debug)]
pub(super) struct Connections<C>(Lock<HashMap<PathBuf, Slot<C>>>);

impl<C> Default for Connections<C> {
    fn default() -> Self {
        Self(Lock::default())
    }
}

impl<C> Connections<C> {
    /// The slot of this socket. Empty slots that no call uses are dropped.
    pub(super) fn slot(&self, socket: &Path) -> Slot<C> {
        let mut slots = self.0.lock();
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|connection| connection.is_some())
        });
        Arc::clone(slots.entry(socket.to_owned()).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_for_one_vmm_does_not_hold_up_calls_to_another() {
        let connections = Connections::<u32>::default();
        let slow = connections.slot(Path::new("/a"));
        let connecting = slow.lock().await;
        assert!(connections.slot(Path::new("/b")).try_lock().is_ok());
        assert!(connections.slot(Path::new("/a")).try_lock().is_err(), "one connection at a time");
        drop(connecting);
        assert!(connections.slot(Path::new("/a")).try_lock().is_ok());
    }

    #[tokio::test]
    async fn a_connection_is_kept_and_an_empty_slot_is_not() {
        let connections = Connections::<u32>::default();
        *connections.slot(Path::new("/a")).lock().await = Some(7);
        drop(connections.slot(Path::new("/b")));
        assert_eq!(*connections.slot(Path::new("/a")).lock().await, Some(7));
        assert_eq!(connections.0.lock().len(), 1);
    }
}
