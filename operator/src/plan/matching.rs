//! Which free device of a node can take over from which device of a VM.
//!
//! A device can take over if its driver and model are the same and it can be stopped in the same ways: then the state that the
//! one gives is a state that the other takes. Finding a pair for each is a matching in a bipartite graph; taking the
//! first that fits could give away the only device that another one needs.

use std::collections::{BTreeMap, BTreeSet};

use slackwater_api::MigrationFeature;

use super::{Checks, OtherMigration, Pair, Wanted};
use crate::inventory::{Device, Node};

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

    fn holder(&self, node: &str, device: &str) -> Option<&str> {
        self.holders.get(&(node.to_owned(), device.to_owned())).map(String::as_str)
    }
}

/// Pairs every wanted device with a free one of `node`, in a way that depends on nothing but the arguments.
///
/// # Errors
/// What the node lacks, in words.
pub(super) fn pairs(
    name: &str,
    node: &Node,
    wanted: &[Wanted<'_>],
    taken: &Taken,
    checks: Checks,
) -> Result<Vec<Pair>, String> {
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
        .map(|(_, want, features)| {
            let fits = |have: &Device| alike(want, have, checks) && covers(have, features);
            free.iter().enumerate().filter(|(_, (_, have))| fits(have)).map(|(index, _)| index).collect()
        })
        .collect();
    let matched = assign(&fitting);

    let mut pairs = Vec::new();
    for ((source, device, features), index) in wanted.iter().zip(matched) {
        let Some((target, _)) = index.and_then(|index| free.get(index)) else {
            return Err(lack(name, &devices, wanted, taken, checks));
        };
        pairs.push(Pair {
            source: (*source).to_owned(),
            target: (*target).to_owned(),
            driver: device.driver.clone(),
            model: device.model.clone(),
            features: features.to_vec(),
        });
    }
    Ok(pairs)
}

fn alike(want: &Device, have: &Device, checks: Checks) -> bool {
    want.driver == have.driver && (want.model == have.model || !checks.device_model)
}

/// The features that a device needs to take over from another which has them, with the kernel's names. Not PRE_COPY: who only
/// loads has no use for it.
const NEEDED: [(MigrationFeature, &str); 2] =
    [(MigrationFeature::StopCopy, "STOP_COPY"), (MigrationFeature::P2p, "P2P")];

fn covers(have: &Device, features: &[MigrationFeature]) -> bool {
    NEEDED.iter().all(|(feature, _)| !features.contains(feature) || have.features.known().contains(feature))
}

/// A matching of as many left nodes as possible (augmenting paths). `edges[left]` holds right nodes, preferred first.
/// Gives the right node of each left node.
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
    // A node that nobody has comes first, so that earlier choices stand unless they must give way.
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

/// What a node lacks, per model: how many are free, how many are needed, and where the others are.
fn lack(
    name: &str,
    devices: &[(&str, &Device)],
    wanted: &[Wanted<'_>],
    taken: &Taken,
    checks: Checks,
) -> String {
    let mut kinds: BTreeMap<(&str, &str), Vec<&Wanted<'_>>> = BTreeMap::new();
    for want in wanted {
        kinds.entry((want.1.driver.as_str(), want.1.model.as_str())).or_default().push(want);
    }
    let mut lacks = Vec::new();
    for ((driver, model), wants) in kinds {
        let Some((_, sample, _)) = wants.first() else { continue };
        let same: Vec<_> = devices.iter().filter(|(_, have)| alike(sample, have, checks)).collect();
        let holder = |device_name: &str, device: &Device| match taken.holder(name, device_name) {
            Some(planned) => Some(planned.to_owned()),
            None if device.free => None,
            None if device.holder.is_empty() => Some("in use".to_owned()),
            None => Some(device.holder.clone()),
        };
        let (free, used): (Vec<_>, Vec<_>) = same.into_iter().partition(|(n, d)| holder(n, d).is_none());
        let count = if free.is_empty() { "no".to_owned() } else { free.len().to_string() };
        let mut text = format!("{name} has {count} free {model} (driver {driver}), {} needed", wants.len());
        if !used.is_empty() {
            let used: Vec<String> =
                used.iter().map(|(n, d)| format!("{n}: {}", holder(n, d).unwrap_or_default())).collect();
            text.push_str(&format!(", not free there: {}", used.join(", ")));
        }
        if free.len() < wants.len() {
            let other = other_models(devices, driver, model);
            if !other.is_empty() {
                text.push_str(&format!(", free there of other models: {other}"));
            }
            lacks.push(text);
            continue;
        }
        let poorer: Vec<String> = free
            .iter()
            .filter_map(|(n, have)| {
                let missing: Vec<&str> = missing_features(have, &wants);
                (!missing.is_empty()).then(|| format!("{n} lacks {}", missing.join(" and ")))
            })
            .collect();
        if !poorer.is_empty() {
            lacks.push(format!("{text}, but {}", poorer.join(", ")));
        }
    }
    lacks.join("; ")
}

fn other_models(devices: &[(&str, &Device)], driver: &str, model: &str) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, device) in devices.iter().filter(|(_, d)| d.free && d.driver == driver && d.model != model) {
        *counts.entry(device.model.as_str()).or_default() += 1;
    }
    counts.iter().map(|(model, count)| format!("{count} {model}")).collect::<Vec<_>>().join(", ")
}

fn missing_features(have: &Device, wants: &[&Wanted<'_>]) -> Vec<&'static str> {
    NEEDED
        .into_iter()
        .filter(|(feature, _)| {
            wants.iter().any(|(_, _, features)| features.contains(feature))
                && !have.features.known().contains(feature)
        })
        .map(|(_, name)| name)
        .collect()
}
