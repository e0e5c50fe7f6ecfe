//! What QEMU tells unasked, and the subscription to it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tracing::warn;

use super::message::parse;
use super::states::{MigrationStatus, VfioState};

/// How many notices a subscriber may be behind.
pub(super) const BACKLOG: usize = 256;

/// Events of a longer line are passed on without their data: [`BACKLOG`] of them are kept.
const EVENT_LIMIT_BYTES: usize = 64 << 10;

/// Something that QEMU told.
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
    /// `MIGRATION`: the migration has this status now. Told only with the capability `events`.
    Migration {
        /// The status.
        status: MigrationStatus,
    },
    /// `MIGRATION_PASS`: RAM is gone through once more. Told only with the capability `events`.
    MigrationPass {
        /// Which time, from 1.
        pass: u64,
    },
    /// `STOP`: the vCPUs stand still.
    Stop,
    /// `RESUME`: the vCPUs run.
    Resume,
    /// `SHUTDOWN`: QEMU ends, or the guest has shut down.
    Shutdown {
        /// Whether the guest wanted it.
        guest: bool,
        /// QEMU's `ShutdownCause`, such as `host-qmp-quit`.
        reason: String,
    },
    /// `VFIO_MIGRATION`: a device has entered a state. Told only of devices with `migration-events=on`.
    VfioMigration {
        /// The device's `id=`, empty if it has none.
        device_id: String,
        /// Its path in QEMU's object tree.
        qom_path: String,
        /// The state.
        state: VfioState,
    },
    /// Any other event, or one of these with data that were not understood.
    Other {
        /// Its name.
        name: String,
        /// Its data; null if it has none.
        data: Value,
    },
}

/// What a subscriber is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Notice {
    /// QEMU told something.
    Event(Event),
    /// This subscriber was too slow, and so many notices are gone: read the state with queries.
    Lagged {
        /// How many.
        missed: u64,
    },
    /// The connection broke. Nothing is told until the next command connects again.
    Lost {
        /// Why it broke.
        reason: String,
    },
    /// There is a new connection. What happened in between is not known: read the state with queries.
    Reconnected,
}

/// A subscription to the events of a QEMU. It never holds up the connection: who is too slow misses notices, and is told so.
#[derive(Debug)]
pub struct Events(broadcast::Receiver<Notice>);

impl Events {
    pub(super) fn of(sender: &broadcast::Sender<Notice>) -> Self {
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

    /// Forgets what has been told and not been read.
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
            warn!(event = name, line_bytes, "the data of an event are too long and are not passed on");
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
            warn!(event = name, %reason, "an event was not understood");
            EventKind::Other { name, data }
        });
        Self { timestamp, kind }
    }
}
