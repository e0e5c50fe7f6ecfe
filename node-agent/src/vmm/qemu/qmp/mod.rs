//! A client of QEMU's machine protocol (QMP): JSON lines over a Unix socket for the agent alone.
//!
//! ```text
//!               greeting, qmp_capabilities           closed, garbage, endless line
//!   connecting ────────────────────────────▶ served ───────────────────────────────▶ broken
//!       ▲  NoGreeting, Connect: the command fails      commands in flight: Lost         │
//!       └───────────────────────────────── the next command ◀───────────────────────────┘
//! ```
//!
//! - Any number of commands may be in flight; answers find them by `id`. A command has one deadline for all
//!   it needs, connecting included. A caller that stops waiting takes back a command that was not written
//!   yet; one that was may still be executed.
//! - Events go to subscribers ([`QmpClient::events`]), which never hold up the connection. A subscriber gets
//!   a notice when the connection breaks and when there is a new one, and reads the state with queries then.
//! - A command that was in flight when the connection broke is [`QmpError::Lost`]: it is not known whether
//!   QEMU executed it, and it is never repeated. A command that finds the connection broken opens a new one,
//!   once, and only to the same process.
//! - Limits: a line has at most 4 MiB, 256 notices wait for a subscriber, 64 commands wait to be written.
//!
//! The protocol: docs/interop/qmp-spec.rst and qapi/*.json of QEMU 10.0.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::net::unix::UCred;
use tokio::sync::{Mutex, broadcast};
use tokio::time::timeout;

mod answers;
pub mod commands;
mod connection;
mod error;
mod events;
mod lines;
mod message;
mod migration;
mod states;

pub use self::commands::Command;
pub use self::error::QmpError;
pub use self::events::{Event, EventKind, Events, Notice};
pub use self::states::{MigrationStatus, RunState, VfioState};

use self::commands::Version;
use self::connection::{Connection, Ended, Slot, negotiate};
use self::message::{Failure, parse};

/// How long things may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// Connecting, the greeting and the negotiation, together.
    pub greeting: Duration,
    /// Each command without a limit of its own.
    pub command: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { greeting: Duration::from_secs(5), command: Duration::from_secs(10) }
    }
}

/// A client of one QMP socket. Clones share the connection; it is closed when the last one is dropped.
#[derive(Clone, Debug)]
pub struct QmpClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: PathBuf,
    deadlines: Deadlines,
    notices: broadcast::Sender<Notice>,
    version: parking_lot::Mutex<Version>,
    peer: UCred,
    connection: Mutex<Connection>,
}

impl QmpClient {
    /// Connects to a QMP socket, with the usual deadlines. The socket serves one client at a time.
    ///
    /// # Errors
    /// [`QmpError::Connect`] if no process serves it, [`QmpError::NoGreeting`] if another client holds it or
    /// it is not QMP.
    pub async fn connect(socket: &Path) -> Result<Self, QmpError> {
        Self::connect_with(socket, Deadlines::default()).await
    }

    /// As [`QmpClient::connect`], with other deadlines.
    ///
    /// # Errors
    /// The same.
    pub async fn connect_with(socket: &Path, deadlines: Deadlines) -> Result<Self, QmpError> {
        let negotiated = negotiate(socket, deadlines.greeting).await?;
        let (notices, _) = broadcast::channel(events::BACKLOG);
        let version = parking_lot::Mutex::new(negotiated.version.clone());
        let peer = negotiated.peer;
        let connection = Mutex::new(Connection::start(negotiated, notices.clone()));
        let shared = Shared { socket: socket.to_owned(), deadlines, notices, version, peer, connection };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The version in the last greeting.
    pub fn version(&self) -> Version {
        self.shared.version.lock().clone()
    }

    /// The process that serves the socket, the same on every connection.
    pub fn peer(&self) -> UCred {
        self.shared.peer
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    /// A subscription to all events from now on.
    pub fn events(&self) -> Events {
        Events::subscribe(&self.shared.notices)
    }

    /// Sends a command to QEMU and waits for its answer.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub async fn execute<C: Command>(&self, command: C) -> Result<C::Answer, QmpError> {
        self.execute_within(command, self.shared.deadlines.command).await
    }

    /// As [`QmpClient::execute`], with a deadline of its own; `Duration::MAX` for none.
    ///
    /// # Errors
    /// The same.
    pub async fn execute_within<C: Command>(
        &self,
        command: C,
        limit: Duration,
    ) -> Result<C::Answer, QmpError> {
        let arguments = serde_json::to_value(&command).map_err(|error| QmpError::Arguments {
            command: C::NAME.to_owned(),
            reason: error.to_string(),
        })?;
        let answer = self.raw_within(C::NAME, arguments, limit).await?;
        parse(&answer)
            .map_err(|error| QmpError::Answer { command: C::NAME.to_owned(), reason: error.to_string() })
    }

    /// Sends any command to QEMU. Its arguments are an object, or null if there are none.
    ///
    /// # Errors
    /// Any [`QmpError`].
    pub async fn raw(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.raw_within(name, arguments, self.shared.deadlines.command).await
    }

    /// As [`QmpClient::raw`], with a deadline of its own; `Duration::MAX` for none.
    ///
    /// # Errors
    /// The same.
    pub async fn raw_within(&self, name: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        let execute = async {
            let slot = self.slot(name).await?;
            slot.execute(name, arguments).await.map_err(|failure| failure.into_error(name))
        };
        timeout(limit, execute).await.map_err(|_| QmpError::Deadline { command: name.to_owned(), limit })?
    }

    /// A slot for a command, in the connection or, if it has broken, in a new one.
    async fn slot(&self, command: &str) -> Result<Slot, QmpError> {
        let shared = &*self.shared;
        let mut connection = shared.connection.lock().await;
        if let Ok(slot) = connection.slot() {
            return Ok(slot);
        }
        let negotiated = negotiate(&shared.socket, shared.deadlines.greeting).await?;
        let (now, then) = (negotiated.peer.pid(), shared.peer.pid());
        if now != then {
            let process = |pid: Option<i32>| {
                pid.map_or("an unknown process".to_owned(), |pid| format!("process {pid}"))
            };
            let reason = format!("{} serves it now, and not {} any more", process(now), process(then));
            return Err(QmpError::Connect { path: shared.socket.clone(), reason });
        }
        *shared.version.lock() = negotiated.version.clone();
        // Before any event of this connection. It fails if there is no subscriber.
        let _ = shared.notices.send(Notice::Reconnected);
        *connection = Connection::start(negotiated, shared.notices.clone());
        connection.slot().map_err(|Ended { reason }| Failure::Lost { reason }.into_error(command))
    }
}

#[cfg(test)]
pub(super) mod tests;
