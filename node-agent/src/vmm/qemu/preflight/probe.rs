//! What a QEMU of this node offers: its program is run once, without a machine, and queried.
//!
//! It is started as a twin is (its own session and control group, umask, no shell), from a folder of its own,
//! and its group is killed when it has answered, or has not in time. Under KVM a program without a machine
//! makes an empty VM and no vCPU.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;
use std::{fs, io};

use serde_json::{Value, json};
use tokio::process::Child;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::{Accelerator, MachineType, Offer, features};
use crate::process::cgroup::{Cgroup, CgroupError, error_chain};
use crate::process::file_events::FileEvents;
use crate::process::folder::Folder;
use crate::process::launch::{Launch, LaunchError, NOT_LISTENING_YET, end_of};
use crate::vmm::VmmError;
use crate::vmm::qemu::OWNERS_ONLY;
use crate::vmm::qemu::qmp::commands::{
    CpuModel, CpuModelExpansionType, QomListProperties, QueryCpuModelExpansion, QueryMachines,
};
use crate::vmm::qemu::qmp::{QmpClient, QmpError};
use crate::vmm::server::trust;

/// Its folder in the run directory.
const FOLDER: &str = "probe";
/// Its output, there.
const LOG: &str = "log";
/// How long its processes may take to end when they are killed.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// The model with all features that there are.
const MODEL: &str = "max";

/// Queries programs, one at a time: the group and the folder are the same for all.
#[derive(Clone, Debug)]
pub struct Prober {
    /// The command that becomes the program: [`launcher`](crate::vmm::twin::launcher).
    pub launcher: Vec<OsString>,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// The cgroup's name; no twin has it.
    pub cgroup_name: String,
    /// The agent's run directory.
    pub run_dir: PathBuf,
    /// How long it may take to answer everything.
    pub limit: Duration,
}

/// A program could not be queried.
#[derive(Debug, thiserror::Error)]
#[error("{program}, run without a machine, could not be asked: {cause}{}", quote_log(log))]
pub struct ProbeError {
    program: PathBuf,
    cause: ProbeCause,
    /// The end of its log.
    log: String,
}

/// What failed.
#[derive(Debug, thiserror::Error)]
enum ProbeCause {
    #[error("{}", error_chain(.0))]
    Cgroup(#[from] CgroupError),
    #[error("{}: {source}", folder.display())]
    MakeFolder { folder: PathBuf, source: io::Error },
    #[error("{}: {source}", folder.display())]
    Watch { folder: PathBuf, source: notify::Error },
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("it ended before it had answered: {0}")]
    Ended(ExitStatus),
    #[error(transparent)]
    Wait(io::Error),
    #[error("it did not answer within {} ms", .0.as_millis())]
    Silent(Duration),
    #[error(transparent)]
    Trust(#[from] VmmError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{} is served by process {pid:?}, which is not the one that was started", socket.display())]
    OtherProcess { socket: PathBuf, pid: Option<u32> },
}

fn quote_log(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("; it said: {}", log.replace('\n', " / ")) }
}

impl Prober {
    /// Queries a program, which the caller has checked to be allowed. Nothing of it is left.
    ///
    /// # Errors
    /// [`ProbeError`]
    pub async fn ask(&self, program: &Path, accelerator: Accelerator) -> Result<Offer, ProbeError> {
        let error = |cause, log| ProbeError { program: program.to_owned(), cause, log };
        self.clear().await.map_err(|cause| error(cause.into(), String::new()))?;
        let asked = timeout(self.limit, self.run(program, accelerator)).await;
        let asked = asked.unwrap_or(Err(ProbeCause::Silent(self.limit)));
        let log = if asked.is_err() { end_of(&self.folder(), LOG) } else { String::new() };
        if let Err(error) = self.clear().await {
            warn!(
                error = error_chain(&error),
                "something is left of a QEMU that was started only to query it"
            );
        }
        asked.map_err(|cause| error(cause, log))
    }

    /// Removes what an agent that died may have left.
    ///
    /// # Errors
    /// [`CgroupError`]
    pub async fn clear(&self) -> Result<(), CgroupError> {
        Cgroup::with_name(&self.cgroup_root, &self.cgroup_name)?.clear(KILL_LIMIT).await?;
        // A folder that cannot be removed makes the next query fail, with an error.
        let _ = fs::remove_dir_all(self.folder());
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.run_dir.join(FOLDER)
    }

    async fn run(&self, program: &Path, accelerator: Accelerator) -> Result<Offer, ProbeCause> {
        let folder = self.folder();
        let log = Folder::make(&folder, None).and_then(|folder| folder.create_own(LOG));
        let log = log.map_err(|source| ProbeCause::MakeFolder { folder: folder.clone(), source })?;
        let cgroup = Cgroup::make(&self.cgroup_root, &self.cgroup_name)?;
        let socket = folder.join("qmp.sock");
        // Watched before the start: the socket may exist before the first look.
        let changes = FileEvents::watch(&folder)
            .map_err(|source| ProbeCause::Watch { folder: folder.clone(), source })?;
        let launch = Launch {
            launcher: &self.launcher,
            cgroup: &cgroup,
            directory: &folder,
            log,
            sandbox: None,
            descriptors: &[],
            program,
            arguments: &arguments(&socket, accelerator),
        };
        let mut child = launch.spawn()?;
        let asked = tokio::select! {
            asked = ask_on(&socket, &changes, &cgroup) => asked,
            ended = child.wait() => Err(match ended {
                Ok(status) => ProbeCause::Ended(status),
                Err(error) => ProbeCause::Wait(error),
            }),
        };
        end(child).await;
        asked
    }
}

/// By its process first: it may not have entered its cgroup yet.
async fn end(mut child: Child) {
    // It fails if the process has ended.
    let _ = child.kill().await;
}

fn arguments(socket: &Path, accelerator: Accelerator) -> Vec<String> {
    let mut list = ["-nodefaults", "-no-user-config", "-display", "none", "-S", "-machine", "none"].to_vec();
    list.extend(["-accel", accelerator.as_str()]);
    if accelerator == Accelerator::Kvm {
        // A guest that was given MWAIT and UMWAIT sees them; without this KVM does not offer them.
        list.extend(["-overcommit", "cpu-pm=on"]);
    }
    let mut list: Vec<String> = list.into_iter().map(str::to_owned).collect();
    list.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())]);
    list
}

async fn ask_on(socket: &Path, changes: &FileEvents, cgroup: &Cgroup) -> Result<Offer, ProbeCause> {
    let qmp = loop {
        if !socket.exists() {
            changes.next().await;
            continue;
        }
        trust(socket, OWNERS_ONLY)?;
        match QmpClient::connect(socket).await {
            Ok(qmp) => break qmp,
            Err(QmpError::Connect { .. }) => sleep(NOT_LISTENING_YET).await,
            Err(error) => return Err(error.into()),
        }
    };
    let pid = qmp.peer().pid().and_then(|pid| u32::try_from(pid).ok());
    let processes = cgroup.processes()?;
    if !pid.is_some_and(|pid| processes.contains(&pid)) {
        return Err(ProbeCause::OtherProcess { socket: socket.to_owned(), pid });
    }
    Ok(ask(&qmp).await?)
}

/// Queries a QEMU without a machine.
///
/// # Errors
/// Any [`QmpError`].
pub(super) async fn ask(qmp: &QmpClient) -> Result<Offer, QmpError> {
    let version = qmp.version().qemu;
    let machines = qmp.execute(QueryMachines).await?;
    let expansion = QueryCpuModelExpansion {
        expansion: CpuModelExpansionType::Full,
        // Those that forbid a migration unless more is set (invtsc), too: the guest would not have come so
        // far with them otherwise.
        model: CpuModel { name: MODEL.to_owned(), props: Some(json!({"migratable": false})) },
    };
    let expanded = qmp.execute(expansion).await?.model;
    let typename = format!("{MODEL}-x86_64-cpu");
    let properties = qmp.execute(QomListProperties { typename }).await?;
    let props = expanded.get("props");
    let is_set = |name: &String| props.and_then(|props| props.get(name)) == Some(&Value::Bool(true));
    let cpu_features =
        features::names(&properties).iter().filter(|name| is_set(name)).map(|n| features::plain(n)).collect();
    let machine = |machine: crate::vmm::qemu::qmp::commands::MachineInfo| MachineType {
        name: machine.name,
        alias: machine.alias,
        is_default: machine.is_default,
    };
    Ok(Offer {
        version: version.to_string(),
        machines: machines.into_iter().map(machine).collect(),
        cpu_features: Some(cpu_features),
    })
}
