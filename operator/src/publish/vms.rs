//! AssignedVMs: one for each VM that an agent reports.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use jiff::Timestamp;
use parking_lot::Mutex;
use slackwater_api::condition::{CONTESTED, READY};
use slackwater_api::{AssignedVM, AssignedVMStatus, MigrationNode, VMMigration};

use super::vm_status::{Known, vm_status};
use super::{Again, WRITES_AT_A_TIME};
use crate::cluster::{Cluster, ObjectKey, Observed, Seen, WriteError};
use crate::conditions::{self, Reported, Stamp, Status, Turn};
use crate::fleet::Fleet;
use crate::homes::{Homes, Sight, moves};
use crate::inventory::{Inventory, VmKey, reports_of};
use crate::migration::claims::Claims;
use crate::moment::Moment;
use crate::notice::Notice;
use crate::plan::OtherMigration;
use crate::reason::{NOT_REPORTED, REPORTED_ELSEWHERE};

/// How long a VM that its node does not have any more is shown as such: in a hand-over, the report of the one
/// node can arrive after that of the other.
const GRACE: Duration = Duration::from_secs(5);

/// How long changes are gathered before they are looked at: those of a hand-over come one after the other.
const GATHERING: Duration = Duration::from_millis(200);

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

/// What an AssignedVM belongs to in [`Observed`]: the node where the VM was last.
pub fn node_of(vm: &AssignedVM) -> Option<String> {
    vm.status.as_ref()?.node_name.clone()
}

/// Keeps the AssignedVMs as the agents report the VMs. Ends when a watch does.
pub async fn run(cluster: Cluster, sources: Sources) {
    sources.vms.ready().await;
    sources.migrations.ready().await;
    let Sources { vms, migrations, fleet, claims, homes, .. } = &sources;
    homes.restore(vms.all().iter().map(Arc::as_ref), Timestamp::now());
    let (mut objects, mut moved) = (vms.changes(), migrations.group_changes());
    let (mut reports, mut claimed) = (fleet.changed_nodes(), claims.changes());
    let mut reported = ByNode::default();
    let mut reported_missing = BTreeSet::new();
    let unreported = Unreported::default();
    let mut contested = Reported::default();
    let mut again = Again::default();
    let mut dirty = BTreeSet::new();
    let mut was_settled = None;
    loop {
        // Before every agent has answered or failed once, a VM that no agent has reported may still exist, and
        // who reports a new one need not be the only one. `None`: not even the nodes are known.
        let settled = fleet.undecided().map(|undecided| undecided.is_empty());
        if settled != was_settled {
            was_settled = settled;
            dirty.extend(vms.all().iter().map(|vm| key(vm)));
            dirty.extend(homes.known_vms());
            dirty.extend(reported.all());
        }
        if let Some(settled) = settled {
            let promised = claims.all();
            let looked_at = std::mem::take(&mut dirty).into_iter().map(|vm| {
                let (sources, cluster, promised) = (&sources, &cluster, &promised);
                let unreported = &unreported;
                async move {
                    let looked = look(cluster, sources, &vm, promised, unreported, settled).await;
                    (vm, looked)
                }
            });
            let looked_at = futures::stream::iter(looked_at).buffer_unordered(WRITES_AT_A_TIME);
            for (vm, looked) in looked_at.collect::<Vec<_>>().await {
                match looked {
                    Ok(Synced::Settled(written)) => {
                        reported_missing.remove(&vm);
                        if let Some(written) = written {
                            written.report(&cluster, &mut contested).await;
                        }
                    }
                    Ok(Synced::Removed) => {
                        reported_missing.remove(&vm);
                        homes.forget(&vm);
                    }
                    Ok(Synced::LookAgain(written)) => {
                        if let Some(written) = written {
                            written.report(&cluster, &mut contested).await;
                        }
                        again.later(vm);
                    }
                    Err(error) => {
                        tracing::warn!(%vm, %error, "an AssignedVM could not be written");
                        let no_namespace = matches!(error, WriteError::NoNamespace { .. });
                        if no_namespace && reported_missing.insert(vm.clone()) {
                            report_no_namespace(&cluster, &vm, &fleet.inventory(), &sources.nodes).await;
                        }
                        again.later(vm);
                    }
                }
            }
        }
        tokio::select! {
            changed = objects.next() => match changed {
                Some(changed) => dirty.extend(changed.into_iter().map(vm_of)),
                None => return,
            },
            changed = moved.next() => match changed {
                Some(changed) => dirty.extend(changed.iter().filter_map(|group| VmKey::read(group))),
                None => return,
            },
            Some(changed) = reports.next() => {
                for node in changed {
                    dirty.extend(reported.update(&node, &fleet.inventory()));
                    dirty.extend(vms.in_group(&node).iter().map(|vm| key(vm)));
                }
            }
            Some(changed) = claimed.next() => dirty.extend(changed),
            due = again.due() => dirty.extend(due),
        }
        // What belongs together comes at once, and is written once.
        tokio::time::sleep(GATHERING).await;
    }
}

/// Which VMs each node has reported.
#[derive(Debug, Default)]
struct ByNode(BTreeMap<String, BTreeSet<VmKey>>);

impl ByNode {
    /// Takes in what a node reports now. Returns the VMs that it reports or has reported.
    fn update(&mut self, node: &str, inventory: &Inventory) -> BTreeSet<VmKey> {
        let report = inventory.get(node).and_then(|node| node.report.as_ref());
        let now: BTreeSet<VmKey> =
            report.map(|report| report.vms.keys().cloned().collect()).unwrap_or_default();
        let mut concerned = match now.is_empty() {
            true => self.0.remove(node),
            false => self.0.insert(node.to_owned(), now.clone()),
        }
        .unwrap_or_default();
        concerned.extend(now);
        concerned
    }

    fn all(&self) -> impl Iterator<Item = VmKey> {
        self.0.values().flatten().cloned()
    }
}

/// The status of an AssignedVM that was written.
struct Written {
    object: Arc<AssignedVM>,
    status: AssignedVMStatus,
    now: Timestamp,
}

impl Written {
    async fn report(self, cluster: &Cluster, contested: &mut Reported) {
        let before = self.object.status.as_ref().map_or(&[][..], |status| &status.conditions);
        let turn = Turn { type_: CONTESTED, status: Status::True, reason: REPORTED_ELSEWHERE };
        let about = key(&self.object).to_string();
        if let Some(notice) = contested.turned(&about, before, &self.status.conditions, turn, self.now) {
            cluster.report(self.object.as_ref(), "ShowVM", &notice).await;
        }
    }
}

/// Since when no agent has reported a VM, as this operator has seen it.
#[derive(Debug, Default)]
struct Unreported(Mutex<BTreeMap<VmKey, Instant>>);

impl Unreported {
    /// Returns for how long the VM has not been reported.
    fn note(&self, vm: &VmKey, unreported: bool, now: Instant) -> Duration {
        let mut since = self.0.lock();
        if !unreported {
            since.remove(vm);
            return Duration::ZERO;
        }
        now.duration_since(*since.entry(vm.clone()).or_insert(now))
    }
}

enum Synced {
    /// Nothing more to do until something changes.
    Settled(Option<Written>),
    /// The VM is gone, and its object, too.
    Removed,
    /// Time alone changes what is to be done.
    LookAgain(Option<Written>),
}

fn key(vm: &AssignedVM) -> VmKey {
    vm_of(ObjectKey::of(vm))
}

fn vm_of(object: ObjectKey) -> VmKey {
    VmKey { namespace: object.namespace, name: object.name }
}

/// Brings one AssignedVM up to date. `settled`: every agent has answered or failed once.
async fn look(
    cluster: &Cluster,
    sources: &Sources,
    vm: &VmKey,
    claims: &[Arc<OtherMigration>],
    unreported: &Unreported,
    settled: bool,
) -> Result<Synced, WriteError> {
    let now = Moment::now();
    let migrations = sources.migrations.in_group(&vm.to_string());
    let own_moves = moves(migrations.iter().map(Arc::as_ref));
    let sight = sources.homes.look(vm, sources.fleet.inventory(), &own_moves, settled, now);
    sources.homes.publish(vm, &sight);
    // Time alone passes a VM on.
    let is_missing = sight.home.as_ref().is_some_and(|home| home.missing_since.is_some());
    let seen = sources.vms.see(&ObjectKey { namespace: vm.namespace.clone(), name: vm.name.clone() });
    let object = match seen {
        Seen::There(object) => Some(object),
        // It is left alone.
        Seen::Unreadable { .. } => return Ok(Synced::Settled(None)),
        Seen::Gone => None,
    };
    let is_reported = !reports_of(&sight.inventory, vm).is_empty() && (settled || sight.home.is_some());
    if object.is_none() && !is_reported {
        return Ok(if is_missing { Synced::LookAgain(None) } else { Synced::Settled(None) });
    }
    let synced = sync(cluster, vm, object, sight, claims, unreported, settled).await?;
    Ok(match synced {
        Synced::Settled(written) if is_missing => Synced::LookAgain(written),
        synced => synced,
    })
}

async fn sync(
    cluster: &Cluster,
    vm: &VmKey,
    object: Option<Arc<AssignedVM>>,
    sight: Sight,
    claims: &[Arc<OtherMigration>],
    unreported: &Unreported,
    settled: bool,
) -> Result<Synced, WriteError> {
    let object = match object {
        Some(object) => object,
        None => Arc::new(cluster.ensure_vm(&vm.namespace, &vm.name).await?),
    };
    let previous = object.status.clone().unwrap_or_default();
    let now = Timestamp::now();
    let known = Known { home: sight.home.as_ref(), set_aside: &sight.set_aside };
    let stamp = Stamp { generation: None, now };
    let status = vm_status(vm, &narrowed(&sight.inventory, vm, &previous), known, claims, &previous, stamp);
    // Not kept while the API server is waited for.
    drop(sight);
    let is_unreported = is_unreported(&status);
    if is_unreported && !settled {
        return Ok(Synced::LookAgain(None));
    }
    if unreported.note(vm, is_unreported, Instant::now()) >= GRACE {
        tracing::info!(%vm, node = previous.node_name, "the VM is gone; removing its AssignedVM");
        cluster.remove_vm(&object).await?;
        unreported.note(vm, false, Instant::now());
        return Ok(Synced::Removed);
    }
    let mut written = None;
    if status != previous {
        match cluster.write_vm_status(&object, &status).await {
            Ok(()) => written = Some(Written { object, status, now }),
            Err(WriteError::Gone) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(if is_unreported { Synced::LookAgain(written) } else { Synced::Settled(written) })
}

/// Only the nodes that have to do with a VM: all others say nothing about it. If no node reports it, all.
fn narrowed<'a>(inventory: &'a Inventory, vm: &VmKey, previous: &AssignedVMStatus) -> Cow<'a, Inventory> {
    let reports = reports_of(inventory, vm);
    if reports.is_empty() {
        return Cow::Borrowed(inventory);
    }
    let last = previous.node_name.as_ref().and_then(|name| inventory.get_key_value(name));
    let nodes = reports.into_iter().map(|report| (report.name.to_owned(), report.node.clone()));
    Cow::Owned(nodes.chain(last.map(|(name, node)| (name.clone(), node.clone()))).collect())
}

fn is_unreported(status: &AssignedVMStatus) -> bool {
    conditions::has_reason(&status.conditions, READY, NOT_REPORTED)
}

async fn report_no_namespace(
    cluster: &Cluster,
    vm: &VmKey,
    inventory: &Inventory,
    nodes: &Observed<MigrationNode>,
) {
    let reports = reports_of(inventory, vm);
    let note = format!(
        "VM {vm} cannot be shown, nor migrated: there is no namespace {:?}. Create it; the operator tries \
         again until then.",
        vm.namespace
    );
    for report in reports {
        let key = ObjectKey { namespace: String::new(), name: report.name.to_owned() };
        if let Some(object) = nodes.get(&key) {
            let notice = Notice { warning: true, reason: "NamespaceMissing", note: note.clone() };
            cluster.report(object.as_ref(), "ShowVM", &notice).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_a_vm_is_not_reported_begins_anew_with_each_report() {
        let (unreported, begun) = (Unreported::default(), Instant::now());
        let vm = VmKey { namespace: "demo".into(), name: "counter".into() };
        let note = |second, is| unreported.note(&vm, is, begun + Duration::from_secs(second)).as_secs();
        assert_eq!((note(0, true), note(4, true)), (0, 4));
        assert_eq!((note(5, false), note(6, true), note(11, true)), (0, 0, 5));
    }
}
