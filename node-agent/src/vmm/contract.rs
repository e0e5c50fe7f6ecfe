//! The driver of the VMM contract: `slackwater.vmm.v1` over the VMM's Unix socket.
//!
//! The socket has mode 0600. Which sockets and processes the agent trusts: [`server`](super::server).

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use slackwater_proto::channel::{ConnectError, is_lost, open_unix, over_unix, words};
use slackwater_proto::limits::vmm_client;
use slackwater_proto::tonic::transport::Channel;
use slackwater_proto::tonic::{Code, Response, Status, async_trait};
use slackwater_proto::vmm::vmm_client::VmmClient;
use slackwater_proto::vmm::{
    AbortSaveRequest, DescribeRequest, DescribeResponse, DirtyTracking as WireDirtyTracking,
    FinishLoadRequest, FinishSaveRequest, PauseRequest, QuitRequest, ResumeRequest, RunState as WireRunState,
    StartLoadRequest, StartSaveRequest,
};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tracing::info;

use super::budget::Budget;
use super::server::{PRIVATE, Server, trust};
use super::{
    Description, DirtyTracking, LoadStream, LocalVmm, RunState, SaveStreams, Vmm, VmmDevice, VmmError,
};
use crate::vfio::borrow::VmmProcess;

/// How long each call may take. Loading and the stream of a save have no deadline: RAM takes as long as the
/// wire needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// Connecting, and Describe.
    pub describe: Duration,
    /// StartSave until its stream begins, and AbortSave.
    pub save: Duration,
    /// Pause and Resume.
    pub run_state: Duration,
    /// FinishSave: the remaining RAM leaves the node within it.
    pub finish_save: Duration,
    /// FinishLoad.
    pub finish_load: Duration,
    /// Quit, and the end of the process after it.
    pub quit: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            describe: Duration::from_secs(5),
            save: Duration::from_secs(10),
            run_state: Duration::from_secs(10),
            finish_save: Duration::from_secs(600),
            finish_load: Duration::from_secs(60),
            quit: Duration::from_secs(10),
        }
    }
}

/// A VMM that serves the contract.
#[derive(Debug)]
pub struct ContractVmm {
    socket: PathBuf,
    /// None after it has broken.
    client: Mutex<Option<VmmClient<Channel>>>,
    server: Server,
    deadlines: Deadlines,
}

impl ContractVmm {
    /// Connects to the VMM on this socket and holds its process. A call that breaks off with its connection
    /// is not repeated: whether the VMM has carried it out is not known. The next call opens a new
    /// connection, once, and only to the same process.
    ///
    /// # Errors
    /// [`VmmError::Trust`] if the socket or its server may not be trusted, [`VmmError::Connect`] if no
    /// process serves it, [`VmmError::Deadline`] if no process accepts the connection.
    pub async fn connect(socket: &Path, deadlines: Deadlines) -> Result<Self, VmmError> {
        let (client, server) = open(socket, deadlines).await?;
        Ok(Self { socket: socket.to_owned(), client: Mutex::new(Some(client)), server, deadlines })
    }

    /// The connection, or a new one if it has broken.
    async fn client(&self) -> Result<VmmClient<Channel>, VmmError> {
        let mut slot = self.client.lock().await;
        if let Some(client) = &*slot {
            return Ok(client.clone());
        }
        let (client, server) = open(&self.socket, self.deadlines).await?;
        let (now, then) = (server.process().identity(), self.server.process().identity());
        if now != then {
            let reason = format!("process {} serves it now, and not process {} any more", now.pid, then.pid);
            return Err(VmmError::Connect(ConnectError::Socket { path: self.socket.clone(), reason }));
        }
        info!(pid = self.pid(), "connected to the VMM again");
        Ok(slot.insert(client).clone())
    }

    /// What has gone wrong; a connection that has broken is not used again.
    async fn failed(&self, call: &'static str, status: &Status) -> VmmError {
        let error = from_status(call, status);
        if matches!(error, VmmError::Lost { .. }) {
            *self.client.lock().await = None;
        }
        error
    }

    async fn call<T>(
        &self,
        call: &'static str,
        limit: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, VmmError> {
        match timeout(limit, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failed(call, &status).await),
            Err(_) => Err(VmmError::Deadline { call, limit }),
        }
    }
}

/// A connection to the VMM on this socket, and its process.
async fn open(socket: &Path, deadlines: Deadlines) -> Result<(VmmClient<Channel>, Server), VmmError> {
    let found = trust(socket, PRIVATE)?;
    let limit = deadlines.describe;
    let stream = timeout(limit, open_unix(&found.path()))
        .await
        .map_err(|_| VmmError::Deadline { call: "connect", limit })?
        .map_err(|error| VmmError::Connect(named(error, socket)))?;
    let server = Server::of(stream.peer_cred(), socket, found.user)?;
    Ok((vmm_client(over_unix(stream)), server))
}

/// The error with the name that the socket has for a person.
fn named(error: ConnectError, socket: &Path) -> ConnectError {
    match error {
        ConnectError::Socket { reason, .. } => ConnectError::Socket { path: socket.to_owned(), reason },
        other => other,
    }
}

/// The contract has one stream.
fn only(call: &'static str, mut streams: Vec<LoadStream>) -> Result<LoadStream, VmmError> {
    match (streams.pop(), streams.len()) {
        (Some(stream), 0) => Ok(stream),
        (_, others) => {
            let message = format!("it takes its state in one stream, and {} have come", others + 1);
            Err(VmmError::Refused { call, code: Code::InvalidArgument, message })
        }
    }
}

/// The VMM's own message, or that it was lost.
fn from_status(call: &'static str, status: &Status) -> VmmError {
    let message = words(status);
    if is_lost(status) {
        return VmmError::Lost { call, message };
    }
    VmmError::Refused { call, code: status.code(), message }
}

/// Checks the answer to Describe.
fn parse(answer: DescribeResponse) -> Result<Description, VmmError> {
    let not_valid = |reason: String| VmmError::Answer { call: "describe", reason };
    let run_state = match answer.run_state() {
        WireRunState::Running => RunState::Running,
        WireRunState::Paused => RunState::Paused,
        WireRunState::Incoming => RunState::Incoming,
        WireRunState::Unspecified => {
            return Err(not_valid(format!("run_state {} is unknown", answer.run_state)));
        }
    };
    let dirty_tracking = match answer.dirty_tracking() {
        WireDirtyTracking::None => DirtyTracking::None,
        WireDirtyTracking::DeviceLog => DirtyTracking::DeviceLog,
        WireDirtyTracking::Iommu => DirtyTracking::Iommu,
        WireDirtyTracking::Unspecified => {
            return Err(not_valid(format!("dirty_tracking {} is unknown", answer.dirty_tracking)));
        }
    };
    let mut devices: Vec<VmmDevice> = Vec::with_capacity(answer.devices.len());
    for device in answer.devices {
        let name = device.name;
        if name.is_empty() {
            return Err(not_valid(format!("device {} has no name", devices.len())));
        }
        if device.descriptor < 0 {
            return Err(not_valid(format!("device {name} has the descriptor {}", device.descriptor)));
        }
        if devices.iter().any(|other| other.name == name || other.descriptor == device.descriptor) {
            return Err(not_valid(format!(
                "device {name}, descriptor {}, is named twice",
                device.descriptor
            )));
        }
        devices.push(VmmDevice { name, descriptor: device.descriptor, guest_address: device.guest_address });
    }
    let ram_bytes = answer.ram.iter().fold(0_u64, |sum, range| sum.saturating_add(range.bytes));
    Ok(Description { run_state, devices, ram_bytes, dirty_tracking, vmm: answer.vmm, blocked: Vec::new() })
}

/// The pieces of a load as messages. A named type, because the compiler cannot prove that the call is Send
/// with an anonymous adapter around a boxed stream.
struct LoadRequests(LoadStream);

impl Stream for LoadRequests {
    type Item = StartLoadRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx).map(|piece| piece.map(|data| StartLoadRequest { data }))
    }
}

#[async_trait]
impl Vmm for ContractVmm {
    async fn describe(&self) -> Result<Description, VmmError> {
        let mut client = self.client().await?;
        let answer = self.call("describe", self.deadlines.describe, client.describe(DescribeRequest {}));
        parse(answer.await?)
    }

    async fn start_save(&self, live: bool, _budget: Budget) -> Result<SaveStreams, VmmError> {
        let mut client = self.client().await?;
        let answer = client.start_save(StartSaveRequest { live });
        let stream = self.call("start_save", self.deadlines.save, answer).await?;
        let pieces = stream.filter_map(async |piece| match piece {
            Ok(piece) if piece.data.is_empty() => None,
            Ok(piece) => Some(Ok(piece.data)),
            Err(status) => Some(Err(from_status("start_save", &status))),
        });
        Ok(vec![pieces.boxed()])
    }

    async fn pause(&self) -> Result<(), VmmError> {
        let mut client = self.client().await?;
        self.call("pause", self.deadlines.run_state, client.pause(PauseRequest {})).await.map(drop)
    }

    async fn finish_save(&self) -> Result<(), VmmError> {
        let mut client = self.client().await?;
        let answer = client.finish_save(FinishSaveRequest {});
        self.call("finish_save", self.deadlines.finish_save, answer).await.map(drop)
    }

    async fn abort_save(&self) -> Result<(), VmmError> {
        let mut client = self.client().await?;
        self.call("abort_save", self.deadlines.save, client.abort_save(AbortSaveRequest {})).await.map(drop)
    }

    async fn start_load(&self, state: Vec<LoadStream>) -> Result<(), VmmError> {
        let state = only("start_load", state)?;
        let mut client = self.client().await?;
        match client.start_load(LoadRequests(state)).await {
            Ok(_) => Ok(()),
            Err(status) => Err(self.failed("start_load", &status).await),
        }
    }

    async fn finish_load(&self) -> Result<(), VmmError> {
        let mut client = self.client().await?;
        let answer = client.finish_load(FinishLoadRequest {});
        self.call("finish_load", self.deadlines.finish_load, answer).await.map(drop)
    }

    async fn resume(&self) -> Result<(), VmmError> {
        let mut client = self.client().await?;
        self.call("resume", self.deadlines.run_state, client.resume(ResumeRequest {})).await.map(drop)
    }

    async fn quit(&self) -> Result<(), VmmError> {
        let mut client = self.client().await?;
        match self.call("quit", self.deadlines.quit, client.quit(QuitRequest {})).await {
            // It may have ended before it could answer.
            Err(VmmError::Lost { .. }) => timeout(self.deadlines.quit, self.exited())
                .await
                .map_err(|_| VmmError::Deadline { call: "quit", limit: self.deadlines.quit }),
            other => other.map(drop),
        }
    }

    fn pid(&self) -> u32 {
        self.server.pid()
    }

    async fn exited(&self) {
        self.server.exited().await;
    }
}

#[async_trait]
impl LocalVmm for ContractVmm {
    fn process(&self) -> &VmmProcess {
        self.server.process()
    }

    async fn end(&self) -> Result<(), VmmError> {
        self.server.end(self.quit().await, self.deadlines.quit).await
    }
}

#[cfg(test)]
#[path = "contract_tests.rs"]
mod tests;
