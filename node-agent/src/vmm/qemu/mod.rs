//! The driver of QEMU, over a QMP socket for the agent alone.
//!
//! QEMU drives its own devices. The agent begins and ends each step of QEMU's migration, reads the devices
//! between them, and carries QEMU's stream to the twin, in both directions:
//!
//! ```text
//! source's QEMU ── migrate unix:*.migrate ──▶ agent ══ blob ══▶ agent ──▶ migrate-incoming unix:*.migrate
//!                                           ◀ agent ◀ replies ═ agent ◀──                    twin's QEMU
//!
//! source                                                destination
//! start_save    capabilities, parameters, migrate       start_load    capabilities, migrate-incoming, bytes
//! converged     status pre-switchover: VM and devices
//!               are stopped (convergence.rs decides)
//! (gate: the agent reads each device: STOP_COPY, STOP)
//! finish_save   migrate-continue, status completed      finish_load   status completed, the VM paused (-S)
//!                                                       (check: the agent takes each device to STOP)
//! abort_save    migrate_cancel                          resume        cont
//! ```
//!
//! With `return-path` the source's QEMU is `completed` only when the twin's has reported that it has loaded
//! everything.

#[cfg(test)]
#[path = "attack_tests.rs"]
mod attacks;
mod capabilities;
mod carry;
mod convergence;
mod copying;
mod devices;
mod owner;
#[cfg(test)]
mod owner_real_tests;
pub mod preflight;
pub mod qmp;
#[cfg(test)]
mod tests;
mod throughput;

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use slackwater_handover::policy::Driver;
use slackwater_proto::channel::ConnectError;
use slackwater_proto::tonic::{Code, async_trait};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use self::carry::{Carried, REPLIES, StreamSocket};

use self::preflight::{Facts, facts};
use self::qmp::commands::{
    Cont, Migrate, MigrateCancel, MigrateContinue, MigrationInfo, QueryMigrate, QueryStatus, Quit,
};
use self::qmp::{EventKind, Events, MigrationStatus, Notice, QmpClient, QmpError, RunState as QemuState};

use super::budget::{Budget, Copying};
use super::contract::Deadlines;
use super::server::{Server, trust};
use super::{
    Description, DeviceSeen, DirtyTracking, LoadStream, LocalVmm, RunState, SaveStreams, Vmm, VmmError,
};
use crate::host::clock::Clock;
use crate::vfio::borrow::VmmProcess;

/// The mode of QEMU's socket depends on its umask: any mode is accepted that is closed to other users.
const OWNERS_ONLY: u32 = 0o700;

/// Pause between two queries of a state that QEMU is about to change.
const POLL_EVERY: Duration = Duration::from_millis(5);
/// How long `cont` may take: QEMU locks its disks before.
const CONT_LIMIT: Duration = Duration::from_secs(60);
/// How long QEMU may take to report the state that must follow.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// A QEMU VM, or a twin.
#[derive(Debug)]
pub struct QemuVmm {
    qmp: QmpClient,
    server: Server,
    /// The ids of its devices, in the VM's order.
    ids: Vec<String>,
    /// The socket of its migration's stream.
    stream_socket: StreamSocket,
    deadlines: Deadlines,
    /// Takes the twin's replies to the QEMU that saves.
    to_qemu: Mutex<Option<mpsc::Sender<Bytes>>>,
    /// The replies of this twin, until they are taken.
    from_qemu: (mpsc::Sender<Bytes>, Mutex<Option<mpsc::Receiver<Bytes>>>),
    /// What a destination must be able to do.
    facts: OnceLock<Facts>,
    /// QEMU was told to `cont`, and has not refused.
    told_to_run: AtomicBool,
    /// QEMU's events since its migration began, until they are read.
    since_save: Mutex<Option<Events>>,
}

impl QemuVmm {
    /// Connects to the monitor on this socket and holds QEMU's process. `ids` are the ids of the VM's
    /// devices, and `folder` is its own: the sockets of migrations are made there.
    ///
    /// # Errors
    /// [`VmmError::Trust`] if the socket or its server may not be trusted, [`VmmError::Connect`] if no
    /// process serves it, [`VmmError::Deadline`] if there is no greeting.
    pub async fn connect(
        socket: &Path,
        folder: &Path,
        ids: &[String],
        deadlines: Deadlines,
    ) -> Result<Self, VmmError> {
        let user = trust(socket, OWNERS_ONLY)?.user;
        let qmp = QmpClient::connect(socket).await.map_err(|error| match error {
            QmpError::Connect { path, reason } | QmpError::NoGreeting { path, reason } => {
                VmmError::Connect(ConnectError::Socket { path, reason })
            }
            other => from_qmp("connect", other),
        })?;
        let server = Server::of(Ok(qmp.peer()), socket, user)?;
        let (sender, replies) = mpsc::channel(REPLIES);
        Ok(Self {
            stream_socket: StreamSocket::new(folder, socket, server.pid()),
            qmp,
            server,
            ids: ids.to_vec(),
            deadlines,
            to_qemu: Mutex::default(),
            from_qemu: (sender, Mutex::new(Some(replies))),
            facts: OnceLock::new(),
            told_to_run: AtomicBool::new(false),
            since_save: Mutex::default(),
        })
    }

    /// Waits until the migration has a status that `wanted` accepts, or has ended with another one.
    async fn until(
        &self,
        call: &'static str,
        wanted: impl Fn(&MigrationStatus) -> bool,
    ) -> Result<MigrationInfo, VmmError> {
        let ended = |status: &MigrationStatus| {
            use MigrationStatus::{Cancelled, Completed, Failed};
            matches!(status, Completed | Failed | Cancelled)
        };
        let reached = |info: &MigrationInfo| info.status.as_ref().is_some_and(|s| wanted(s) || ended(s));
        let info = self.qmp.migration_status_until(reached).await.map_err(|error| from_qmp(call, error))?;
        match &info.status {
            Some(status) if wanted(status) => Ok(info),
            status => {
                let status = status.as_ref().map_or("none", MigrationStatus::as_ref);
                let why = info.error_desc.as_deref().unwrap_or("it does not say why");
                let message = format!("QEMU's migration is {status}: {why}");
                Err(VmmError::Refused { call, code: Code::Aborted, message })
            }
        }
    }

    async fn status(&self, call: &'static str) -> Result<QemuState, VmmError> {
        let status = self.qmp.execute_within(QueryStatus, self.deadlines.describe).await;
        status.map(|status| status.status).map_err(|error| from_qmp(call, error))
    }

    /// QEMU has no event for a change of these.
    async fn blocked_reasons(&self, call: &'static str) -> Result<Vec<String>, VmmError> {
        let info = self.qmp.execute_within(QueryMigrate, self.deadlines.describe).await;
        Ok(info.map_err(|error| from_qmp(call, error))?.blocked_reasons.unwrap_or_default())
    }

    /// 0 for a QEMU that does not know the question.
    async fn ram_bytes(&self, call: &'static str) -> Result<u64, VmmError> {
        match self.qmp.raw("query-memory-size-summary", serde_json::json!({})).await {
            Ok(summary) => Ok(summary.get("base-memory").and_then(serde_json::Value::as_u64).unwrap_or(0)),
            Err(QmpError::Refused { .. }) => Ok(0),
            Err(error) => Err(from_qmp(call, error)),
        }
    }

    /// Why a load broke off: QEMU's own message, if it has one.
    async fn load_error(&self, seen: String) -> VmmError {
        let info = timeout(SETTLE_LIMIT, self.until("start_load", |_| false)).await;
        match info {
            Ok(Err(error)) => error,
            _ => VmmError::Refused { call: "start_load", code: Code::Aborted, message: seen },
        }
    }
}

#[async_trait]
impl Vmm for QemuVmm {
    async fn describe(&self) -> Result<Description, VmmError> {
        Ok(Description {
            run_state: self.run_state().await?,
            devices: devices::of(&self.qmp, self.server.pid(), &self.ids).await?,
            ram_bytes: self.ram_bytes("describe").await?,
            dirty_tracking: DirtyTracking::None,
            vmm: format!("QEMU {}", self.qmp.version()),
            blocked: self.blocked_reasons("describe").await?,
        })
    }

    async fn run_state(&self) -> Result<RunState, VmmError> {
        self.status("describe").await.map(|status| owner::run_state(&status))
    }

    async fn start_save(&self, _live: bool, budget: Budget) -> Result<SaveStreams, VmmError> {
        let call = "start_save";
        self.prepare(call, budget.channels).await?;
        self.limit(call, budget).await?;
        let listener = self.stream_socket.listen().map_err(|error| carry::socket_error(call, &error))?;
        let uri = self.stream_socket.uri();
        *self.since_save.lock() = Some(self.qmp.events());
        // Nothing that stops it from here on is missed.
        match self.run_state().await? {
            RunState::Running => {}
            state => return Err(VmmError::VmStopped { state }),
        }
        self.qmp.execute(Migrate { uri }).await.map_err(|error| from_qmp(call, error))?;
        let accepted =
            timeout(self.deadlines.save, self.stream_socket.accept(&listener, budget.channels)).await;
        // No other program may connect.
        self.stream_socket.remove();
        let (main, more) = match accepted {
            Ok(accepted) => accepted.map_err(|error| carry::socket_error(call, &error))?,
            Err(_) => return Err(VmmError::Deadline { call: "migrate", limit: self.deadlines.save }),
        };
        let Carried { pieces, replies } = carry::save(main);
        *self.to_qemu.lock() = Some(replies);
        Ok(std::iter::once(pieces).chain(more.into_iter().map(carry::save_channel)).collect())
    }

    async fn converged(&self, copy: Copying) -> Result<(), VmmError> {
        self.copy_until_stopped(copy).await
    }

    async fn pause(&self) -> Result<(), VmmError> {
        let call = "pause";
        match self.status(call).await? {
            // QEMU has stopped it when it was ready for the blackout.
            QemuState::Running => {
                let message = "QEMU runs its VM again: another client has ended its migration".to_owned();
                Err(VmmError::Refused { call, code: Code::Aborted, message })
            }
            _ => Ok(()),
        }
    }

    async fn finish_save(&self) -> Result<(), VmmError> {
        let call = "finish_save";
        self.qmp.execute(MigrateContinue::switch_over()).await.map_err(|error| from_qmp(call, error))?;
        let done = self.until(call, |status| *status == MigrationStatus::Completed);
        let info = timeout(self.deadlines.finish_save, done)
            .await
            .map_err(|_| VmmError::Deadline { call, limit: self.deadlines.finish_save })??;
        info!(
            pid = self.server.pid(),
            downtime_ms = info.downtime_ms,
            total_ms = info.total_time_ms,
            vfio_bytes = info.vfio.map(|vfio| vfio.transferred_bytes),
            "QEMU has saved"
        );
        Ok(())
    }

    async fn abort_save(&self) -> Result<(), VmmError> {
        let call = "abort_save";
        *self.to_qemu.lock() = None;
        self.stream_socket.remove();
        let info = self.qmp.execute(QueryMigrate).await.map_err(|error| from_qmp(call, error))?;
        if info.status.is_none_or(|status| status.is_over()) {
            return Ok(());
        }
        self.qmp.execute(MigrateCancel).await.map_err(|error| from_qmp(call, error))?;
        let ended = self.until(call, MigrationStatus::is_over);
        timeout(self.deadlines.save, ended)
            .await
            .map_err(|_| VmmError::Deadline { call, limit: self.deadlines.save })?
            .map(drop)
    }

    async fn start_load(&self, state: Vec<LoadStream>) -> Result<(), VmmError> {
        let call = "start_load";
        let channels = u8::try_from(state.len().saturating_sub(1)).unwrap_or(u8::MAX);
        self.prepare(call, channels).await?;
        self.stream_socket.remove();
        let uri = self.stream_socket.uri();
        // A twin that cannot load must report why, and not exit.
        let quiet = serde_json::json!({"uri": uri, "exit-on-error": false});
        let arguments =
            if self.qmp.version().qemu.at_least(9, 1) { quiet } else { serde_json::json!({"uri": uri}) };
        self.qmp.raw("migrate-incoming", arguments).await.map_err(|error| from_qmp(call, error))?;
        let loaded = carry::load_all(&self.stream_socket, state, &self.from_qemu.0).await;
        self.stream_socket.remove();
        match loaded {
            Ok(()) => Ok(()),
            Err(error) => Err(self.load_error(format!("QEMU stopped taking its state: {error}")).await),
        }
    }

    async fn finish_load(&self) -> Result<(), VmmError> {
        let call = "finish_load";
        let limit = self.deadlines.finish_load;
        let loaded = async {
            self.until(call, |status| *status == MigrationStatus::Completed).await?;
            loop {
                match self.status(call).await? {
                    // The status comes shortly before the machine is complete.
                    QemuState::InMigrate => tokio::time::sleep(POLL_EVERY).await,
                    QemuState::Paused | QemuState::Prelaunch => return Ok(()),
                    other => {
                        let message = format!(
                            "the twin is {other} after its load, and must be paused (-S): the VM it holds {}",
                            owner::run_state(&other).words()
                        );
                        return Err(VmmError::Refused { call, code: Code::FailedPrecondition, message });
                    }
                }
            }
        };
        timeout(limit, loaded).await.map_err(|_| VmmError::Deadline { call, limit })?
    }

    async fn resume(&self) -> Result<(), VmmError> {
        let call = "resume";
        let until = Instant::now() + SETTLE_LIMIT;
        loop {
            match self.status(call).await? {
                QemuState::Running => return Ok(()),
                // The answer to `cont` was lost: it runs, or has run.
                state if self.told_to_run.load(Ordering::Relaxed) && has_run(&state) => return Ok(()),
                // QEMU reports a failed or cancelled migration before it has taken the VM back.
                QemuState::FinishMigrate if Instant::now() < until => tokio::time::sleep(POLL_EVERY).await,
                // It would refuse.
                QemuState::FinishMigrate => return Err(VmmError::Deadline { call, limit: SETTLE_LIMIT }),
                _ => break,
            }
        }
        self.told_to_run.store(true, Ordering::Relaxed);
        match self.qmp.execute_within(Cont, self.deadlines.run_state).await {
            Ok(_) => {}
            // QEMU still executes it, once it has its disks or its locks.
            Err(QmpError::Deadline { .. }) => warn!(pid = self.server.pid(), "QEMU takes long to `cont`"),
            Err(error) => {
                let error = from_qmp(call, error);
                self.told_to_run.store(matches!(error, VmmError::Lost { .. }), Ordering::Relaxed);
                return Err(error);
            }
        }
        let until = Instant::now() + CONT_LIMIT;
        loop {
            match self.status(call).await {
                Ok(state) if has_run(&state) => return Ok(()),
                Ok(_) | Err(VmmError::Deadline { .. }) if Instant::now() < until => {
                    tokio::time::sleep(POLL_EVERY).await;
                }
                Ok(other) => {
                    warn!(pid = self.server.pid(), state = %other, "QEMU took `cont`, and does not run the VM");
                    return Err(VmmError::Deadline { call, limit: CONT_LIMIT });
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn take_back(&self) -> Result<RunState, VmmError> {
        let call = "resume";
        let until = Instant::now() + SETTLE_LIMIT;
        loop {
            match self.status(call).await? {
                // QEMU reports a failed or cancelled migration before it has taken the VM back.
                QemuState::FinishMigrate if Instant::now() < until => tokio::time::sleep(POLL_EVERY).await,
                QemuState::FinishMigrate => return Err(VmmError::Deadline { call, limit: SETTLE_LIMIT }),
                // It ran until its migration completed.
                QemuState::PostMigrate => return self.resume().await.map(|()| RunState::Running),
                // QEMU has taken it back by itself, as it was: the guest or another client has stopped it.
                state => return Ok(owner::run_state(&state)),
            }
        }
    }

    async fn quit(&self) -> Result<(), VmmError> {
        match self.qmp.execute_within(Quit, self.deadlines.quit).await {
            // It may have ended before it could answer.
            Ok(_) | Err(QmpError::Lost { .. }) => timeout(self.deadlines.quit, self.exited())
                .await
                .map_err(|_| VmmError::Deadline { call: "quit", limit: self.deadlines.quit }),
            Err(error) => Err(from_qmp("quit", error)),
        }
    }

    fn driver(&self) -> Driver {
        Driver::Vmm
    }

    /// By QEMU's events, if the devices were given `migration-events=on`.
    fn watch_devices(&self) -> Option<mpsc::UnboundedReceiver<DeviceSeen>> {
        let (sender, states) = mpsc::unbounded_channel();
        let (mut events, ids) = (self.qmp.events(), self.ids.clone());
        tokio::spawn(async move {
            loop {
                let notice = tokio::select! {
                    notice = events.next() => notice,
                    () = sender.closed() => return,
                };
                let Some(notice) = notice else { return };
                let Notice::Event(event) = notice else { continue };
                let EventKind::VfioMigration { device_id, state, .. } = event.kind else { continue };
                let index = ids.iter().position(|id| *id == device_id);
                if let (Some(index), Some(state)) = (index, devices::state(&state))
                    && sender.send(DeviceSeen { index, state, at: Clock::now() }).is_err()
                {
                    return;
                }
            }
        });
        Some(states)
    }

    fn take_replies(&self) -> Option<mpsc::Receiver<Bytes>> {
        self.from_qemu.1.lock().take()
    }

    fn reply(&self, reply: Bytes) -> Result<(), VmmError> {
        let to_qemu = self.to_qemu.lock().clone();
        match to_qemu.map(|to_qemu| to_qemu.try_send(reply)) {
            None | Some(Ok(())) => Ok(()),
            // Its migration has ended; that is reported elsewhere.
            Some(Err(mpsc::error::TrySendError::Closed(_))) => Ok(()),
            Some(Err(mpsc::error::TrySendError::Full(_))) => {
                let message = format!("QEMU does not read the twin's replies: {REPLIES} pieces wait");
                Err(VmmError::Refused { call: "reply", code: Code::ResourceExhausted, message })
            }
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
impl LocalVmm for QemuVmm {
    fn process(&self) -> &VmmProcess {
        self.server.process()
    }

    async fn learn(&self) {
        let began = Instant::now();
        match facts::collect(&self.qmp).await {
            Ok(facts) => {
                let (took, features) = (began.elapsed(), facts.cpu_features.len());
                info!(
                    pid = self.pid(),
                    ?took,
                    features,
                    machine = facts.machine_type,
                    "QEMU has told what it is"
                );
                // A concurrent call may have set it.
                let _ = self.facts.set(facts);
            }
            Err(error) => {
                warn!(pid = self.pid(), %error, "QEMU does not report what it is, so targets cannot be compared \
                    with it")
            }
        }
    }

    fn facts(&self) -> Option<Facts> {
        self.facts.get().cloned()
    }

    async fn blocked(&self) -> Result<Option<Vec<String>>, VmmError> {
        self.blocked_reasons("query-migrate").await.map(Some)
    }

    async fn end(&self) -> Result<(), VmmError> {
        self.server.end(self.quit().await, self.deadlines.quit).await
    }
}

/// Whether the vCPUs run, or have run since: the guest may have failed as soon as it was resumed.
fn has_run(state: &QemuState) -> bool {
    use QemuState::{FinishMigrate, InMigrate, Paused, PostMigrate, Prelaunch};
    !matches!(state, FinishMigrate | InMigrate | Paused | PostMigrate | Prelaunch)
}

fn from_qmp(call: &'static str, error: QmpError) -> VmmError {
    match error {
        QmpError::Lost { reason, .. } => VmmError::Lost { call, message: reason },
        QmpError::Deadline { limit, .. } => VmmError::Deadline { call, limit },
        QmpError::Answer { reason, .. } => VmmError::Answer { call, reason },
        QmpError::Connect { path, reason } | QmpError::NoGreeting { path, reason } => {
            VmmError::Lost { call, message: format!("{}: {reason}", path.display()) }
        }
        other => VmmError::Refused { call, code: Code::FailedPrecondition, message: other.to_string() },
    }
}
