//! The progress of a blob.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a blob's stream has sent so far. It only grows.
#[derive(Debug, Default)]
pub struct Flow {
    bytes: AtomicU64,
    waited_ns: AtomicU64,
}

impl Flow {
    /// Bytes handed to the transport.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How long the transport had no room: the wire, or the destination, was slower than the source.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }

    pub(super) fn add_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_wait(&self, waited: Duration) {
        let waited = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        self.waited_ns.fetch_add(waited, Ordering::Relaxed);
    }
}
