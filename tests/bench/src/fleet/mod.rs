//! A fleet at once: the operator's program and a real API server, with simulated agents ([`agents`]).
//!
//! All migrations are created at one instant. Measured of the operator's process, from then until the last of
//! them has ended and lost its finalizer: its peak of resident memory and its processor time. Its requests are
//! counted in the API server's audit log. The API server, etcd and the agents share the machine's processors
//! with it: times depend on the machine, memory and counts hardly do.

pub mod agents;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::{StreamExt, TryStreamExt};
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use slackwater_api::{
    MIGRATION_FINALIZER, MigrationNode, MigrationNodeSpec, Target, VMMigration, VMMigrationSpec,
};
use slackwater_lab::cluster::has_condition;
use slackwater_lab::control_plane::{AuditEvent, ControlPlane};
use slackwater_lab::host::workspace_program;
use slackwater_lab::{Lab, LabConfig, Pki};
use tokio::process::{Child, Command};

use agents::{Agents, node_name, vm_name};

const NAMESPACE: &str = "demo";
const SYSTEM: &str = "slackwater-system";
const ACCOUNT: &str = "slackwater-operator";
/// How many objects are created at a time.
const AT_A_TIME: usize = 32;
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// USER_HZ, what /proc counts processor time in.
const TICKS_PER_SECOND: f64 = 100.0;

/// The size of a fleet.
#[derive(Debug, Clone)]
pub struct Size {
    /// How many nodes.
    pub nodes: usize,
    /// How many migrations at once, each of a VM of its own.
    pub migrations: usize,
    /// How many migrations have ended long before.
    pub ended: usize,
}

/// How a run is made.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long each pre-copy takes.
    pub pre_copy: Duration,
    /// How long the whole run may take.
    pub timeout: Duration,
    /// The operator's program; by default the one that is built beside this program.
    pub operator: Option<PathBuf>,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Peak of the operator's resident memory, before the migrations were created.
    pub idle_mib: f64,
    /// The same during the migrations.
    pub peak_mib: f64,
    /// The operator's processor time during the migrations.
    pub cpu_s: f64,
    /// Requests that write to VMMigrations, and events about them, for each.
    pub writes: f64,
    /// Of these, events.
    pub events: f64,
    /// Requests that write to AssignedVMs and MigrationNodes, for each migration.
    pub reports: f64,
    /// Answers 429.
    pub too_many: usize,
    /// The operator lost its Lease, or ended.
    pub lease_lost: bool,
    /// From the first creation until the last migration has ended.
    pub took: Duration,
}

/// Runs one fleet.
///
/// # Errors
/// When it does not come to its end in time.
pub async fn run(size: &Size, settings: &Settings) -> anyhow::Result<Figures> {
    let lab = Lab::start(LabConfig::default().with_control_plane()).await?;
    let plane = lab.control_plane()?;
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/slackwater");
    plane.helm_install("slackwater", &chart, SYSTEM, &[]).await?;
    plane.kubectl(&["create", "namespace", NAMESPACE]).await?;
    let kubeconfig = plane.service_account_kubeconfig(SYSTEM, ACCOUNT).await?;
    let client = plane.client().await?;
    let pki = Pki::new("bench")?;
    pki.operator()?.write(lab.folder(), "operator")?;
    let (nodes, vms) = (size.nodes, size.migrations);
    let agents = Agents::start(&pki, lab.folder(), NAMESPACE, nodes, vms, settings.pre_copy).await?;

    create_ended(&client, size.ended).await?;
    for (name, address) in &agents.addresses {
        let spec =
            MigrationNodeSpec { address: address.clone(), peer_address: None, accept_epoch_up_to: None };
        let api: Api<MigrationNode> = Api::all(client.clone());
        api.create(&PostParams::default(), &MigrationNode::new(name, spec)).await?;
    }
    let mut operator = start_operator(settings, lab.folder(), &kubeconfig)?;
    all_migratable(&client, size.migrations).await?;

    let pid = operator.id().context("the operator has ended")?;
    let idle_mib = peak_mib(pid)?;
    // Begins the peak anew (proc(5)).
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
    let (cpu_before, requests_before) = (cpu_s(pid)?, plane.audit()?.len());
    let began = Instant::now();
    let measured = tokio::time::timeout(settings.timeout, async {
        let (created, ended) = tokio::join!(create(&client, size), all_ended(&client, size.migrations));
        created.and(ended)
    });
    let measured = measured.await.context("the migrations have not ended in time").and_then(|ended| ended);
    let took = began.elapsed();
    let lease_lost = operator.try_wait()?.is_some();
    if let Err(error) = measured {
        let log = std::fs::read_to_string(lab.folder().join("operator.log")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(20).collect();
        bail!(
            "{error:#}; lease lost: {lease_lost}; the operator's last words, newest first:\n{}",
            last.join("\n")
        );
    }
    let (peak_mib, cpu) = match lease_lost {
        true => (f64::NAN, f64::NAN),
        false => (peak_mib(pid)?, cpu_s(pid)? - cpu_before),
    };
    let requests = own_requests(plane, requests_before)?;
    operator.kill().await.ok();
    let count = |is: &dyn Fn(&AuditEvent) -> bool| requests.iter().filter(|request| is(request)).count();
    let for_each = |count: usize| count as f64 / size.migrations as f64;
    let events = count(&|request| request.resource == "events" && is_write(request));
    let migrations = count(&|request| request.resource.starts_with("vmmigrations") && is_write(request));
    let others = ["assignedvms", "migrationnodes"];
    let reports = count(&|request| {
        others.iter().any(|resource| request.resource.starts_with(resource)) && is_write(request)
    });
    Ok(Figures {
        idle_mib,
        peak_mib,
        cpu_s: cpu,
        writes: for_each(migrations + events),
        events: for_each(events),
        reports: for_each(reports),
        too_many: count(&|request| request.status == 429),
        lease_lost,
        took,
    })
}

fn is_write(request: &AuditEvent) -> bool {
    matches!(request.verb.as_str(), "create" | "update" | "patch" | "delete")
}

/// The operator's requests since there were so many in the log.
fn own_requests(plane: &ControlPlane, since: usize) -> anyhow::Result<Vec<AuditEvent>> {
    let account = format!("system:serviceaccount:{SYSTEM}:{ACCOUNT}");
    Ok(plane.audit()?.into_iter().skip(since).filter(|request| request.user == account).collect())
}

fn start_operator(settings: &Settings, folder: &Path, kubeconfig: &Path) -> anyhow::Result<Child> {
    let program = match &settings.operator {
        Some(program) => program.clone(),
        None => workspace_program("slackwater-operator")?,
    };
    let log = std::fs::File::create(folder.join("operator.log"))?;
    let file = |name: &str| folder.join(name);
    Ok(Command::new(program)
        .arg("run")
        .arg("--tls-cert")
        .arg(file("operator.crt"))
        .arg("--tls-key")
        .arg(file("operator.key"))
        .arg("--tls-ca")
        .arg(file("ca.crt"))
        .env("KUBECONFIG", kubeconfig)
        .env("NO_COLOR", "1")
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()?)
}

/// Waits until every VM is shown as one that can be migrated.
async fn all_migratable(client: &Client, vms: usize) -> anyhow::Result<()> {
    let api: Api<slackwater_api::AssignedVM> = Api::namespaced(client.clone(), NAMESPACE);
    let all = async {
        let mut changes = pin!(watcher(api, watcher::Config::default()).applied_objects());
        let mut ready = BTreeSet::new();
        while ready.len() < vms {
            let vm = changes.try_next().await?.context("the watch has ended")?;
            let conditions = vm.status.as_ref().map_or(&[][..], |status| &status.conditions);
            if has_condition(conditions, "Migratable", "True") == Some(true) {
                ready.insert(vm.name_any());
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(READY_TIMEOUT, all).await.context("not all VMs were shown in time")?
}

fn migration(number: usize, size: &Size) -> VMMigration {
    let target = node_name((number + 1) % size.nodes);
    let spec = VMMigrationSpec {
        target: Some(Target { node_name: target }),
        ..VMMigrationSpec::new(&vm_name(number))
    };
    VMMigration::new(&format!("move-{number:05}"), spec)
}

async fn create(client: &Client, size: &Size) -> anyhow::Result<()> {
    let api: Api<VMMigration> = Api::namespaced(client.clone(), NAMESPACE);
    let creating = (0..size.migrations).map(|number| {
        let api = api.clone();
        async move { api.create(&PostParams::default(), &migration(number, size)).await }
    });
    futures::stream::iter(creating).buffer_unordered(AT_A_TIME).try_for_each(|_| async { Ok(()) }).await?;
    Ok(())
}

/// Waits until so many migrations that are not of old have succeeded and lost their finalizers.
async fn all_ended(client: &Client, migrations: usize) -> anyhow::Result<()> {
    let api: Api<VMMigration> = Api::namespaced(client.clone(), NAMESPACE);
    let mut changes = pin!(watcher(api, watcher::Config::default()).default_backoff().applied_objects());
    let mut ended = BTreeSet::new();
    while ended.len() < migrations {
        let Some(changed) = changes.next().await else { bail!("the watch has ended") };
        let Ok(migration) = changed else { continue };
        if !migration.name_any().starts_with("move-") {
            continue;
        }
        let conditions = migration.status.as_ref().map_or(&[][..], |status| &status.conditions);
        if has_condition(conditions, "Succeeded", "False") == Some(true) {
            bail!("{} has failed: {conditions:#?}", migration.name_any());
        }
        let is_held = migration.finalizers().iter().any(|finalizer| finalizer == MIGRATION_FINALIZER);
        if has_condition(conditions, "Succeeded", "True") == Some(true) && !is_held {
            ended.insert(migration.name_any());
        }
    }
    Ok(())
}

/// Creates migrations that have succeeded, as an operator leaves them.
async fn create_ended(client: &Client, count: usize) -> anyhow::Result<()> {
    let api: Api<VMMigration> = Api::namespaced(client.clone(), NAMESPACE);
    let message = "VM demo/old runs on node-0001. The guest stood still for 87.412ms at most.";
    let time = "2026-01-01T00:00:00Z";
    let condition = |type_: &str, reason: &str| {
        json!({
            "type": type_, "status": "True", "reason": reason, "message": message, "lastTransitionTime": time,
        })
    };
    let phases =
        ["CONNECTED", "PRE_COPY", "PAUSING", "CAPTURING", "LOADED", "COMMITTED", "STARTED", "RELEASED"];
    let timeline: Vec<_> = phases
        .iter()
        .map(|phase| {
            let time = "2026-01-01T00:00:00.000000Z";
            json!({"phase": phase, "node": "node-0000", "elapsed": "1ms", "time": time})
        })
        .collect();
    let creating = (0..count).map(|number| {
        let (api, timeline) = (api.clone(), timeline.clone());
        let spec = VMMigrationSpec::new(&format!("old-{number:05}"));
        let status = json!({"status": {
            "phase": "Succeeded",
            "conditions": [
                condition("Accepted", "Planned"), condition("Prepared", "Reserved"),
                condition("Stopped", "SlackWater"), condition("Committed", "PointOfNoReturn"),
                condition("Succeeded", "VMRunsAtTarget"),
            ],
            "observedSpec": spec,
            "sourceNode": "node-0000", "targetNode": "node-0001", "targetAddress": "127.0.0.1:1",
            "attempt": 1, "reservation": "Used", "startTime": time, "completionTime": time,
            "timeline": timeline,
        }});
        async move {
            let name = format!("old-{number:05}");
            api.create(&PostParams::default(), &VMMigration::new(&name, spec)).await?;
            api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await
        }
    });
    futures::stream::iter(creating).buffer_unordered(AT_A_TIME).try_for_each(|_| async { Ok(()) }).await?;
    Ok(())
}

/// The peak of a process's resident memory.
fn peak_mib(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// The processor time that a process has used.
fn cpu_s(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // After the name, which may have spaces: field 3 is the first, utime is 14, stime 15 (proc(5)).
    let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
    let ticks =
        |index: usize| -> anyhow::Result<f64> { Ok(fields.get(index).context("too short")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}
