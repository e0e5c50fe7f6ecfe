//! AssignedVMs: one for each VM that an agent reports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use slackwater_api::condition::{CONTESTED, READY};
use slackwater_api::{AssignedVM, AssignedVMStatus, MigrationNode, VMMigration};

use super::RETRY_PAUSE;
use super::vm_status::{Known, vm_status};
use crate::cluster::{Cluster, Observed, WriteError};
use crate::conditions::{self, Reported, Stamp, Status, Turn};
use crate::fleet::Fleet;
use crate::homes::{Homes, View, moves};
use crate::inventory::{Inventory, VmKey};
use crate::migration::claims::Claims;
use crate::notice::Notice;
use crate::plan::OtherMigration;
use crate::reason::{NOT_REPORTED, REPORTED_ELSEWHERE};

/// How long a VM that its node does not have any more is shown as such: in a hand-over, the report of the one
/// node can arrive after that of the other.
const GRACE: Duration = Duration::from_secs(5);

/// What the AssignedVMs are made from.
pub struct Sources {
    /// As they are.
    pub vms: Observed<AssignedVM>,
    /// To report what concerns no AssignedVM.
    pub nodes: Observed<MigrationNode>,
    /// Our own migrations.
    pub migrations: Observed<VMMigration>,
    /// The agents.
    pub fleet: Arc<Fleet>,
    /// What migrations have been promised.
    pub claims: Arc<Claims>,
    /// Which node is known to have which VM.
    pub homes: Arc<Homes>,
}

/// Keeps the AssignedVMs as the agents report the VMs. Ends when a watch does.
pub async fn run(cluster: Cluster, sources: Sources) {
    let Sources { mut vms, nodes, mut migrations, fleet, claims, homes } = sources;
    let mut changes = fleet.changes();
    let mut claim_changes = claims.changes();
    let mut reported_missing = BTreeSet::new();
    let mut contested = Reported::default();
    if !vms.ready().await || !migrations.ready().await {
        return;
    }
    homes.restore(vms.all().iter().map(Arc::as_ref), Timestamp::now());
    loop {
        let objects: BTreeMap<VmKey, Arc<AssignedVM>> =
            vms.all().into_iter().map(|vm| (key(&vm), vm)).collect();
        // Before every agent has answered or failed once, a VM that no agent has reported may still exist, and
        // who reports a new one need not be the only one. `None`: not even the nodes are known.
        let undecided = fleet.undecided();
        let settled = undecided.as_ref().is_some_and(Vec::is_empty);
        let mut again = false;
        if undecided.is_some() {
            let own_moves = moves(migrations.all().iter().map(Arc::as_ref));
            let view = homes.look(&fleet.inventory(), &own_moves, settled, Timestamp::now());
            homes.publish(&view);
            // Time alone passes a VM on.
            again = view.homes.values().any(|home| home.missing_since.is_some());
            let promised = claims.all();
            let reported = reported_vms(&view.inventory).filter(|vm| settled || view.homes.contains_key(vm));
            let keys: BTreeSet<VmKey> = reported.chain(objects.keys().cloned()).collect();
            for vm in keys {
                let object = objects.get(&vm).map(Arc::as_ref);
                match sync(&cluster, &vm, object, &view, &promised, settled, &mut contested).await {
                    Ok(Synced::Settled) => {
                        reported_missing.remove(&vm);
                    }
                    Ok(Synced::Removed) => {
                        reported_missing.remove(&vm);
                        homes.forget(&vm);
                    }
                    Ok(Synced::LookAgain) => again = true,
                    Err(error) => {
                        again = true;
                        tracing::warn!(%vm, %error, "an AssignedVM could not be written");
                        let no_namespace = matches!(error, WriteError::NoNamespace { .. });
                        if no_namespace && reported_missing.insert(vm.clone()) {
                            report_no_namespace(&cluster, &vm, &view.inventory, &nodes).await;
                        }
                    }
                }
            }
        }
        tokio::select! {
            alive = vms.changed() => if !alive { return },
            alive = migrations.changed() => if !alive { return },
            () = changes.next() => {}
            () = claim_changes.next() => {}
            () = tokio::time::sleep(RETRY_PAUSE), if again => {}
        }
    }
}

enum Synced {
    /// Nothing more to do until something changes.
    Settled,
    /// The VM is gone, and its object, too.
    Removed,
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
    view: &View,
    migrations: &[OtherMigration],
    settled: bool,
    reported: &mut Reported,
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
    let set_aside = view.set_aside.get(vm).map_or(&[][..], Vec::as_slice);
    let known = Known { home: view.homes.get(vm), set_aside };
    let stamp = Stamp { generation: None, now };
    let status = vm_status(vm, &view.inventory, known, migrations, &previous, stamp);
    let unreported = is_unreported(&status);
    if unreported && !settled {
        return Ok(Synced::LookAgain);
    }
    if unreported && since_unreported(&previous, now).is_some_and(|since| since >= GRACE) {
        tracing::info!(%vm, node = previous.node_name, "the VM is gone; removing its AssignedVM");
        cluster.remove_vm(object).await?;
        return Ok(Synced::Removed);
    }
    if status != previous {
        match cluster.write_vm_status(object, &status).await {
            Ok(()) | Err(WriteError::Gone) => {}
            Err(error) => return Err(error),
        }
        let (before, after) = (&previous.conditions, &status.conditions);
        let turn = Turn { type_: CONTESTED, status: Status::True, reason: REPORTED_ELSEWHERE };
        if let Some(notice) = reported.turned(&vm.to_string(), before, after, turn, now) {
            cluster.report(object, "ShowVM", &notice).await;
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
