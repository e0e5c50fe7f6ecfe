//! The planner: which device takes over from which, on which node; or why there can be no migration.
//!
//! A pure function of what the operator knows. It refuses everything that is known to fail **before** any
//! device is touched, and says what is wrong, which value, and what would help. The agents check the same
//! again for themselves.
//!
//! ```text
//!  where is the VM? ─▶ is it free to move? ─▶ can it be migrated at all? ─▶ which node? ─▶ do devices match?
//! ```

mod fit;
mod lack;
mod matching;
mod refusal;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use slackwater_api::{MigrationFeature, PeerToPeer};

use crate::inventory::{
    Blocker, DeviceFeatures, Inventory, Node, Vm, VmKey, VmReport, Whereabouts, reports_of, whereabouts,
};

use crate::reason;
use fit::{Taken, Wanted};
pub use lack::Lack;
pub use refusal::Refusal;

/// What a user asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The VM.
    pub vm: VmKey,
    /// The node to go to; any that fits if `None`.
    pub target: Option<String>,
    /// The policy for more than one device.
    pub peer_to_peer: PeerToPeer,
}

/// Another migration, accepted and not yet ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherMigration {
    /// namespace/name, for messages.
    pub name: String,
    /// The id by which the agents know it.
    pub id: String,
    /// The VM that it moves.
    pub vm: VmKey,
    /// Where to.
    pub target: String,
    /// The devices there that it has been given.
    pub target_devices: Vec<String>,
}

/// Checks that a test may switch off to see what is behind them. All on by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Devices must be of the same model.
    pub device_model: bool,
}

impl Default for Checks {
    fn default() -> Self {
        Self { device_model: true }
    }
}

/// What a migration is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Where the VM is.
    pub source: String,
    /// Where it goes.
    pub target: String,
    /// host:port at which the source's agent reaches the target's.
    pub target_address: String,
    /// In the order in which the VM's monitor has its devices.
    pub devices: Vec<Pair>,
}

/// Which device takes over from which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// Name at the source.
    pub source: String,
    /// Name at the target.
    pub target: String,
    /// Driver of the source's device.
    pub driver: String,
    /// Model of the source's device.
    pub model: String,
    /// Features of the source's device.
    pub features: Vec<MigrationFeature>,
}

/// Plans a migration.
///
/// Without a target in the request, the first node by name whose free devices match is taken: the same input
/// always gives the same plan.
///
/// # Errors
/// [`Refusal`]: why it cannot work.
pub fn plan(
    request: &Request,
    inventory: &Inventory,
    others: &[Arc<OtherMigration>],
    checks: Checks,
) -> Result<Plan, Refusal> {
    let (source, wanted) = movable(&request.vm, request.peer_to_peer, inventory, others)?;
    let taken = Taken::by(others);
    let (target, devices) = match &request.target {
        Some(target) => check_target(request, source, target, inventory)
            .and_then(|node| match_devices(&request.vm, target, node, &wanted, &taken, checks))
            .map(|devices| (target.as_str(), devices))?,
        None => choose_target(&request.vm, source, inventory, &wanted, &taken, checks)?,
    };
    let target_address = inventory.get(target).map(|node| node.peer_address.clone()).unwrap_or_default();
    Ok(Plan { source: source.to_owned(), target: target.to_owned(), target_address, devices })
}

/// Whether a VM could be migrated at all, to any node.
///
/// # Errors
/// [`Refusal`]: why not.
pub fn check_movable(
    vm: &VmKey,
    peer_to_peer: PeerToPeer,
    inventory: &Inventory,
    others: &[Arc<OtherMigration>],
) -> Result<(), Refusal> {
    movable(vm, peer_to_peer, inventory, others).map(drop)
}

/// The VM's node, and its devices.
fn movable<'a>(
    key: &VmKey,
    peer_to_peer: PeerToPeer,
    inventory: &'a Inventory,
    others: &[Arc<OtherMigration>],
) -> Result<(&'a str, Vec<Wanted<'a>>), Refusal> {
    if let Some(other) = others.iter().find(|other| other.vm == *key) {
        return Err(Refusal::MigrationInProgress { vm: key.clone(), by: other.name.clone() });
    }
    let VmReport { name: source, node, vm } = locate(key, inventory)?;
    if let Some(error) = node.not_ready_reason() {
        return Err(Refusal::SourceNotReady { vm: key.clone(), node: source.to_owned(), error });
    }
    if let Some(id) = held_by(key, inventory) {
        // The agent says why that migration does not go on.
        if let Some(hold) =
            vm.blockers.iter().find(|blocker| reason::agent::HOLDS.contains(&blocker.reason.as_str()))
        {
            let blockers = vec![hold.clone()];
            return Err(Refusal::NotMigratable { vm: key.clone(), node: source.to_owned(), blockers });
        }
        let by =
            others.iter().find(|other| other.id == id).map_or_else(|| format!("id {id}"), |o| o.name.clone());
        return Err(Refusal::MigrationInProgress { vm: key.clone(), by });
    }
    check_blockers(key, peer_to_peer, source, vm)?;
    let wanted = devices_of(key, source, node, vm)?;
    check_peer_to_peer(key, peer_to_peer, &wanted)?;
    Ok((source, wanted))
}

fn locate<'a>(vm: &VmKey, inventory: &'a Inventory) -> Result<VmReport<'a>, Refusal> {
    match whereabouts(inventory, vm) {
        Whereabouts::At(report) => Ok(report),
        Whereabouts::Several(nodes) => Err(Refusal::ReportedTwice {
            vm: vm.clone(),
            nodes: nodes.into_iter().map(str::to_owned).collect(),
        }),
        Whereabouts::Nowhere => Err(Refusal::VmNotFound {
            vm: vm.clone(),
            known: known_vms(vm, inventory),
            silent_nodes: inventory
                .iter()
                .filter(|(_, node)| !node.is_ready())
                .map(|(name, _)| name.clone())
                .collect(),
            no_nodes: inventory.is_empty(),
        }),
    }
}

/// VMs that the user may have meant: those of the same name elsewhere, then those of the same namespace.
fn known_vms(vm: &VmKey, inventory: &Inventory) -> Vec<VmKey> {
    let all =
        || inventory.values().filter_map(|node| node.report.as_ref()).flat_map(|report| report.vms.keys());
    let mut known: Vec<VmKey> = all().filter(|other| other.name == vm.name).cloned().collect();
    known.extend(all().filter(|other| other.namespace == vm.namespace).cloned());
    known
}

/// The id of the migration that holds a VM, as its agents report it.
pub(crate) fn held_by(vm: &VmKey, inventory: &Inventory) -> Option<String> {
    let holds = |vm: &Vm| (!vm.migration_id.is_empty()).then(|| vm.migration_id.clone());
    reports_of(inventory, vm).into_iter().find_map(|report| holds(report.vm))
}

fn check_blockers(key: &VmKey, peer_to_peer: PeerToPeer, source: &str, vm: &Vm) -> Result<(), Refusal> {
    let isolated = peer_to_peer == PeerToPeer::AssumeIsolated;
    let standing: Vec<Blocker> =
        vm.blockers.iter().filter(|b| !(isolated && b.lifted_by_assume_isolated)).cloned().collect();
    if standing.is_empty() {
        return Ok(());
    }
    Err(Refusal::NotMigratable { vm: key.clone(), node: source.to_owned(), blockers: standing })
}

fn devices_of<'a>(key: &VmKey, source: &str, node: &'a Node, vm: &'a Vm) -> Result<Vec<Wanted<'a>>, Refusal> {
    let refused = |reason: &str, message: String| Refusal::NotMigratable {
        vm: key.clone(),
        node: source.to_owned(),
        blockers: vec![Blocker { reason: reason.to_owned(), message, lifted_by_assume_isolated: false }],
    };
    let known = node.report.as_ref().map(|report| &report.devices);
    let mut wanted = Vec::new();
    for name in &vm.devices {
        let Some(device) = known.and_then(|devices| devices.get(name)) else {
            let message = format!("the agent lists device {name} for the VM and does not describe it");
            return Err(refused("DeviceUnknown", message));
        };
        let features = match &device.features {
            DeviceFeatures::Unknown { reason } => {
                let message = format!("the migration features of device {name} could not be read: {reason}");
                return Err(refused("DeviceFeaturesUnknown", message));
            }
            DeviceFeatures::Known(features) => features.as_slice(),
        };
        if !features.contains(&MigrationFeature::StopCopy) {
            let message = format!(
                "device {name} ({}) has no migration support: its driver does not advertise STOP_COPY",
                device.driver
            );
            return Err(refused("DeviceNotMigratable", message));
        }
        wanted.push(Wanted { name, device, features });
    }
    Ok(wanted)
}

fn check_peer_to_peer(key: &VmKey, peer_to_peer: PeerToPeer, wanted: &[Wanted<'_>]) -> Result<(), Refusal> {
    if peer_to_peer == PeerToPeer::AssumeIsolated || wanted.len() < 2 {
        return Ok(());
    }
    let lacking: Vec<String> = wanted
        .iter()
        .filter(|want| !want.features.contains(&MigrationFeature::P2p))
        .map(|want| format!("{} ({})", want.name, want.device.driver))
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    Err(Refusal::PeerToPeerUnsupported { vm: key.clone(), devices: lacking })
}

fn check_target<'a>(
    request: &Request,
    source: &str,
    target: &str,
    inventory: &'a Inventory,
) -> Result<&'a Node, Refusal> {
    let Some(node) = inventory.get(target) else {
        return Err(Refusal::TargetNotFound {
            target: target.to_owned(),
            known: inventory.keys().filter(|name| *name != source).cloned().collect(),
        });
    };
    if target == source {
        return Err(Refusal::TargetIsSource { vm: request.vm.clone(), node: source.to_owned() });
    }
    match node.not_ready_reason() {
        None => Ok(node),
        Some(error) => Err(Refusal::TargetNotReady { target: target.to_owned(), error }),
    }
}

fn match_devices(
    vm: &VmKey,
    target: &str,
    node: &Node,
    wanted: &[Wanted<'_>],
    taken: &Taken<'_>,
    checks: Checks,
) -> Result<Vec<Pair>, Refusal> {
    matching::pairs(target, node, wanted, taken, checks)
        .map_err(|lack| Refusal::NoMatchingDevices { vm: vm.clone(), lack })
}

fn choose_target<'a>(
    vm: &VmKey,
    source: &str,
    inventory: &'a Inventory,
    wanted: &[Wanted<'_>],
    taken: &Taken<'_>,
    checks: Checks,
) -> Result<(&'a str, Vec<Pair>), Refusal> {
    let mut lacks = Vec::new();
    for (name, node) in inventory.iter().filter(|(name, _)| *name != source) {
        match node.not_ready_reason() {
            None => match matching::pairs(name, node, wanted, taken, checks) {
                Ok(pairs) => return Ok((name, pairs)),
                Err(lack) => lacks.push(lack.to_string()),
            },
            Some(error) => lacks.push(format!("{name} is not Ready: {error}")),
        }
    }
    Err(Refusal::NoSuitableNode { vm: vm.clone(), source: source.to_owned(), lacks })
}
