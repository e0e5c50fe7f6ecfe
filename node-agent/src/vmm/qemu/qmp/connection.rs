//! One connection: its negotiation, and the task that serves it until it breaks.

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backon::{ConstantBuilder, Retryable};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf, UCred};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::commands::Version;
use super::error::QmpError;
use super::events::Notice;
use super::lines::{LineError, Lines};
use super::message::{Failure, Message, NotAnObject, Outcome};
use crate::process::folder::find_socket;

/// How many commands may wait to be written. QEMU itself takes eight at a time and then stops to read.
const QUEUE: usize = 64;

/// After a failed write: how long the rest of QEMU's output may take to be read.
const READ_REST_LIMIT: Duration = Duration::from_secs(1);

/// Pause between two attempts to connect while the socket's queue is full: there is no event for it.
const CONNECT_EVERY: Duration = Duration::from_millis(50);

const HELD_BY_ANOTHER: &str = "another client may hold the monitor, which serves one at a time (libvirt occupies \
    its own monitor: give the \
                    agent a socket of its own)";

/// A connection that has been negotiated and is not served yet.
#[derive(Debug)]
pub(super) struct Negotiated {
    from: Lines<OwnedReadHalf>,
    to: OwnedWriteHalf,
    pub(super) version: Version,
    /// The process that serves the socket.
    pub(super) peer: UCred,
}

/// Connects, reads the greeting and negotiates, all within `limit`.
pub(super) async fn negotiate(socket: &Path, limit: Duration) -> Result<Negotiated, QmpError> {
    let path = || socket.to_owned();
    let mut stage = Stage::Connecting;
    timeout(limit, negotiate_in_stages(socket, &mut stage)).await.unwrap_or_else(|_| {
        let ms = limit.as_millis();
        Err(match stage {
            Stage::Connecting => QmpError::Connect {
                path: path(),
                reason: format!("its queue of connections was full for {ms} ms: {HELD_BY_ANOTHER}"),
            },
            Stage::Greeting => QmpError::NoGreeting {
                path: path(),
                reason: format!(
                    "the connection was made, but nothing was said within {ms} ms: {HELD_BY_ANOTHER}"
                ),
            },
            Stage::Capabilities => QmpError::NoGreeting {
                path: path(),
                reason: format!("QEMU greeted, but did not answer qmp_capabilities within {ms} ms: it hangs"),
            },
        })
    })
}

/// How far the negotiation is.
enum Stage {
    Connecting,
    Greeting,
    Capabilities,
}

async fn negotiate_in_stages(socket: &Path, stage: &mut Stage) -> Result<Negotiated, QmpError> {
    let no_greeting = |reason: String| QmpError::NoGreeting { path: socket.to_owned(), reason };
    let stream = connect(socket).await?;
    let peer = stream.peer_cred().map_err(|error| QmpError::Connect {
        path: socket.to_owned(),
        reason: format!("who serves it is not known: {error}"),
    })?;
    let (from, mut to) = stream.into_split();
    let mut from = Lines::new(from);

    *stage = Stage::Greeting;
    let version = match next(&mut from).await.map_err(|error| no_greeting(error.to_string()))? {
        Message::Greeting(version) => version.map_err(|error| no_greeting(format!("in `QMP`, {error}")))?,
        _ => return Err(no_greeting("the first line is not a greeting: it is not a QMP socket".to_owned())),
    };

    *stage = Stage::Capabilities;
    let command = "qmp_capabilities";
    let lost = |error: EndError| Failure::Lost { reason: error.to_string() }.into_error(command);
    let line = request(command, Value::Null, 0);
    to.write_all(&line).await.map_err(|error| lost(EndError::Write(error)))?;
    loop {
        match next(&mut from).await.map_err(lost)? {
            Message::Answer { id: Some(0), outcome: Ok(_) } => {
                return Ok(Negotiated { from, to, version, peer });
            }
            Message::Answer { outcome: Err(failure), .. } => return Err(failure.into_error(command)),
            other => debug!(?other, "ignored during QMP's negotiation"),
        }
    }
}

/// Connects. A full queue is waited for: two dead connections of an agent that was killed suffice to fill
/// QEMU's.
async fn connect(socket: &Path) -> Result<UnixStream, QmpError> {
    let pauses = ConstantBuilder::new().with_delay(CONNECT_EVERY).without_max_times();
    // Each time it is found anew: a QEMU's folder is its own to write to, so no link is followed.
    let connect = async || UnixStream::connect(find_socket(socket)?.path()).await;
    let connected = connect.retry(pauses).when(|error| error.kind() == io::ErrorKind::WouldBlock).await;
    connected.map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::NotFound => {
                "it does not exist: was QEMU started with it (-qmp unix:PATH,server=on,wait=off)?".to_owned()
            }
            io::ErrorKind::ConnectionRefused => "no process listens on it: its QEMU has ended".to_owned(),
            _ => error.to_string(),
        };
        QmpError::Connect { path: socket.to_owned(), reason }
    })
}

/// Why a connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
enum EndError {
    #[error(transparent)]
    Line(#[from] LineError),
    #[error(transparent)]
    Message(#[from] NotAnObject),
    #[error("writing failed: {0}")]
    Write(io::Error),
}

async fn next(from: &mut Lines<OwnedReadHalf>) -> Result<Message, EndError> {
    Ok(Message::parse(&from.next().await?)?)
}

/// A command as a line.
fn request(command: &str, arguments: Value, id: u64) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("execute".to_owned(), json!(command));
    if !arguments.is_null() {
        object.insert("arguments".to_owned(), arguments);
    }
    object.insert("id".to_owned(), json!(id));
    format!("{}\n", Value::Object(object)).into_bytes()
}

/// The callers that wait for answers, by the command's id.
#[derive(Debug, Default)]
struct Waiting {
    last_id: u64,
    answers: HashMap<u64, oneshot::Sender<Outcome>>,
    ended: Option<Ended>,
}

/// The connection has broken.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    /// Why.
    pub(super) reason: String,
}

#[derive(Clone, Debug, Default)]
struct Table(Arc<Mutex<Waiting>>);

impl Table {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock()
    }

    fn take(&self, id: u64) -> Option<oneshot::Sender<Outcome>> {
        self.lock().answers.remove(&id)
    }

    fn end(&self, reason: &str) {
        let mut waiting = self.lock();
        waiting.ended = Some(Ended { reason: reason.to_owned() });
        for (_, answer) in waiting.answers.drain() {
            // It fails if the caller has gone.
            let _ = answer.send(Err(Failure::Lost { reason: reason.to_owned() }));
        }
    }
}

/// A served connection. It is closed when it is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    table: Table,
    requests: mpsc::Sender<(u64, Vec<u8>)>,
    task: JoinHandle<()>,
}

impl Connection {
    /// Serves a connection.
    pub(super) fn start(negotiated: Negotiated, notices: broadcast::Sender<Notice>) -> Self {
        let table = Table::default();
        let (requests, queue) = mpsc::channel(QUEUE);
        let task = tokio::spawn(serve(negotiated, queue, table.clone(), notices));
        Self { table, requests, task }
    }

    /// A slot for a command's answer.
    ///
    /// # Errors
    /// If the connection has broken: the command can be given to another one.
    pub(super) fn slot(&self) -> Result<Slot, Ended> {
        let mut waiting = self.table.lock();
        if let Some(ended) = &waiting.ended {
            return Err(ended.clone());
        }
        waiting.last_id = waiting.last_id.wrapping_add(1);
        let id = waiting.last_id;
        let (sender, answer) = oneshot::channel();
        waiting.answers.insert(id, sender);
        Ok(Slot { id, answer, table: self.table.clone(), requests: self.requests.clone() })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A command's slot in a connection. Dropping it ends the wait, and a command that was not written yet will
/// not be.
#[derive(Debug)]
pub(super) struct Slot {
    id: u64,
    answer: oneshot::Receiver<Outcome>,
    table: Table,
    requests: mpsc::Sender<(u64, Vec<u8>)>,
}

impl Slot {
    /// Sends the command to QEMU and waits for its answer.
    pub(super) async fn execute(mut self, command: &str, arguments: Value) -> Outcome {
        let line = request(command, arguments, self.id);
        // If this fails, the connection has ended, and the answer is the reason.
        let _ = self.requests.send((self.id, line)).await;
        let lost = || Failure::Lost { reason: "the client was dropped".to_owned() };
        (&mut self.answer).await.unwrap_or_else(|_| Err(lost()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.table.take(self.id);
    }
}

async fn serve(
    negotiated: Negotiated,
    queue: mpsc::Receiver<(u64, Vec<u8>)>,
    table: Table,
    notices: broadcast::Sender<Notice>,
) {
    let Negotiated { mut from, mut to, .. } = negotiated;
    let error = tokio::select! {
        error = read(&mut from, &table, &notices) => error,
        error = write(&mut to, queue, &table) => error,
    };
    let reason = error.to_string();
    debug!(%reason, "a QMP connection has ended");
    // The monitor is free again, and subscribers have their notice, before a new connection.
    drop((from, to));
    // It fails if there is no subscriber.
    let _ = notices.send(Notice::Lost { reason: reason.clone() });
    table.end(&reason);
}

/// Reads until the connection ends.
async fn read(
    from: &mut Lines<OwnedReadHalf>,
    table: &Table,
    notices: &broadcast::Sender<Notice>,
) -> EndError {
    loop {
        let message = match next(from).await {
            Ok(message) => message,
            Err(error) => return error,
        };
        match message {
            Message::Event(event) => {
                // It fails if there is no subscriber.
                let _ = notices.send(Notice::Event(event));
            }
            Message::Answer { id: None, outcome } => {
                warn!(?outcome, "QEMU answered without the id of a command");
            }
            Message::Answer { id: Some(id), outcome } => match table.take(id) {
                Some(answer) => {
                    let _ = answer.send(outcome);
                }
                None => debug!(id, "an answer without a waiting caller"),
            },
            Message::Greeting(_) | Message::Unknown => debug!(?message, "ignored a message of QEMU"),
        }
    }
}

/// Writes until the connection ends.
async fn write(
    to: &mut (impl AsyncWrite + Unpin),
    mut queue: mpsc::Receiver<(u64, Vec<u8>)>,
    table: &Table,
) -> EndError {
    while let Some((id, line)) = queue.recv().await {
        if !table.lock().answers.contains_key(&id) {
            continue;
        }
        if let Err(error) = to.write_all(&line).await {
            // The reader ends first if it reads the rest of QEMU's output.
            sleep(READ_REST_LIMIT).await;
            return EndError::Write(error);
        }
    }
    pending().await
}
