//! An agent that begins again reads its journals before it serves, finds each VM and its devices, and goes on.
//!
//! A VMM is the one that was journalled if boot id, process number and start time are: then its devices are borrowed and read back,
//! and the pure machine decides what follows. A journal that cannot be read, or is of something else, is told and held: whoever
//! asks for that migration hears which file it is, and nothing is guessed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::destination::End as DestinationEnd;
use slackwater_handover::policy::{StopPlan, stop_plan};
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Failure, Reason, Record};
use slackwater_proto::tls::Credentials;
use slackwater_proto::transfer::Attempt;
use tracing::{error, info, warn};

use super::inventory::Inventory;
use super::node::{Left, give_back_destination, give_back_source, release};
use super::registry::{Part, Registry};
use super::{NodeConfig, borrowing, journalling, reservation};
use crate::attempt::destination::{self as destination_shell, DestinationParts, DestinationRun, Site, Twin};
use crate::attempt::entry::{EndEntry, Ended, Entry, Marks, Process};
use crate::attempt::events::EventLog;
use crate::attempt::ledger::Ledger;
use crate::attempt::link::Peer;
use crate::attempt::source::{self as source_shell, SourceParts, SourceRun};
use crate::host::clock::Clock;
use crate::host::devices::vfio_devices;
use crate::host::identity::VfIdentity;
use crate::host::node::kernel;
use crate::host::vm::{self, VmmEntry};
use crate::host::vms::{self, KnownVm};
use crate::journal::{Content, Journal, JournalError, Key, Role};
use crate::process::cgroup::Cgroup;
use crate::vfio::borrow::VmmProcess;
use crate::vfio::worker::DeviceHandle;
use crate::vmm::budget::Budget;
use crate::vmm::gone::GoneVmm;
use crate::vmm::{self, Description, LocalVmm, Vmm, VmmError, twin};

/// Attempts that have ended and are still remembered, so that a late question gets its answer.
const REMEMBERED: usize = super::registry::REMEMBERED;
/// Between two tries to reach a VMM whose process lives, or its devices.
const AGAIN: Duration = Duration::from_secs(1);
/// An attempt without a limit of its own: what is left of it before the commit is the way back.
const NO_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What recovering needs of the agent.
#[derive(Clone)]
pub(super) struct Around {
    pub(super) config: NodeConfig,
    pub(super) credentials: Arc<Credentials>,
    pub(super) inventory: Arc<Inventory>,
    pub(super) registry: Arc<Registry>,
    pub(super) journal: Arc<Journal>,
    pub(super) vf_identity: Arc<dyn VfIdentity>,
}

/// Takes up everything that stands in the journal. What takes time goes on after this returns; it is held from now on.
pub(super) async fn recover(around: Around) -> Result<(), JournalError> {
    let journal = Arc::clone(&around.journal);
    let read = tokio::task::spawn_blocking(move || {
        let finished =
            |_: &Key, content: &Content| Entry::parse(content).is_ok_and(|entry| entry.ended.is_some());
        if let Err(error) = journal.prune(REMEMBERED, finished) {
            warn!(%error, "old journals could not be removed");
        }
        let epoch = journal.epoch().unwrap_or_else(|error| {
            error!(%error, "the highest operator epoch cannot be read; the next operator's counts");
            0
        });
        journal.read_all().map(|entries| (epoch, entries))
    });
    let (epoch, entries) = match read.await {
        Ok(read) => read?,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    around.registry.restore_epoch(epoch);
    for (key, content) in entries {
        match understand(&key, content) {
            Ok(entry) => take_up(&around, key, entry),
            Err(why) => {
                error!(
                    migration = key.id(),
                    why, "a journal cannot be used; whatever it is about is left as it is"
                );
                around.registry.hold_unreadable(key.id(), why);
            }
        }
    }
    Ok(())
}

/// The entry of a journal, if it is what its name says.
fn understand(key: &Key, content: Result<Content, JournalError>) -> Result<Entry, String> {
    let content =
        content.map_err(|error| format!("the journal of this migration cannot be read: {error}"))?;
    let entry = Entry::parse(&content)
        .map_err(|error| format!("the journal {key} is not one of this agent's version: {error}"))?;
    let role = match entry.end {
        EndEntry::Source { .. } => Role::Source,
        EndEntry::Destination { .. } => Role::Destination,
    };
    if entry.migration_id != key.id() || role != key.role() {
        return Err(format!(
            "the journal {key} is of another migration: it says {}.{}, VM {}/{}",
            entry.migration_id,
            role.as_str(),
            entry.namespace,
            entry.name
        ));
    }
    Ok(entry)
}

fn take_up(around: &Around, key: Key, entry: Entry) {
    let reference = journalling::reference_of(&entry);
    if let Some(ended) = &entry.ended {
        let ledger = Ledger::ended(&entry);
        let part = match journalling::reservation_of(&entry) {
            None => Part::Source(SourceRun::over(log_of_ended(&around.config.node, &entry, ended), ledger)),
            Some(request) => {
                Part::Destination(DestinationRun::over(ledger, end_of(&entry)), Box::new(request))
            }
        };
        around.registry.join(&reference, part);
        return;
    }
    info!(migration = entry.migration_id, record = ?entry.record, "taking up what an earlier agent began");
    hold(around, &entry);
    around.registry.join(&reference, Part::Recovering);
    let around = around.clone();
    tokio::spawn(async move {
        let id = entry.migration_id.clone();
        let taken_up = match key.role() {
            Role::Source => source(&around, key, entry).await,
            Role::Destination => destination(&around, key, entry).await,
        };
        if let Err(why) = taken_up {
            error!(
                migration = id,
                why, "a migration cannot be taken up; whatever it is about is left as it is"
            );
            around.registry.hold_unreadable(&id, why);
        }
    });
}

fn hold(around: &Around, entry: &Entry) {
    let names = entry.devices.iter().map(|pair| match entry.end {
        EndEntry::Source { .. } => pair.source.as_str(),
        EndEntry::Destination { .. } => pair.target.as_str(),
    });
    let names: Vec<&str> = names.collect();
    if let Err(held) = around.registry.take(&entry.migration_id, &journalling::vm_of(entry), names) {
        warn!(migration = entry.migration_id, %held, "two unfinished journals are about the same");
    }
}

fn log_of_ended(node: &str, entry: &Entry, ended: &Ended) -> EventLog {
    let log = EventLog::new(node);
    let at = Clock { unix_ns: entry.recorded_unix_ns, ..Clock::now() };
    log.finished(at, ended.to_finished(entry.failure.as_ref()));
    log
}

fn end_of(entry: &Entry) -> DestinationEnd {
    let failure = entry.failure().unwrap_or_else(restarted);
    match entry.record {
        Record::Running => DestinationEnd::Running,
        Record::Starting => DestinationEnd::Stuck(failure),
        _ => DestinationEnd::Discarded(failure),
    }
}

fn restarted() -> Failure {
    Failure::new(
        Reason::AgentRestarted,
        "the agent ended in the middle of the migration, and was started again",
    )
}

async fn reopen(around: &Around, key: &Key, entry: &Entry) -> Result<Ledger, String> {
    let (journal, reopened) = (Arc::clone(&around.journal), key.clone());
    let file = tokio::task::spawn_blocking(move || journal.reopen(&reopened)).await;
    let file = file.map_err(|error| error.to_string())?;
    let file = file.map_err(|error| format!("the journal cannot be written any more: {error}"))?;
    Ok(Ledger::go_on(Arc::clone(&around.journal), key.clone(), file, entry.clone()))
}

async fn source(around: &Around, key: Key, entry: Entry) -> Result<(), String> {
    let EndEntry::Source { target_node, target_address, cgroup, marks } = &entry.end else { return Ok(()) };
    let ledger = reopen(around, &key, &entry).await?;
    let known = around.inventory.vm(&journalling::vm_of(&entry));
    let known = known.and_then(|vm| Some((vm.directory, vm.vm.ok()?)));
    let directory = vms::directory_of(&around.config.run_dir, &entry.namespace, &entry.name);
    let found = match &known {
        Some((_, known)) => holder(&Way::Vm(known), around, entry.vmm.as_ref()).await,
        None => None,
    };
    let left = Left {
        cgroup: cgroup.as_ref().and_then(|name| Cgroup::named(&around.config.cgroup_root, name).ok()),
        socket: known.map(|(_, known)| known.socket).unwrap_or_else(|| directory.join("vmm.sock")),
        directory,
    };
    let peer = Peer {
        credentials: Arc::clone(&around.credentials),
        node: target_node.clone(),
        address: target_address.clone(),
        attempt: Attempt { migration_id: entry.migration_id.clone(), attempt: entry.attempt },
    };
    let same_boot = entry
        .vmm
        .as_ref()
        .is_some_and(|process| kernel(Path::new("/proc")).is_ok_and(|now| now.boot_id == process.boot_id));
    let recovered = |found, vmm_gone| source_shell::Recovered {
        record: entry.record,
        found,
        failure: entry.failure().unwrap_or_else(restarted),
        vmm_gone,
        marks: if same_boot { *marks } else { Marks::default() },
    };
    let log = EventLog::new(&around.config.node);
    let parts = match found {
        Some((vmm, devices, states)) => {
            let features: Vec<_> = devices.iter().map(DeviceHandle::features).collect();
            let release = release(
                Arc::clone(&vmm),
                left,
                &around.config,
                Arc::clone(&around.vf_identity),
                &entry.migration_id,
            );
            SourceParts {
                peer,
                vmm: vmm as Arc<dyn Vmm>,
                devices,
                plan: stop_plan(&features, entry.peer_to_peer()).unwrap_or(StopPlan::QuiesceFirst),
                features,
                ledger,
                recovered: Some(recovered(states, false)),
                pre_commit_timeout: NO_LIMIT,
                budget: Budget::default(),
                release,
                log,
            }
        }
        None => {
            warn!(migration = entry.migration_id, "the VMM's process is not there any more");
            let limit = around.config.deadlines.quit;
            SourceParts {
                peer,
                vmm: Arc::new(GoneVmm),
                devices: Vec::new(),
                features: Vec::new(),
                plan: StopPlan::Alone,
                ledger,
                recovered: Some(recovered(Vec::new(), true)),
                pre_commit_timeout: NO_LIMIT,
                budget: Budget::default(),
                release: Box::new(move || {
                    Box::pin(async move {
                        let Left { cgroup, directory, socket } = left;
                        if let Err(error) = twin::forget(cgroup.as_ref(), &directory, &socket, limit).await {
                            warn!(%error, "the VM runs elsewhere, but something of it is left here");
                        }
                    })
                }),
                log,
            }
        }
    };
    let run = SourceRun::start(parts);
    around.registry.join(&journalling::reference_of(&entry), Part::Source(run.clone()));
    give_back_source(&around.registry, &run, entry.migration_id);
    Ok(())
}

async fn destination(around: &Around, key: Key, entry: Entry) -> Result<(), String> {
    let Some(request) = journalling::reservation_of(&entry) else { return Ok(()) };
    let ledger = reopen(around, &key, &entry).await?;
    let all = tokio::task::spawn_blocking(|| vfio_devices(Path::new("/sys"))).await;
    let all = all.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?.devices;
    let named =
        |pair: &crate::attempt::entry::Pair| all.iter().find(|device| device.name == pair.target).cloned();
    let devices: Vec<_> = entry.devices.iter().filter_map(named).collect();
    let json =
        vm::parse(&request.vm_json).map_err(|error| format!("vm_json in the journal {key}: {error}"))?;
    let directory = vms::directory(&around.config.run_dir, &json);
    let socket = json.socket_in(&directory).map_err(|error| error.to_string())?;
    let site = reservation::site(
        &around.config,
        Arc::clone(&around.vf_identity),
        &journalling::reference_of(&entry),
        &journalling::vm_of(&entry),
        &request,
        &devices,
    )
    .map_err(|status| status.message().to_owned())?;
    let driver = site.driver();
    let found = holder(&Way::Twin(&json.vmm, &socket), around, entry.vmm.as_ref()).await;
    let (twin, found) = match found {
        Some((vmm, devices, states)) => {
            (Some(Twin { vmm: vmm as Arc<dyn Vmm>, devices, process: entry.vmm.clone() }), states)
        }
        None => (None, Vec::new()),
    };
    let site: Arc<dyn Site> = Arc::new(site);
    let run = DestinationRun::start(DestinationParts {
        migration_id: entry.migration_id.clone(),
        features: Vec::new(),
        driver,
        site,
        silence_timeout: Duration::from_millis(request.silence_timeout_ms),
        ledger,
        recovered: Some(destination_shell::Recovered {
            record: entry.record,
            twin,
            found,
            failure: entry.failure().unwrap_or_else(restarted),
        }),
    });
    around
        .registry
        .join(&journalling::reference_of(&entry), Part::Destination(run.clone(), Box::new(request)));
    give_back_destination(&around.registry, &run, entry.migration_id);
    Ok(())
}

/// How a VMM is reached.
enum Way<'a> {
    /// A VM's, together with all others who look at it: a monitor has room for one.
    Vm(&'a KnownVm),
    /// A twin's, which nobody else knows.
    Twin(&'a VmmEntry, &'a Path),
}

impl Way<'_> {
    fn socket(&self) -> &Path {
        match self {
            Self::Vm(vm) => &vm.socket,
            Self::Twin(_, socket) => socket,
        }
    }

    async fn reach(&self, around: &Around) -> Result<(Arc<dyn LocalVmm>, Description), VmmError> {
        match self {
            Self::Vm(vm) => around.inventory.vmm(vm).await,
            Self::Twin(entry, socket) => {
                let vmm = vmm::connect(entry, socket, around.config.deadlines).await?;
                let description = vmm.describe().await?;
                Ok((vmm, description))
            }
        }
    }
}

/// The VMM that was journalled, with its devices as they are read back; None if its process has ended. As long as that lives, its
/// answer is waited for.
async fn holder(
    way: &Way<'_>,
    around: &Around,
    journalled: Option<&Process>,
) -> Option<(Arc<dyn LocalVmm>, Vec<DeviceHandle>, Vec<Option<MigrationState>>)> {
    let journalled = journalled?;
    let mut told = false;
    loop {
        let alive = VmmProcess::open(journalled.pid).is_ok_and(|process| journalled.is(process.identity()));
        if !alive {
            return None;
        }
        match borrowed(way, around, journalled).await {
            Ok(found) => return Some(found),
            Err(why) => {
                if !std::mem::replace(&mut told, true) {
                    warn!(pid = journalled.pid, why, "the VMM lives, and cannot be used yet; trying again");
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn borrowed(
    way: &Way<'_>,
    around: &Around,
    journalled: &Process,
) -> Result<(Arc<dyn LocalVmm>, Vec<DeviceHandle>, Vec<Option<MigrationState>>), String> {
    let (vmm, description) = way.reach(around).await.map_err(|error| error.to_string())?;
    if !journalled.is(vmm.process().identity()) {
        return Err(format!(
            "{} is served by process {}, not by {}",
            way.socket().display(),
            vmm.pid(),
            journalled.pid
        ));
    }
    let devices = borrowing::devices(vmm.as_ref(), &description).map_err(|failure| failure.message)?;
    let mut states = Vec::with_capacity(devices.len());
    for device in &devices {
        states.push(device.state().await.ok());
    }
    Ok((vmm, devices, states))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt::entry::tests::entry;

    fn key(id: &str, role: Role) -> Key {
        Key::new(id, role).unwrap()
    }

    #[test]
    fn a_journal_that_is_what_its_name_says_is_understood() {
        let content = Content { version: 2, bytes: serde_json::to_vec(&entry()).unwrap() };
        assert_eq!(understand(&key("3f", Role::Source), Ok(content)), Ok(entry()));
    }

    #[test]
    fn a_journal_of_another_migration_or_end_or_version_is_told_by_its_file() {
        let content = || Content { version: 2, bytes: serde_json::to_vec(&entry()).unwrap() };
        let other = understand(&key("4a", Role::Source), Ok(content())).unwrap_err();
        assert_eq!(
            other,
            "the journal 4a.source is of another migration: it says 3f.source, VM demo/counter"
        );
        let end = understand(&key("3f", Role::Destination), Ok(content())).unwrap_err();
        assert!(end.starts_with("the journal 3f.destination is of another migration"), "{end}");
        let newer = understand(
            &key("3f", Role::Source),
            Ok(Content { version: 2, bytes: b"{\"quorum\": 3}".to_vec() }),
        )
        .unwrap_err();
        assert!(newer.starts_with("the journal 3f.source is not one of this agent's version"), "{newer}");
        assert!(newer.contains("quorum"), "{newer}");
        let unreadable = JournalError::InvalidId { id: "x".to_owned() };
        let told = understand(&key("3f", Role::Source), Err(unreadable)).unwrap_err();
        assert!(told.starts_with("the journal of this migration cannot be read: "), "{told}");
    }
}
