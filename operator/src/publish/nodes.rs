//! MigrationNodes: which agents to follow, and what to show about them.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use kube::ResourceExt;
use slackwater_api::MigrationNode;
use slackwater_api::condition::REPORT_ACCEPTED;

use super::node_status::node_status;
use crate::cluster::{Cluster, Observed, WriteError};
use crate::conditions::{Reported, Stamp, Status, Turn};
use crate::fleet::{Address, Fleet};
use crate::homes::Homes;
use crate::inventory::VmKey;
use crate::reason::VM_NAME_TAKEN;

/// Follows the agents that the MigrationNodes name, and shows what they report. Ends when the watch does.
///
/// Administrators write MigrationNodes by hand for now. Agents that are found by their EndpointSlice would
/// join the map that `follow` takes.
pub async fn run(cluster: Cluster, mut nodes: Observed<MigrationNode>, fleet: Arc<Fleet>, homes: Arc<Homes>) {
    let mut changes = fleet.changes();
    let mut set_aside = homes.set_aside();
    let mut reported = Reported::default();
    if !nodes.ready().await {
        return;
    }
    loop {
        let objects = nodes.all();
        fleet
            .follow(&objects.iter().map(|node| (node.name_any(), address(node))).collect::<BTreeMap<_, _>>());
        let mut again = false;
        let names = Arc::clone(&set_aside.borrow_and_update());
        for node in &objects {
            if let Err(error) = show(&cluster, node, &fleet, names.get(&node.name_any()), &mut reported).await
            {
                tracing::warn!(node = node.name_any(), %error, "the status of a MigrationNode could not be written");
                again = true;
            }
        }
        tokio::select! {
            alive = nodes.changed() => if !alive { return },
            () = changes.next() => {}
            // The sender lives as long as `homes`.
            Ok(()) = set_aside.changed() => {}
            () = tokio::time::sleep(super::RETRY_PAUSE), if again => {}
        }
    }
}

fn address(node: &MigrationNode) -> Address {
    let own = node.spec.address.clone();
    let accepted_epoch = node.spec.accept_epoch_up_to.and_then(|epoch| u64::try_from(epoch).ok());
    Address { peers: node.spec.peer_address.clone().unwrap_or_else(|| own.clone()), own, accepted_epoch }
}

async fn show(
    cluster: &Cluster,
    node: &MigrationNode,
    fleet: &Fleet,
    set_aside: Option<&BTreeMap<VmKey, String>>,
    reported: &mut Reported,
) -> Result<(), WriteError> {
    let inventory = fleet.inventory();
    let Some(known) = inventory.get(&node.name_any()) else { return Ok(()) };
    let previous = node.status.clone().unwrap_or_default();
    let stamp = Stamp { generation: node.metadata.generation, now: Timestamp::now() };
    let status = node_status(known, set_aside, &previous.conditions, stamp);
    if status == previous {
        return Ok(());
    }
    match cluster.write_node_status(node, &status).await {
        Err(WriteError::Gone) => return Ok(()),
        result => result?,
    }
    let turn = Turn { type_: REPORT_ACCEPTED, status: Status::False, reason: VM_NAME_TAKEN };
    let (before, after) = (&previous.conditions, &status.conditions);
    if let Some(notice) = reported.turned(&node.name_any(), before, after, turn, stamp.now) {
        cluster.report(node, "ShowNode", &notice).await;
    }
    Ok(())
}
