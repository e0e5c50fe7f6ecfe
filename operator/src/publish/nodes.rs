//! MigrationNodes: which agents to follow, and what to show about them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::StreamExt;
use jiff::Timestamp;
use slackwater_api::MigrationNode;
use slackwater_api::condition::REPORT_ACCEPTED;

use super::node_status::node_status;
use super::{Again, WRITES_AT_A_TIME};
use crate::cluster::{Cluster, ObjectKey, Observed, WriteError};
use crate::conditions::{Reported, Stamp, Status, Turn};
use crate::fleet::{Address, Fleet};
use crate::homes::Homes;
use crate::inventory::VmKey;
use crate::reason::VM_NAME_TAKEN;

/// Follows the agents that the MigrationNodes name, and shows what they report. Ends when the watch does.
///
/// Administrators write MigrationNodes by hand for now. Agents that are found by their EndpointSlice would
/// join the map that `follow` takes.
pub async fn run(cluster: Cluster, nodes: Observed<MigrationNode>, fleet: Arc<Fleet>, homes: Arc<Homes>) {
    let mut set_aside = homes.set_aside();
    let mut reported = Reported::default();
    nodes.ready().await;
    let (mut objects, mut reports) = (nodes.changes(), fleet.changed_nodes());
    let mut again = Again::default();
    let mut dirty: BTreeSet<String> = BTreeSet::new();
    let mut names = Arc::clone(&set_aside.borrow_and_update());
    // All at once: nothing is planned before all are known.
    let known =
        nodes.keys().into_iter().filter_map(|key| Some((key.name.clone(), address_of(&nodes, &key)?)));
    let mut wanted: BTreeMap<String, Address> = known.collect();
    fleet.follow(&wanted);
    loop {
        let showing = dirty.iter().filter_map(|name| nodes.get(&key(name))).map(|node| {
            let (cluster, fleet, names) = (&cluster, &fleet, &names);
            async move {
                let name = &node.metadata.name;
                let set_aside = name.as_ref().and_then(|name| names.get(name));
                let shown = show(cluster, &node, fleet, set_aside).await;
                (node, shown)
            }
        });
        let shown: Vec<_> = futures::stream::iter(showing).buffer_unordered(WRITES_AT_A_TIME).collect().await;
        dirty.clear();
        for (node, shown) in shown {
            let name = node.metadata.name.clone().unwrap_or_default();
            match shown {
                Ok(None) => {}
                Ok(Some((status, now))) => {
                    let turn = Turn { type_: REPORT_ACCEPTED, status: Status::False, reason: VM_NAME_TAKEN };
                    let before = node.status.as_ref().map_or(&[][..], |status| &status.conditions);
                    if let Some(notice) = reported.turned(&name, before, &status.conditions, turn, now) {
                        cluster.report(node.as_ref(), "ShowNode", &notice).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(node = name, %error, "the status of a MigrationNode could not be written");
                    again.later(name);
                }
            }
        }
        tokio::select! {
            changed = objects.next() => {
                let Some(changed) = changed else { return };
                let mut moved = false;
                for ObjectKey { name, .. } in changed {
                    let address = address_of(&nodes, &key(&name));
                    moved |= wanted.get(&name) != address.as_ref();
                    match address {
                        Some(address) => wanted.insert(name.clone(), address),
                        None => wanted.remove(&name),
                    };
                    dirty.insert(name);
                }
                if moved {
                    fleet.follow(&wanted);
                }
            }
            Some(changed) = reports.next() => dirty.extend(changed),
            // The sender lives as long as `homes`.
            Ok(()) = set_aside.changed() => {
                let before = std::mem::replace(&mut names, Arc::clone(&set_aside.borrow_and_update()));
                let all = before.keys().chain(names.keys());
                dirty.extend(all.filter(|name| before.get(*name) != names.get(*name)).cloned());
            }
            due = again.due() => dirty.extend(due),
        }
    }
}

fn key(name: &str) -> ObjectKey {
    ObjectKey { namespace: String::new(), name: name.to_owned() }
}

/// Also of a node whose status cannot be read: its agent must not be given up for that.
fn address_of(nodes: &Observed<MigrationNode>, key: &ObjectKey) -> Option<Address> {
    let node = nodes.without_status(key)?;
    let own = node.spec.address.clone();
    let accepted_epoch = node.spec.accept_epoch_up_to.and_then(|epoch| u64::try_from(epoch).ok());
    let peers = node.spec.peer_address.clone().unwrap_or_else(|| own.clone());
    Some(Address { peers, own, accepted_epoch })
}

/// Writes the status of a MigrationNode if it is not as it should be. Returns what was written, and when.
async fn show(
    cluster: &Cluster,
    node: &MigrationNode,
    fleet: &Fleet,
    set_aside: Option<&BTreeMap<VmKey, String>>,
) -> Result<Option<(slackwater_api::MigrationNodeStatus, Timestamp)>, WriteError> {
    let now = Timestamp::now();
    let stamp = Stamp { generation: node.metadata.generation, now };
    let previous = node.status.clone().unwrap_or_default();
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let status = {
        let inventory = fleet.inventory();
        let Some(known) = inventory.get(name) else { return Ok(None) };
        node_status(known, set_aside, &previous.conditions, stamp)
    };
    if status == previous {
        return Ok(None);
    }
    match cluster.write_node_status(node, &status).await {
        Ok(()) => Ok(Some((status, now))),
        Err(WriteError::Gone) => Ok(None),
        Err(error) => Err(error),
    }
}
