//! Which free device of a node can take over from which device of a VM.
//!
//! A device can take over if its driver and model are the same and it can be stopped in the same ways: then
//! it takes the state that the other one gives. Finding a pair for each is a matching in a bipartite graph;
//! taking the first that fits could give away the only device that another one needs.

use std::collections::{BTreeMap, BTreeSet};

use super::fit::{Taken, Wanted, covers, is_alike};
use super::lack::Lack;
use super::{Checks, Pair};
use crate::inventory::{Device, Node};

/// Pairs every wanted device with a free one of `node`, in a way that depends on nothing but the arguments.
///
/// # Errors
/// What the node lacks.
pub(super) fn pairs(
    name: &str,
    node: &Node,
    wanted: &[Wanted<'_>],
    taken: &Taken<'_>,
    checks: Checks,
) -> Result<Vec<Pair>, Lack> {
    let devices: Vec<(&str, &Device)> = node
        .report
        .iter()
        .flat_map(|report| report.devices.iter())
        .map(|(device_name, device)| (device_name.as_str(), device))
        .collect();
    let is_free = |device_name: &str, device: &Device| device.free && !taken.is_taken(name, device_name);
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
