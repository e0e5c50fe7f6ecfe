//! AssignedVMs: one for each VM that an agent reports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use slackwater_api::condition::READY;
use slackwater_api::{AssignedVM, AssignedVMStatus, MigrationNode};

use super::RETRY_PAUSE;
use super::vm_status::vm_status;
use crate::cluster::{Cluster, Observed, WriteError};
use crate::conditions::{self, Stamp};
use crate::fleet::Fleet;
use crate::inventory::{Inventory, VmKey};
use crate::migration::claims::Claims;
use crate::notice::Notice;
use crate::plan::OtherMigration;
use crate::reason::NOT_REPORTED;

/// How long a VM that its node does not have any more is shown as such: in a hand-over, the report of the one
/// node can arrive after that of the other.
const GRACE: Duration = Duration::from_secs(5);

/// Keeps the AssignedVMs as the agents report the VMs. Ends when a watch does.
pub async fn run(
    cluster: Cluster,
    mut vms: Observed<AssignedVM>,
    nodes: Observed<MigrationNode>,
    fleet: Arc<Fleet>,
    claims: Arc<Claims>,
) {
    let mut changes = fleet.changes();
    let mut claim_changes = claims.changes();
    let mut reported_missing = BTreeSet::new();
    if !vms.ready().await {
        return;
    }
    loop {
        let objects: BTreeMap<VmKey, Arc<AssignedVM>> =
            vms.all().into_iter().map(|vm| (key(&vm), vm)).collect();
        let inventory = fleet.inventory();
        let migrations = claims.all();
        let keys: BTreeSet<VmKey> = reported_vms(&inventory).chain(objects.keys().cloned()).collect();
        let mut again = false;
        // Before every agent has answered or failed once, a VM that no agent has reported may still exist.
        let settled = fleet.undecided().is_some_and(|undecided| undecided.is_empty());
        for vm in keys {
            let object = objects.get(&vm).map(Arc::as_ref);
            match sync(&cluster, &vm, object, &inventory, &migrations, settled).await {
                Ok(Synced::Settled) => {
                    reported_missing.remove(&vm);
                }
                Ok(Synced::LookAgain) => again = true,
                Err(error) => {
                    again = true;
                    tracing::warn!(%vm, %error, "an AssignedVM could not be written");
                    let no_namespace = matches!(error, WriteError::NoNamespace { .. });
                    if no_namespace && reported_missing.insert(vm.clone()) {
                        report_no_namespace(&cluster, &vm, &inventory, &nodes).await;
                    }
                }
            }
        }
        tokio::select! {
            alive = vms.changed() => if !alive { return },
            () = changes.next() => {}
            () = claim_changes.next() => {}
            () = tokio::time::sleep(RETRY_PAUSE), if again => {}
        }
    }
}

enum Synced {
    /// Nothing more to do until something changes.
    Settled,
    /// Time alone changes what is to be done.
    LookAgain,
}

fn key(vm: &AssignedVM) -> VmKey {
    VmKey { namespace: vm.namespace().unwrap_or_default(), name: vm.name_any() }
}

fn reported_vms(inventory: &Inventory) -> impl Iterator<Item = VmKey> {
    inventory.values().filter_map(|node| node.report.as_ref()).flat_map(|report| report.vms.keys().cloned())
}

/// Brings one AssignedVM up to date. `settled`: every agent has answered or failed once.
async fn sync(
    cluster: &Cluster,
    vm: &VmKey,
    object: Option<&AssignedVM>,
    inventory: &Inventory,
    migrations: &[OtherMigration],
    settled: bool,
) -> Result<Synced, WriteError> {
    let created;
    let object = match object {
        Some(object) => object,
        None => {
            created = cluster.ensure_vm(&vm.namespace, &vm.name).await?;
            &created
        }
    };
    let previous = object.status.clone().unwrap_or_default();
    let now = Timestamp::now();
    let status = vm_status(vm, inventory, migrations, &previous, Stamp { generation: None, now });
    let unreported = is_unreported(&status);
    if unreported && !settled {
        return Ok(Synced::LookAgain);
    }
    if unreported && since_unreported(&previous, now).is_some_and(|since| since >= GRACE) {
        tracing::info!(%vm, node = previous.node_name, "the VM is gone; removing its AssignedVM");
        cluster.remove_vm(object).await?;
        return Ok(Synced::Settled);
    }
    if status != previous {
        match cluster.write_vm_status(object, &status).await {
            Ok(()) | Err(WriteError::Gone) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(if unreported { Synced::LookAgain } else { Synced::Settled })
}

fn is_unreported(status: &AssignedVMStatus) -> bool {
    conditions::has_reason(&status.conditions, READY, NOT_REPORTED)
}

/// How long the object has said that no agent reports its VM.
fn since_unreported(status: &AssignedVMStatus, now: Timestamp) -> Option<Duration> {
    let ready = conditions::find(&status.conditions, READY).filter(|ready| ready.reason == NOT_REPORTED)?;
    let since: SignedDuration = now.duration_since(ready.last_transition_time.0);
    Duration::try_from(since).ok()
}

async fn report_no_namespace(
    cluster: &Cluster,
    vm: &VmKey,
    inventory: &Inventory,
    nodes: &Observed<MigrationNode>,
) {
    let reports = crate::inventory::reports_of(inventory, vm);
    let note = format!(
        "VM {vm} cannot be shown, nor migrated: there is no namespace {:?}. Create it; the operator tries \
         again until then.",
        vm.namespace
    );
    for report in reports {
        if let Some(object) = nodes.get(None, report.name) {
            let notice = Notice { warning: true, reason: "NamespaceMissing", note: note.clone() };
            cluster.report(object.as_ref(), "ShowVM", &notice).await;
        }
    }
}
