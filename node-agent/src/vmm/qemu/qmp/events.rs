//! QEMU's events, and the subscription to them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tracing::warn;

use super::message::parse;
use super::states::{MigrationStatus, VfioState};

/// How many notices may wait for a subscriber.
pub(super) const BACKLOG: usize = 256;

/// Events of a longer line are passed on without their data: [`BACKLOG`] of them are kept.
const EVENT_LIMIT_BYTES: usize = 64 << 10;

/// An event of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// QEMU's clock, if it could read it.
    pub timestamp: Option<SystemTime>,
    /// What has happened.
    pub kind: EventKind,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// `MIGRATION`: the migration has this status now. Only with the capability `events`.
    Migration {
        /// The status.
        status: MigrationStatus,
    },
    /// `MIGRATION_PASS`: another pass over RAM begins. Only with the capability `events`.
    MigrationPass {
        /// The number of the pass, from 1.
        pass: u64,
    },
    /// `STOP`: the vCPUs are stopped.
    Stop,
    /// `RESUME`: the vCPUs run.
    Resume,
    /// `SHUTDOWN`: QEMU ends, or the guest has shut down.
    Shutdown {
        /// Whether the guest requested it.
        guest: bool,
        /// QEMU's `ShutdownCause`, such as `host-qmp-quit`.
        reason: String,
    },
    /// `VFIO_MIGRATION`: a device has entered a state. Only for devices with `migration-events=on`.
    VfioMigration {
        /// The device's `id=`, empty if it has none.
        device_id: String,
        /// Its path in QEMU's object tree.
        qom_path: String,
        /// The state.
        state: VfioState,
    },
    /// Any other event, or one of these with data that could not be parsed.
    Other {
        /// Its name.
        name: String,
        /// Its data; null if it has none.
        data: Value,
    },
}

/// A notice to a subscriber.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// An event.
    Event(Event),
    /// This subscriber was too slow and missed notices: read the state with queries.
    Lagged {
        /// How many.
        missed: u64,
    },
    /// The connection broke. There are no events until the next command connects again.
    Lost {
        /// Why it broke.
        reason: String,
    },
    /// There is a new connection. What happened in between is not known: read the state with queries.
    Reconnected,
}

/// A subscription to the events of a QEMU. It never holds up the connection: a slow subscriber misses
/// notices, and gets [`Notice::Lagged`].
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Notice>);

impl Events {
    pub(super) fn subscribe(sender: &broadcast::Sender<Notice>) -> Self {
        Self(sender.subscribe())
    }

    /// The next notice; `None` when all clients have been dropped. Cancel-safe.
    pub async fn next(&mut self) -> Option<Notice> {
        match self.0.recv().await {
            Ok(notice) => Some(notice),
            Err(RecvError::Lagged(missed)) => Some(Notice::Lagged { missed }),
            Err(RecvError::Closed) => None,
        }
    }

    /// The next notice, if it has come already.
    pub fn next_that_came(&mut self) -> Option<Notice> {
        match self.0.try_recv() {
            Ok(notice) => Some(notice),
            Err(TryRecvError::Lagged(missed)) => Some(Notice::Lagged { missed }),
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
        }
    }

    /// Drops the notices that were not read.
    pub fn skip(&mut self) {
        while !matches!(self.0.try_recv(), Err(TryRecvError::Empty | TryRecvError::Closed)) {}
    }
}

#[derive(Deserialize)]
struct Clock {
    seconds: i64,
    microseconds: i64,
}

impl Clock {
    /// QEMU writes -1 if it could not read its clock.
    fn time(&self) -> Option<SystemTime> {
        let seconds = Duration::from_secs(self.seconds.try_into().ok()?);
        let microseconds = Duration::from_micros(self.microseconds.try_into().ok()?);
        UNIX_EPOCH.checked_add(seconds)?.checked_add(microseconds)
    }
}

#[derive(Deserialize)]
struct Migration {
    status: MigrationStatus,
}

#[derive(Deserialize)]
struct Pass {
    pass: u64,
}

#[derive(Deserialize)]
struct Shutdown {
    guest: bool,
    reason: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct VfioMigration {
    device_id: String,
    qom_path: String,
    device_state: VfioState,
}

impl Event {
    /// Parses an event, from a line of this length.
    pub(super) fn parse(name: String, data: Value, timestamp: Value, line_bytes: usize) -> Self {
        let timestamp = Clock::deserialize(timestamp).ok().and_then(|clock| clock.time());
        if line_bytes > EVENT_LIMIT_BYTES {
            warn!(event = name, line_bytes, "the data of an event are too long and are dropped");
            return Self { timestamp, kind: EventKind::Other { name, data: Value::Null } };
        }
        let known = match name.as_str() {
            "MIGRATION" => parse(&data).map(|Migration { status }| EventKind::Migration { status }),
            "MIGRATION_PASS" => parse(&data).map(|Pass { pass }| EventKind::MigrationPass { pass }),
            "STOP" => Ok(EventKind::Stop),
            "RESUME" => Ok(EventKind::Resume),
            "SHUTDOWN" => {
                parse(&data).map(|Shutdown { guest, reason }| EventKind::Shutdown { guest, reason })
            }
            "VFIO_MIGRATION" => parse(&data).map(|VfioMigration { device_id, qom_path, device_state }| {
                EventKind::VfioMigration { device_id, qom_path, state: device_state }
            }),
            _ => return Self { timestamp, kind: EventKind::Other { name, data } },
        };
        let kind = known.unwrap_or_else(|reason| {
            warn!(event = name, %reason, "an event could not be parsed");
            EventKind::Other { name, data }
        });
        Self { timestamp, kind }
    }
}
