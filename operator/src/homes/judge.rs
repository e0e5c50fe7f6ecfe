//! Whose report of a VM counts: a pure function of what is known, what is reported, and our own migrations.
//!
//! An agent may report a VM of any name. The node that is known to have the VM keeps it: another one that
//! reports the name is set aside, and cannot make the VM unusable, or have a copy of its own taken for it.
//! Who is known changes only
//!
//! - by a migration of our own: when the source itself says that the VM is paused for it, or does not have the
//!   VM any more, and the target that the VM runs; or when the migration has succeeded;
//! - when the known agent is connected and has not reported the VM for [`GRACE`];
//! - when the node's MigrationNode is deleted.
//!
//! A known agent that is only silent keeps the VM. Who reports a name first is known from then on.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::inventory::{Inventory, Link, Vm, VmKey, VmReport, VmState, reports_of};
use crate::moment::Moment;

/// For how long a connected agent must not report a VM before another one may: an agent that was restarted
/// may find its VMs one after the other.
pub const GRACE: Duration = Duration::from_secs(5);

/// The node that is known to have a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// Its name.
    pub node: String,
    /// Since when, in whole seconds like the times in statuses.
    pub since: Timestamp,
    /// Since when its agent has been connected without reporting the VM, by this operator's clock.
    pub missing_since: Option<Instant>,
}

/// A migration of our own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The id by which the agents know it.
    pub id: String,
    /// The VM.
    pub vm: VmKey,
    /// Where it comes from.
    pub source: String,
    /// Where it goes.
    pub target: String,
    /// When it has succeeded. `None`: it is under way.
    pub succeeded: Option<Timestamp>,
}

/// What becomes of the reports of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// The node whose report counts. `None`: no node reports it, or several do that have the same right.
    pub home: Option<Home>,
    /// Other nodes that report the VM, and must not.
    pub set_aside: Vec<String>,
}

/// Judges the reports of one VM. `settled`: every agent has reported or failed once, so that who reports a new
/// name alone is the only one.
pub fn judge(
    vm: &VmKey,
    known: Option<&Home>,
    inventory: &Inventory,
    moves: &[Move],
    settled: bool,
    now: Moment,
) -> Judged {
    let reports = reports_of(inventory, vm);
    let moves: Vec<&Move> = moves.iter().filter(|a_move| a_move.vm == *vm).collect();
    let home = match known.filter(|known| inventory.contains_key(&known.node)) {
        None if !settled => None,
        None => only(&reports, now),
        Some(known) => Some(follow(known, inventory, &reports, &moves, now)),
    };
    let Some(home) = home else { return Judged::default() };
    let is_expected = |report: &VmReport<'_>| {
        let under_way = |a_move: &&Move| {
            a_move.succeeded.is_none()
                && [&a_move.source, &a_move.target].into_iter().any(|end| end == report.name)
        };
        // A copy that a migration keeps stopped.
        is_handed_over(report.vm) || moves.iter().any(under_way)
    };
    let others = reports.iter().filter(|report| report.name != home.node && !is_expected(report));
    let set_aside = others.map(|report| report.name.to_owned()).collect();
    Judged { home: Some(home), set_aside }
}

/// Where a VM is that was known to be at a node that still exists.
fn follow(
    known: &Home,
    inventory: &Inventory,
    reports: &[VmReport<'_>],
    moves: &[&Move],
    now: Moment,
) -> Home {
    let report_of = |node: &str| reports.iter().find(|report| report.name == node).map(|report| report.vm);
    let own = report_of(&known.node);
    let is_missing = own.is_none() && inventory.get(&known.node).is_some_and(|node| node.link == Link::Ready);

    let has_moved = |a_move: &&&Move| {
        let Some(there) = report_of(&a_move.target).filter(|_| a_move.source == known.node) else {
            return false;
        };
        match a_move.succeeded {
            Some(when) => when >= known.since,
            None => {
                let conceded =
                    own.map_or(is_missing, |own| is_handed_over(own) && own.migration_id == a_move.id);
                conceded && there.state == VmState::Running
            }
        }
    };
    if let Some(a_move) = moves.iter().find(has_moved) {
        return at(&a_move.target, now);
    }
    let missing_since = is_missing.then(|| known.missing_since.unwrap_or(now.clock));
    let is_gone = missing_since.is_some_and(|since| now.clock.duration_since(since) >= GRACE);
    let successor = if is_gone { only(reports, now) } else { None };
    successor.unwrap_or_else(|| Home { missing_since, ..known.clone() })
}

/// The only node that reports a VM whose node is not known; copies that a migration keeps stopped do not
/// count.
fn only(reports: &[VmReport<'_>], now: Moment) -> Option<Home> {
    if let [report] = reports {
        return Some(at(report.name, now));
    }
    let mut remaining = reports.iter().filter(|report| !is_handed_over(report.vm));
    match (remaining.next(), remaining.next()) {
        (Some(report), None) => Some(at(report.name, now)),
        _ => None,
    }
}

fn at(node: &str, now: Moment) -> Home {
    let since = Timestamp::from_second(now.time.as_second()).unwrap_or(now.time);
    Home { node: node.to_owned(), since, missing_since: None }
}

/// It is a copy that a migration keeps stopped.
fn is_handed_over(vm: &Vm) -> bool {
    vm.state != VmState::Running && !vm.migration_id.is_empty()
}
