//! The agents: who they are, whether they answer, and what they say. One task per MigrationNode keeps a `Watch` open.

mod agent;
mod call;

use std::collections::BTreeMap;
use std::sync::Arc;

use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::transport::Channel;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::inventory::{Inventory, Link, Node, NodeReport};

pub use call::{CallError, Events};

/// What a MigrationNode's spec says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// host:port for the operator.
    pub own: String,
    /// host:port for other agents.
    pub peers: String,
}

/// All agents, and what they have said.
pub struct Fleet {
    state: watch::Sender<State>,
    credentials: Arc<Credentials>,
    tasks: TaskTracker,
}

#[derive(Default)]
struct State {
    /// Every MigrationNode has been seen at least once since the start.
    primed: bool,
    inventory: Arc<Inventory>,
    channels: BTreeMap<String, Channel>,
    /// Ends a node's task when it is dropped.
    guards: BTreeMap<String, DropGuard>,
}

impl Fleet {
    /// Without any node yet. The nodes' tasks run on `tasks`.
    pub fn new(credentials: Credentials, tasks: TaskTracker) -> Arc<Self> {
        Arc::new(Self { state: watch::Sender::default(), credentials: Arc::new(credentials), tasks })
    }

    /// Makes the nodes those of the map: starts to follow new ones and those with another address, forgets others.
    pub fn follow(self: &Arc<Self>, wanted: &BTreeMap<String, Address>) {
        let mut started = Vec::new();
        self.state.send_modify(|state| {
            state.primed = true;
            let inventory = Arc::make_mut(&mut state.inventory);
            inventory.retain(|name, _| wanted.contains_key(name));
            state.guards.retain(|name, _| wanted.contains_key(name));
            state.channels.retain(|name, _| wanted.contains_key(name));
            for (name, address) in wanted {
                let same = inventory
                    .get(name)
                    .is_some_and(|node| node.address == address.own && node.peer_address == address.peers);
                if same {
                    continue;
                }
                let node = Node {
                    address: address.own.clone(),
                    peer_address: address.peers.clone(),
                    link: Link::Connecting,
                    report: None,
                };
                inventory.insert(name.clone(), node);
                state.channels.remove(name);
                let token = CancellationToken::new();
                state.guards.insert(name.clone(), token.clone().drop_guard());
                started.push((name.clone(), address.own.clone(), token));
            }
        });
        for (name, address, token) in started {
            let fleet = Arc::clone(self);
            self.tasks.spawn(async move {
                token.run_until_cancelled(agent::follow(&fleet, &name, &address)).await;
            });
        }
    }

    /// What is known now.
    pub fn inventory(&self) -> Arc<Inventory> {
        Arc::clone(&self.state.borrow().inventory)
    }

    /// Nodes whose agents have neither answered nor failed to since the start; `None` if the nodes themselves are not
    /// known yet. Empty: what is known is good enough to judge by.
    pub fn undecided(&self) -> Option<Vec<String>> {
        let state = self.state.borrow();
        let connecting =
            |(name, node): (&String, &Node)| (node.link == Link::Connecting).then(|| name.clone());
        state.primed.then(|| state.inventory.iter().filter_map(connecting).collect())
    }

    /// Tells when something has changed since it was asked last.
    pub fn changes(&self) -> Changes {
        Changes { receiver: self.state.subscribe() }
    }

    fn channel(&self, node: &str) -> Result<Channel, CallError> {
        let state = self.state.borrow();
        let Some(known) = state.inventory.get(node) else {
            return Err(CallError::NoSuchNode { node: node.to_owned() });
        };
        match (state.channels.get(node), known.not_ready_reason()) {
            (Some(channel), None) => Ok(channel.clone()),
            (_, error) => {
                Err(CallError::NotReady { node: node.to_owned(), error: error.unwrap_or_default() })
            }
        }
    }

    fn report(&self, name: &str, address: &str, channel: &Channel, report: NodeReport) {
        self.update(name, address, |node, channels| {
            node.link = Link::Ready;
            node.report = Some(report);
            channels.insert(name.to_owned(), channel.clone());
        });
    }

    fn lost(&self, name: &str, address: &str, error: String) {
        self.update(name, address, |node, channels| {
            node.link = Link::Down { error };
            channels.remove(name);
        });
    }

    /// Only if the node still has that address: a task that was just cancelled must not speak for its successor.
    fn update(
        &self,
        name: &str,
        address: &str,
        change: impl FnOnce(&mut Node, &mut BTreeMap<String, Channel>),
    ) {
        self.state.send_if_modified(|state| {
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
    }
}

/// Tells when something about the agents has changed.
pub struct Changes {
    receiver: watch::Receiver<State>,
}

impl Changes {
    /// Returns at the next change since the last call.
    pub async fn next(&mut self) {
        // The sender lives as long as the fleet, and with it everything that waits here.
        if self.receiver.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
