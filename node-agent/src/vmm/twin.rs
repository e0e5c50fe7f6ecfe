//! Starting a twin: the VMM that takes over the VM at the destination.
//!
//! ```text
//! agent ── fork ── agent's own program as `twin-exec` ── setsid, enter the cgroup ── exec ── the VMM
//!   └─ waits: the directory of the socket changes, or the twin ends, or the deadline passes
//! ```
//!
//! The twin has a session and a control group of its own, no pipe to the agent and no parent-death signal,
//! and it writes its output to a file: it outlives an agent that dies, or is upgraded.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

use super::contract::Deadlines;
use super::{Description, LocalVmm, RunState, VmmError};
use crate::host::vm::VmmEntry;
use crate::host::vms;
use crate::process::cgroup::{Cgroup, CgroupError, error_chain};
use crate::process::exec::{Descriptor, TWIN_EXEC};
use crate::process::file_events::FileEvents;
use crate::process::folder::Folder;
use crate::process::launch::{Launch, LaunchError, NOT_LISTENING_YET, end_of};
use crate::process::sandbox::Sandbox;

/// The twin's output, in its directory.
pub const LOG_FILE: &str = "twin.log";

/// What to start, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinPlan {
    /// The command that becomes `program`: see [`launcher`].
    pub launcher: Vec<OsString>,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// Name of the cgroup: `<namespace>.<name>-<migration>`.
    pub cgroup_name: String,
    /// The VM's directory at this node: [`vms::directory`]. It is made, and must not hold a VM yet.
    pub directory: PathBuf,
    /// Its protocol, socket and devices.
    pub vmm: VmmEntry,
    /// Absolute; the caller has checked that it is allowed.
    pub program: PathBuf,
    /// Its arguments, with all placeholders filled in.
    pub arguments: Vec<String>,
    /// The names of its VFIO devices.
    pub device_names: Vec<String>,
    /// The files that it gets open.
    pub descriptors: Vec<Descriptor>,
    /// What it may reach; its directory belongs to the user of it. None of a plan that is not to be started:
    /// that of a journal from before there was one.
    pub sandbox: Option<Sandbox>,
    /// The socket that the twin will serve.
    pub socket: PathBuf,
    /// How long it may take to answer Describe.
    pub start_limit: Duration,
    /// The deadlines of its calls.
    pub deadlines: Deadlines,
}

/// The agent's own program as `twin-exec`. The link leads to the program that runs, even if its file has been
/// replaced meanwhile.
pub fn launcher() -> Vec<OsString> {
    vec!["/proc/self/exe".into(), TWIN_EXEC.into()]
}

/// The twin could not be started, or ended. Nothing of it is left, unless the error says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TwinError {
    /// There is a VM in the directory.
    #[error("{directory} holds a VM already: it has a vm.json")]
    AlreadyHere {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory, or a file in it, could not be used.
    #[error("cannot use the directory of the twin, {path}: {source}")]
    Directory {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No inotify.
    #[error("cannot watch {path}: {source}")]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: notify::Error,
    },
    /// No cgroup.
    #[error("no cgroup for the twin: {}", error_chain(.0))]
    Cgroup(CgroupError),
    /// A plan without a sandbox.
    #[error("no twin is started without a sandbox")]
    NoSandbox,
    /// The launcher could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The launcher.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The twin ended before it answered.
    #[error("the twin {program} ended before it answered: {status}{}", quote_log(log))]
    Ended {
        /// What was started.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// The twin runs, and does not answer.
    #[error("the twin {program} did not answer within {} ms: {reason}{}", limit.as_millis(), quote_log(log))]
    Silent {
        /// What was started.
        program: PathBuf,
        /// How long it had.
        limit: Duration,
        /// The last error.
        reason: String,
        /// The end of its log.
        log: String,
    },
    /// A VMM did not end.
    #[error("the VMM could not be ended: {0}")]
    End(VmmError),
    /// Another process than the twin answers.
    #[error("{socket} is served by something else than the twin: {reason}")]
    NotTheTwin {
        /// The socket.
        socket: PathBuf,
        /// Why it is not the twin.
        reason: String,
    },
}

impl TwinPlan {
    fn log(&self) -> PathBuf {
        self.directory.join(LOG_FILE)
    }

    /// The end of the twin's log, as the continuation of an error message.
    #[must_use]
    pub fn last_words(&self) -> String {
        quote_log(&end_of(&self.directory, LOG_FILE))
    }
}

fn quote_log(log: &str) -> String {
    if log.is_empty() { "; its log is empty".to_owned() } else { format!("; its log ends in:\n{log}") }
}

/// A twin that has answered and waits for the VM's state.
#[derive(Debug)]
pub struct Twin {
    vmm: Arc<dyn LocalVmm>,
    description: Description,
    footprint: Footprint,
    /// Reaped by the runtime when it has ended, even after this is gone.
    _child: Child,
}

/// What a twin consists of besides its process.
#[derive(Clone, Debug)]
struct Footprint {
    cgroup: Cgroup,
    directory: PathBuf,
    socket: PathBuf,
}

impl Twin {
    /// Its VMM.
    pub fn vmm(&self) -> &Arc<dyn LocalVmm> {
        &self.vmm
    }

    /// Its answer to Describe at the start.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Ends it and removes everything. The agent's duplicates of its devices must have been dropped, or the
    /// devices stay in use.
    ///
    /// # Errors
    /// What is left, if something is.
    pub async fn discard(self, limit: Duration) -> Result<(), TwinError> {
        self.footprint.clear(limit).await
    }
}

impl Footprint {
    /// Kills the processes of a twin, and removes its cgroup and its directory.
    async fn clear(&self, limit: Duration) -> Result<(), TwinError> {
        self.cgroup.clear(limit).await.map_err(TwinError::Cgroup)?;
        retire(&self.directory, &self.socket)
    }
}

fn directory_error(path: &Path, source: io::Error) -> TwinError {
    TwinError::Directory { path: path.to_owned(), source }
}

fn require_no_vm(directory: &Path) -> Result<(), TwinError> {
    match vms::holds_vm(directory) {
        Ok(false) => Ok(()),
        Ok(true) => Err(TwinError::AlreadyHere { directory: directory.to_owned() }),
        Err(source) => Err(directory_error(directory, source)),
    }
}

/// Removes a twin that never ran and that an earlier agent may have started by this plan.
///
/// # Errors
/// What is left, if something is.
pub async fn clear(plan: &TwinPlan, limit: Duration) -> Result<(), TwinError> {
    require_no_vm(&plan.directory)?;
    let cgroup = Cgroup::with_name(&plan.cgroup_root, &plan.cgroup_name).map_err(TwinError::Cgroup)?;
    cgroup.clear(limit).await.map_err(TwinError::Cgroup)?;
    retire(&plan.directory, &plan.socket)
}

/// As [`end`], for a VM whose process has ended.
///
/// # Errors
/// What is left, if something is.
pub async fn forget(
    cgroup: Option<&Cgroup>,
    directory: &Path,
    socket: &Path,
    limit: Duration,
) -> Result<(), TwinError> {
    if let Some(cgroup) = cgroup {
        cgroup.clear(limit).await.map_err(TwinError::Cgroup)?;
    }
    retire(directory, socket)
}

/// Ends a VM that runs elsewhere now: its VMM, the cgroup if it was once a twin here ([`Cgroup::of_process`],
/// read while the process existed), and its directory, except for the files of others. The agent's duplicates
/// of its devices must have been dropped.
///
/// # Errors
/// What is left, if something is.
pub async fn end(
    vmm: &dyn LocalVmm,
    cgroup: Option<&Cgroup>,
    directory: &Path,
    socket: &Path,
    limit: Duration,
) -> Result<(), TwinError> {
    vmm.end().await.map_err(TwinError::End)?;
    forget(cgroup, directory, socket, limit).await
}

fn retire(directory: &Path, socket: &Path) -> Result<(), TwinError> {
    vms::retire(directory, socket, &[LOG_FILE]).map_err(|source| directory_error(directory, source))
}

/// Starts a twin and waits until it answers Describe as a twin does.
///
/// # Errors
/// [`TwinError`]. What was created by then is removed; a failure of that is logged.
pub async fn start(plan: TwinPlan) -> Result<Twin, TwinError> {
    // The twins of tests show how they are started and ended, which not every machine lets a sandbox do.
    if plan.sandbox.is_none() && !cfg!(test) {
        return Err(TwinError::NoSandbox);
    }
    require_no_vm(&plan.directory)?;
    let cgroup = Cgroup::make(&plan.cgroup_root, &plan.cgroup_name).map_err(TwinError::Cgroup)?;
    let footprint = Footprint { cgroup, directory: plan.directory.clone(), socket: plan.socket.clone() };
    let started = match prepare(&plan) {
        Ok(folder) => start_in(&plan, &folder, footprint.clone()).await,
        Err(error) => Err(error),
    };
    if started.is_err()
        && let Err(left) = footprint.clear(plan.deadlines.quit).await
    {
        warn!(directory = %plan.directory.display(), %left, "something is left of a twin that did not start");
    }
    started
}

/// Creates the directory, and removes what an earlier twin may have left in it: its socket would be in the
/// way.
fn prepare(plan: &TwinPlan) -> Result<Folder, TwinError> {
    let directory = &plan.directory;
    retire(directory, &plan.socket)?;
    let user = plan.sandbox.as_ref().map(|sandbox| sandbox.user);
    let made = Folder::make(directory, user).and_then(|folder| {
        if let Some(socket) = folder.relative(&plan.socket) {
            folder.make_parents(socket, user)?;
        }
        Ok(folder)
    });
    made.map_err(|source| directory_error(directory, source))
}

async fn start_in(plan: &TwinPlan, folder: &Folder, footprint: Footprint) -> Result<Twin, TwinError> {
    let directory = plan.socket.parent().unwrap_or(&plan.directory);
    // Watched before the start: the socket may exist before the first look.
    let changes = FileEvents::watch(directory)
        .map_err(|source| TwinError::Watch { path: directory.to_owned(), source })?;
    let log = folder.create_own(LOG_FILE).map_err(|source| directory_error(&plan.log(), source))?;
    let launch = Launch {
        launcher: &plan.launcher,
        cgroup: &footprint.cgroup,
        directory: &footprint.directory,
        log,
        sandbox: plan.sandbox.as_ref(),
        descriptors: &plan.descriptors,
        program: &plan.program,
        arguments: &plan.arguments,
    };
    let mut child =
        launch.spawn().map_err(|LaunchError { program, source }| TwinError::Start { program, source })?;
    let deadline = Instant::now() + plan.start_limit;
    let mut last_seen = "it has not made its socket".to_owned();
    let answered = async {
        loop {
            match answer(plan, &footprint).await {
                Ok(answered) => return Ok(answered),
                Err(NotYet::NotListening(why)) => {
                    last_seen = why;
                    sleep(NOT_LISTENING_YET).await;
                }
                Err(NotYet::NoSocket(why)) => {
                    last_seen = why;
                    changes.next().await;
                }
                Err(NotYet::Never(error)) => return Err(error),
            }
        }
    };
    let program = plan.program.clone();
    let error = tokio::select! {
        answered = timeout_at(deadline, answered) => match answered {
            Ok(Ok((vmm, description))) => {
                info!(pid = vmm.pid(), program = %program.display(), vmm = description.vmm, "twin started");
                return Ok(Twin { vmm, description, footprint, _child: child });
            }
            Ok(Err(error)) => error,
            Err(_) => {
                let log = end_of(&plan.directory, LOG_FILE);
                TwinError::Silent { program, limit: plan.start_limit, reason: last_seen, log }
            }
        },
        status = child.wait() => match status {
            Ok(status) => TwinError::Ended { program, status, log: end_of(&plan.directory, LOG_FILE) },
            Err(source) => TwinError::Start { program: program.display().to_string(), source },
        },
    };
    // By its process first: it may not have entered its cgroup yet. It fails if the process has ended.
    let _ = child.kill().await;
    Err(error)
}

/// Why the twin has not answered yet.
enum NotYet {
    /// The socket does not exist, or is not usable: a change of that will be seen.
    NoSocket(String),
    /// The socket exists, but no process listens on it: a change of that cannot be seen.
    NotListening(String),
    /// It never will.
    Never(TwinError),
}

async fn answer(plan: &TwinPlan, footprint: &Footprint) -> Result<(Arc<dyn LocalVmm>, Description), NotYet> {
    let connected = super::connect(&plan.vmm, &plan.socket, &plan.directory, plan.deadlines).await;
    let vmm = connected.map_err(|error| match error {
        VmmError::Connect(_) if plan.socket.symlink_metadata().is_ok() => {
            NotYet::NotListening(error.to_string())
        }
        other => NotYet::NoSocket(other.to_string()),
    })?;
    let never = |reason: String| NotYet::Never(TwinError::NotTheTwin { socket: plan.socket.clone(), reason });
    let processes = footprint.cgroup.processes().map_err(|error| NotYet::Never(TwinError::Cgroup(error)))?;
    if !processes.contains(&vmm.pid()) {
        return Err(never(format!("process {} is not in {}", vmm.pid(), footprint.cgroup.path().display())));
    }
    let description = vmm.describe().await.map_err(|error| match error {
        // It has just ended; its exit status follows.
        VmmError::Lost { .. } => NotYet::NoSocket(error.to_string()),
        other => never(other.to_string()),
    })?;
    if description.run_state != RunState::Incoming {
        return Err(never(format!("its VM is {:?}, and must be Incoming", description.run_state)));
    }
    Ok((vmm, description))
}

#[cfg(test)]
#[path = "twin_tests.rs"]
mod tests;
