//! What is known about every agent, and who waits for changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use slackwater_proto::tonic::transport::Channel;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Address, CallError};
use crate::changes::{Publisher, Subscription};
use crate::epoch::{Epoch, EpochClaim};
use crate::inventory::{Inventory, Link, Node, NodeReport};

/// What is known about every agent.
#[derive(Default)]
pub(super) struct Index {
    state: watch::Sender<State>,
    /// The nodes that have changed.
    changed: Publisher<String>,
}

#[derive(Default)]
struct State {
    /// All MigrationNodes are known.
    primed: bool,
    inventory: Arc<Inventory>,
    channels: BTreeMap<String, Channel>,
    /// Each ends the task that follows a node when it is dropped.
    guards: BTreeMap<String, DropGuard>,
}

/// A node that the caller must follow from now on, until the token is cancelled.
pub(super) struct Newcomer {
    pub(super) name: String,
    pub(super) address: String,
    pub(super) token: CancellationToken,
}

impl Index {
    /// Makes the nodes those of the map. Returns the new ones and those with another address.
    pub(super) fn follow(&self, wanted: &BTreeMap<String, Address>) -> Vec<Newcomer> {
        let (mut newcomers, mut changed) = (Vec::new(), Vec::new());
        self.state.send_if_modified(|state| {
            let first = !std::mem::replace(&mut state.primed, true);
            let is_known = |name: &String, address: &Address| {
                let node = state.inventory.get(name);
                node.is_some_and(|node| node.address == address.own && node.peer_address == address.peers)
            };
            let fresh: Vec<_> = wanted.iter().filter(|(name, address)| !is_known(name, address)).collect();
            let gone = state.inventory.keys().any(|name| !wanted.contains_key(name));
            let is_accepted = |(name, address): (&String, &Address)| {
                state.inventory.get(name).is_none_or(|node| node.accepted_epoch == address.accepted_epoch)
            };
            if fresh.is_empty() && !gone && wanted.iter().all(is_accepted) {
                return first;
            }
            changed.extend(wanted.keys().chain(state.inventory.keys()).cloned());
            let inventory = Arc::make_mut(&mut state.inventory);
            for (name, node) in inventory.iter_mut() {
                node.accepted_epoch = wanted.get(name).and_then(|address| address.accepted_epoch);
                let accepted = node.accepted_epoch.unwrap_or_default();
                // Whether it is believed now, the next call or report shows.
                node.epoch_claim.take_if(|claim| claim.known <= accepted);
            }
            inventory.retain(|name, _| wanted.contains_key(name));
            state.guards.retain(|name, _| wanted.contains_key(name));
            state.channels.retain(|name, _| wanted.contains_key(name));
            for (name, address) in fresh {
                let node = Node {
                    address: address.own.clone(),
                    peer_address: address.peers.clone(),
                    accepted_epoch: address.accepted_epoch,
                    ..Node::default()
                };
                inventory.insert(name.clone(), node);
                state.channels.remove(name);
                let token = CancellationToken::new();
                state.guards.insert(name.clone(), token.clone().drop_guard());
                newcomers.push(Newcomer { name: name.clone(), address: address.own.clone(), token });
            }
            true
        });
        self.changed.publish(changed);
        newcomers
    }

    pub(super) fn inventory(&self) -> Arc<Inventory> {
        Arc::clone(&self.state.borrow().inventory)
    }

    /// Nodes that are still connecting; `None` if the nodes themselves are not known yet.
    pub(super) fn undecided(&self) -> Option<Vec<String>> {
        let state = self.state.borrow();
        let connecting =
            |(name, node): (&String, &Node)| (node.link == Link::Connecting).then(|| name.clone());
        state.primed.then(|| state.inventory.iter().filter_map(connecting).collect())
    }

    pub(super) fn changes(&self) -> Changes {
        Changes { receiver: self.state.subscribe() }
    }

    pub(super) fn changed_nodes(&self) -> Subscription<String> {
        self.changed.subscribe(self.state.borrow().inventory.keys().cloned())
    }

    /// The channel to an agent that reports.
    pub(super) fn channel(&self, node: &str) -> Result<Channel, CallError> {
        let known = self.known(node)?;
        match known.not_ready_reason() {
            None => self.connected(node),
            Some(error) => Err(CallError::NotReady { node: node.to_owned(), error }),
        }
    }

    /// The channel to an agent, whether it reports or not.
    pub(super) fn connected(&self, node: &str) -> Result<Channel, CallError> {
        let known = self.known(node)?;
        let channel = self.state.borrow().channels.get(node).cloned();
        let error = || known.not_ready_reason().unwrap_or_default();
        channel.ok_or_else(|| CallError::NotReady { node: node.to_owned(), error: error() })
    }

    /// What is known about a node.
    pub(super) fn known(&self, node: &str) -> Result<Node, CallError> {
        let known = self.state.borrow().inventory.get(node).cloned();
        known.ok_or_else(|| CallError::NoSuchNode { node: node.to_owned() })
    }

    /// The agent of a node has reported, on this channel.
    pub(super) fn report(
        &self,
        name: &str,
        address: &str,
        channel: Option<&Channel>,
        report: NodeReport,
        epoch: &Epoch,
    ) {
        self.update(name, address, |node, channels| {
            node.link = Link::Ready;
            if report.known_epoch > 0 {
                node.epoch_claim = epoch.doubt(report.known_epoch, node.accepted_epoch);
            }
            node.report = Some(Arc::new(report));
            if let Some(channel) = channel {
                channels.insert(name.to_owned(), channel.clone());
            }
        });
    }

    /// The agent of a node does not answer. `channel`: it is connected all the same.
    pub(super) fn lost(&self, name: &str, address: &str, link: Link, channel: Option<&Channel>) {
        self.update(name, address, |node, channels| {
            node.link = link;
            // It may be another agent, or one that has forgotten it, when it is connected again.
            node.epoch_claim = None;
            match channel {
                Some(channel) => channels.insert(name.to_owned(), channel.clone()),
                None => channels.remove(name),
            };
        });
    }

    /// The agent of a node refuses calls, by an epoch that is not believed.
    pub(super) fn set_aside(&self, name: &str, claim: EpochClaim) {
        let Ok(node) = self.known(name) else { return };
        self.update(name, &node.address, |node, _| node.epoch_claim = Some(claim));
    }

    /// The operator's epoch has risen: what was too high for it may not be any more.
    pub(super) fn epoch_rose(&self, own: u64) {
        let mut changed = Vec::new();
        self.state.send_if_modified(|state| {
            let overtaken = |node: &Node| node.epoch_claim.as_ref().is_some_and(|claim| claim.known < own);
            let any = state.inventory.values().any(overtaken);
            if any {
                let inventory = Arc::make_mut(&mut state.inventory);
                for (name, node) in inventory.iter_mut().filter(|(_, node)| overtaken(node)) {
                    node.epoch_claim = None;
                    changed.push(name.clone());
                }
            }
            any
        });
        self.changed.publish(changed);
    }

    /// Only if the node still has that address: a task that was just cancelled must not report for its
    /// successor.
    fn update(
        &self,
        name: &str,
        address: &str,
        change: impl FnOnce(&mut Node, &mut BTreeMap<String, Channel>),
    ) {
        let modified = self.state.send_if_modified(|state| {
            let Some(known) = state.inventory.get(name).filter(|node| node.address == address) else {
                return false;
            };
            let mut node = known.clone();
            change(&mut node, &mut state.channels);
            let modified = node != *known;
            if modified {
                Arc::make_mut(&mut state.inventory).insert(name.to_owned(), node);
            }
            modified
        });
        if modified {
            self.changed.publish([name.to_owned()]);
        }
    }
}

/// Reports when something about the agents has changed.
pub struct Changes {
    receiver: watch::Receiver<State>,
}

impl Changes {
    /// Returns at the next change since the last call.
    pub async fn next(&mut self) {
        // The sender lives as long as the fleet, and so does everything that waits here.
        if self.receiver.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(nodes: &[(&str, &str)]) -> BTreeMap<String, Address> {
        let address =
            |own: &str| Address { own: own.to_owned(), peers: own.to_owned(), accepted_epoch: None };
        nodes.iter().map(|(name, own)| ((*name).to_owned(), address(own))).collect()
    }

    fn epoch() -> Epoch {
        Epoch::new(1, tokio::time::Instant::now() + std::time::Duration::from_secs(60)).0
    }

    fn woken(changes: &mut Changes) -> bool {
        let woken = changes.receiver.has_changed().unwrap();
        changes.receiver.mark_unchanged();
        woken
    }

    #[test]
    fn a_report_that_was_known_already_wakes_no_task() {
        let index = Index::default();
        let mut changes = index.changes();
        assert_eq!(index.undecided(), None);
        assert_eq!(index.follow(&wanted(&[("a", "h:1")])).len(), 1);
        assert!(woken(&mut changes));
        assert_eq!(index.undecided(), Some(vec!["a".to_owned()]));
        assert_eq!(index.follow(&wanted(&[("a", "h:1")])).len(), 0);
        assert!(!woken(&mut changes));

        index.report("a", "h:1", None, NodeReport::default(), &epoch());
        assert!(woken(&mut changes));
        index.report("a", "h:1", None, NodeReport::default(), &epoch());
        assert!(!woken(&mut changes));
        index.lost("a", "h:1", Link::Down { reason: "AgentUnreachable", error: "x".into() }, None);
        assert!(woken(&mut changes));
        assert_eq!(index.undecided(), Some(vec![]));
    }

    #[test]
    fn an_agent_with_a_high_epoch_is_set_aside_alone_until_it_is_accepted_overtaken_or_forgotten() {
        let (index, epoch) = (Index::default(), epoch());
        let nodes = [("a", "h:1"), ("b", "h:2")];
        index.follow(&wanted(&nodes));
        let reports = |known_epoch| {
            for (name, address) in nodes {
                let known_epoch = if name == "a" { known_epoch } else { 1 };
                let report = NodeReport { known_epoch, ..NodeReport::default() };
                index.report(name, address, None, report, &epoch);
            }
        };
        let ready = || index.inventory().values().map(Node::is_ready).collect::<Vec<_>>();
        reports(5000);
        assert_eq!(ready(), [false, true]);
        // Seen when it refuses a call, by an agent that does not report its epoch.
        reports(0);
        assert_eq!(ready(), [false, true]);
        // It has forgotten it.
        reports(1);
        assert_eq!(ready(), [true, true]);

        index.set_aside("a", epoch.doubt(5000, None).unwrap());
        assert!(
            matches!(index.channel("a"), Err(CallError::NotReady { error, .. }) if error.contains("5000"))
        );
        let mut accepted = wanted(&nodes);
        accepted.get_mut("a").unwrap().accepted_epoch = Some(4999);
        index.follow(&accepted);
        assert_eq!(ready(), [false, true]);
        accepted.get_mut("a").unwrap().accepted_epoch = Some(5000);
        assert!(index.follow(&accepted).is_empty(), "it is not connected to again");
        assert_eq!(ready(), [true, true]);

        index.set_aside("a", epoch.doubt(6000, None).unwrap());
        index.epoch_rose(6000);
        assert_eq!(ready(), [false, true]);
        index.epoch_rose(6001);
        assert_eq!(ready(), [true, true]);
    }

    #[test]
    fn a_task_of_an_old_address_is_ended_and_its_reports_are_ignored() {
        let index = Index::default();
        let old = index.follow(&wanted(&[("a", "h:1")])).remove(0);
        let new = index.follow(&wanted(&[("a", "h:2")])).remove(0);
        assert!(old.token.is_cancelled() && !new.token.is_cancelled());
        index.report("a", "h:1", None, NodeReport::default(), &epoch());
        assert_eq!(index.inventory()["a"].link, Link::Connecting);
        index.report("a", "h:2", None, NodeReport::default(), &epoch());
        assert_eq!(index.inventory()["a"].link, Link::Ready);

        let mut changes = index.changes();
        assert!(index.follow(&wanted(&[])).is_empty());
        assert!(woken(&mut changes) && new.token.is_cancelled());
        assert!(matches!(index.channel("a"), Err(CallError::NoSuchNode { .. })));
    }
}
