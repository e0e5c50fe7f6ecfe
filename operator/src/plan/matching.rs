//! Which free device of a node can take over from which device of a VM.
//!
//! A device can take over if its driver and model are the same and it can be stopped in the same ways: then
//! it takes the state that the other one gives. Finding a pair for each is a matching in a bipartite graph;
//! taking the first that fits could give away the only device that another one needs.

use std::collections::{BTreeMap, BTreeSet};

use slackwater_api::MigrationFeature;

use super::lack::Lack;
use super::{Checks, OtherMigration, Pair};
use crate::inventory::{Device, Node};

/// A device of the VM, for which a match is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) name: &'a str,
    pub(super) device: &'a Device,
    /// All of its features: they are known.
    pub(super) features: &'a [MigrationFeature],
}

/// Devices that other migrations have been given and that their nodes may not report as used yet.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// (node, device) and who has it.
    holders: BTreeMap<(String, String), String>,
}

impl Taken {
    pub(super) fn by(others: &[OtherMigration]) -> Self {
        let entry = |other: &OtherMigration, device: &String| {
            ((other.target.clone(), device.clone()), format!("planned for VMMigration {}", other.name))
        };
        let holders =
            others.iter().flat_map(|other| other.target_devices.iter().map(move |d| entry(other, d)));
        Self { holders: holders.collect() }
    }

    pub(super) fn holder(&self, node: &str, device: &str) -> Option<&str> {
        self.holders.get(&(node.to_owned(), device.to_owned())).map(String::as_str)
    }
}

/// Pairs every wanted device with a free one of `node`, in a way that depends on nothing but the arguments.
///
/// # Errors
/// What the node lacks.
pub(super) fn pairs(
    name: &str,
    node: &Node,
    wanted: &[Wanted<'_>],
    taken: &Taken,
    checks: Checks,
) -> Result<Vec<Pair>, Lack> {
    let devices: Vec<(&str, &Device)> = node
        .report
        .iter()
        .flat_map(|report| report.devices.iter())
        .map(|(device_name, device)| (device_name.as_str(), device))
        .collect();
    let is_free =
        |device_name: &str, device: &Device| device.free && taken.holder(name, device_name).is_none();
    let free: Vec<(&str, &Device)> = devices.iter().copied().filter(|(n, d)| is_free(n, d)).collect();

    let fitting: Vec<Vec<usize>> = wanted
        .iter()
        .map(|want| {
            let fits = |have: &Device| is_alike(want.device, have, checks) && covers(have, want.features);
            free.iter().enumerate().filter(|(_, (_, have))| fits(have)).map(|(index, _)| index).collect()
        })
        .collect();
    let matched = assign(&fitting);

    let mut pairs = Vec::new();
    for (want, index) in wanted.iter().zip(matched) {
        let Some((target, _)) = index.and_then(|index| free.get(index)) else {
            return Err(Lack::of(name, &devices, wanted, taken, checks));
        };
        pairs.push(Pair {
            source: want.name.to_owned(),
            target: (*target).to_owned(),
            driver: want.device.driver.clone(),
            model: want.device.model.clone(),
            features: want.features.to_vec(),
        });
    }
    Ok(pairs)
}

/// A device has the driver and the model that another one has.
pub(super) fn is_alike(want: &Device, have: &Device, checks: Checks) -> bool {
    want.driver == have.driver && (want.model == have.model || !checks.device_model)
}

/// The features that a device needs to take over from another one that has them, with the kernel's names. Not
/// PRE_COPY: a device that only loads has no use for it.
pub(super) const NEEDED: [(MigrationFeature, &str); 2] =
    [(MigrationFeature::StopCopy, "STOP_COPY"), (MigrationFeature::P2p, "P2P")];

fn covers(have: &Device, features: &[MigrationFeature]) -> bool {
    NEEDED.iter().all(|(feature, _)| !features.contains(feature) || have.features.known().contains(feature))
}

/// A matching of as many left nodes as possible (augmenting paths). `edges[left]` holds right nodes,
/// preferred first. Gives the right node of each left node.
pub(super) fn assign(edges: &[Vec<usize>]) -> Vec<Option<usize>> {
    let mut left_of: BTreeMap<usize, usize> = BTreeMap::new();
    for left in 0..edges.len() {
        augment(left, edges, &mut left_of, &mut BTreeSet::new());
    }
    let mut right_of = vec![None; edges.len()];
    for (right, left) in left_of {
        if let Some(slot) = right_of.get_mut(left) {
            *slot = Some(right);
        }
    }
    right_of
}

fn augment(
    left: usize,
    edges: &[Vec<usize>],
    left_of: &mut BTreeMap<usize, usize>,
    seen: &mut BTreeSet<usize>,
) -> bool {
    let reachable = edges.get(left).map_or(&[][..], Vec::as_slice);
    // A free node comes first, so that earlier choices stand unless they must give way.
    if let Some(&right) = reachable.iter().find(|right| !left_of.contains_key(right)) {
        left_of.insert(right, left);
        return true;
    }
    for &right in reachable {
        if !seen.insert(right) {
            continue;
        }
        if let Some(holder) = left_of.get(&right).copied()
            && augment(holder, edges, left_of, seen)
        {
            left_of.insert(right, left);
            return true;
        }
    }
    false
}
