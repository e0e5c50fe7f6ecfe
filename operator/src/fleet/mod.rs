//! The agents: who they are, whether they answer, and what they say. One task per MigrationNode keeps a
//! `Watch` open.

mod agent;
mod call;
mod index;
mod limits;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use slackwater_proto::tls::Credentials;
use tokio_util::task::TaskTracker;

use crate::changes::Subscription;
use crate::epoch::Epoch;
use crate::inventory::Inventory;

pub use call::{CallError, Events};
pub use index::Changes;
use index::Index;
use limits::Limits;

/// What a MigrationNode's spec says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// host:port for the operator.
    pub own: String,
    /// host:port for other agents.
    pub peers: String,
    /// The operator epoch up to which its agent is to be believed.
    pub accepted_epoch: Option<u64>,
}

/// All agents, and what they have reported.
pub struct Fleet {
    index: Index,
    credentials: Credentials,
    epoch: Epoch,
    tasks: TaskTracker,
    limits: Limits,
}

impl Fleet {
    /// Without any node yet. The nodes' tasks run on `tasks`; `epoch` goes into every call that an agent acts
    /// by.
    pub fn new(credentials: Credentials, epoch: Epoch, tasks: TaskTracker) -> Arc<Self> {
        Self::with_limits(credentials, epoch, tasks, Limits::default())
    }

    fn with_limits(credentials: Credentials, epoch: Epoch, tasks: TaskTracker, limits: Limits) -> Arc<Self> {
        Arc::new(Self { index: Index::default(), credentials, epoch, tasks, limits })
    }

    /// Makes the nodes those of the map: starts to follow new ones and those with another address, and
    /// forgets others.
    pub fn follow(self: &Arc<Self>, wanted: &BTreeMap<String, Address>) {
        for newcomer in self.index.follow(wanted) {
            let fleet = Arc::clone(self);
            self.tasks.spawn(async move {
                let follow = agent::follow(&fleet, &newcomer.name, &newcomer.address);
                newcomer.token.run_until_cancelled(follow).await;
            });
        }
    }

    /// What is known now. Not to be kept while something is waited for: each change would be made to a copy.
    pub fn inventory(&self) -> Arc<Inventory> {
        self.index.inventory()
    }

    /// Nodes whose agents have neither answered nor failed since the start; `None` if the nodes themselves
    /// are not known yet. Empty: enough is known to plan.
    pub fn undecided(&self) -> Option<Vec<String>> {
        self.index.undecided()
    }

    /// The nodes that have changed since the last look. Begins with all that are known.
    pub fn changed_nodes(&self) -> Subscription<String> {
        self.index.changed_nodes()
    }

    /// Reports when something has changed since the last look.
    pub fn changes(&self) -> Changes {
        self.index.changes()
    }
}
