//! What a QEMU of this node has: its program is run once, without a machine, and asked.
//!
//! It is started as a twin is (its own session and control group, umask, no shell), from a folder of its own, and its group is killed
//! when it has answered, or has not in time. Under KVM a program without a machine makes an empty VM and no vCPU.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Child;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::{Accelerator, MachineType, Offer, features};
use crate::process::cgroup::{Cgroup, CgroupError};
use crate::process::file_events::FileEvents;
use crate::process::launch::{Launch, NOT_LISTENING_YET, end_of};
use crate::vmm::qemu::OWNERS_ONLY;
use crate::vmm::qemu::qmp::commands::{
    CpuModel, CpuModelExpansionType, QomListProperties, QueryCpuModelExpansion, QueryMachines,
};
use crate::vmm::qemu::qmp::{QmpClient, QmpError};
use crate::vmm::server::trust;

/// Its folder in the run directory.
const FOLDER: &str = "probe";
/// How long its processes may take to go when they are killed.
const GOING: Duration = Duration::from_secs(5);
/// The model with all features that there are.
const MODEL: &str = "max";

/// How programs are asked. One at a time: the group and the folder are the same for all.
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
    /// Within so long it must have answered everything.
    pub limit: Duration,
}

/// Why a program could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("{program}, run without a machine, could not be asked: {reason}{}", log_words(log))]
pub struct ProbeError {
    program: PathBuf,
    reason: String,
    /// The end of what it said.
    log: String,
}

fn log_words(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("; it said: {}", log.replace('\n', " / ")) }
}

impl Prober {
    /// Asks a program, which the caller has checked to be allowed. Nothing of it is left.
    ///
    /// # Errors
    /// [`ProbeError`]
    pub async fn ask(&self, program: &Path, accelerator: Accelerator) -> Result<Offer, ProbeError> {
        let failed = |reason: String, log| ProbeError { program: program.to_owned(), reason, log };
        self.clear().await.map_err(|error| failed(words(&error), String::new()))?;
        let asked = match timeout(self.limit, self.run(program, accelerator)).await {
            Ok(asked) => asked,
            Err(_) => Err(format!("it did not answer within {} ms", self.limit.as_millis())),
        };
        let log = if asked.is_err() { end_of(&self.log()) } else { String::new() };
        if let Err(error) = self.clear().await {
            warn!(error = words(&error), "something is left of a QEMU that was only asked what it can do");
        }
        asked.map_err(|reason| failed(reason, log))
    }

    /// Ends what an agent that died meanwhile may have left.
    ///
    /// # Errors
    /// [`CgroupError`]
    pub async fn clear(&self) -> Result<(), CgroupError> {
        Cgroup::named(&self.cgroup_root, &self.cgroup_name)?.clear(GOING).await?;
        // What cannot be removed is in the way of the next one, which says so.
        let _ = fs::remove_dir_all(self.folder());
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.run_dir.join(FOLDER)
    }

    fn log(&self) -> PathBuf {
        self.folder().join("log")
    }

    async fn run(&self, program: &Path, accelerator: Accelerator) -> Result<Offer, String> {
        let (folder, log) = (self.folder(), self.log());
        let at = |what: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", what.display());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|e| at(&folder, &e))?;
        let cgroup = Cgroup::make(&self.cgroup_root, &self.cgroup_name).map_err(|error| words(&error))?;
        let socket = folder.join("qmp.sock");
        // Watched before the start: the socket may be there before anybody looks.
        let changes = FileEvents::watch(&folder).map_err(|error| at(&folder, &error))?;
        let launch = Launch {
            launcher: &self.launcher,
            cgroup: &cgroup,
            directory: &folder,
            log: &log,
            descriptors: &[],
            program,
            arguments: &arguments(&socket, accelerator),
        };
        let mut child = launch.spawn().map_err(|error| error.to_string())?;
        let asked = tokio::select! {
            asked = ask_on(&socket, &changes, &cgroup) => asked,
            ended = child.wait() => Err(match ended {
                Ok(status) => format!("it ended before it had answered: {status}"),
                Err(error) => error.to_string(),
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

fn words(error: &CgroupError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
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

async fn ask_on(socket: &Path, changes: &FileEvents, cgroup: &Cgroup) -> Result<Offer, String> {
    let qmp = loop {
        if !socket.exists() {
            changes.next().await;
            continue;
        }
        trust(socket, OWNERS_ONLY).map_err(|error| error.to_string())?;
        match QmpClient::connect(socket).await {
            Ok(qmp) => break qmp,
            Err(QmpError::Connect { .. }) => sleep(NOT_LISTENING_YET).await,
            Err(error) => return Err(error.to_string()),
        }
    };
    let processes = cgroup.processes().map_err(|error| words(&error))?;
    let server = qmp.peer().pid().and_then(|pid| u32::try_from(pid).ok());
    if !server.is_some_and(|pid| processes.contains(&pid)) {
        return Err(format!(
            "{} is served by process {server:?}, which is not the one that was started",
            socket.display()
        ));
    }
    ask(&qmp).await.map_err(|error| error.to_string())
}

/// Asks a QEMU without a machine.
///
/// # Errors
/// Any [`QmpError`].
pub(super) async fn ask(qmp: &QmpClient) -> Result<Offer, QmpError> {
    let version = qmp.version().qemu;
    let machines = qmp.execute(QueryMachines).await?;
    let expansion = QueryCpuModelExpansion {
        expansion: CpuModelExpansionType::Full,
        // Those that forbid a migration unless more is set (invtsc), too: the guest would not have come so far with them otherwise.
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
        version: format!("{}.{}.{}", version.major, version.minor, version.micro),
        machines: machines.into_iter().map(machine).collect(),
        cpu_features: Some(cpu_features),
    })
}
