//! Why a migration cannot be: for a condition's reason, and with a message that a person can act on.

use std::fmt;

use strum::IntoStaticStr;

use super::Lack;
use crate::inventory::{Blocker, VmKey};

/// How many names a message lists before it only counts them.
const LISTED: usize = 5;

/// A request that cannot work. Nothing has been touched.
///
/// The name of a variant is its reason in a condition, unless it says otherwise. Troubleshooting is listed by
/// it.
#[derive(Debug, Clone, PartialEq, Eq, IntoStaticStr)]
pub enum Refusal {
    /// A value of the spec makes no sense.
    InvalidSpec {
        /// What is wrong, which value, what would be right.
        message: String,
    },
    /// No node reports the VM.
    #[strum(serialize = "VMNotFound")]
    VmNotFound {
        /// The VM.
        vm: VmKey,
        /// VMs that may have been meant.
        known: Vec<VmKey>,
        /// Nodes that cannot be asked.
        silent_nodes: Vec<String>,
        /// There is no MigrationNode at all.
        no_nodes: bool,
    },
    /// Several nodes report the VM.
    #[strum(serialize = "VMReportedTwice")]
    ReportedTwice {
        /// The VM.
        vm: VmKey,
        /// The nodes.
        nodes: Vec<String>,
    },
    /// The node of the VM does not answer.
    SourceNotReady {
        /// The VM.
        vm: VmKey,
        /// The node.
        node: String,
        /// Why it does not answer.
        error: String,
    },
    /// Another migration has the VM.
    MigrationInProgress {
        /// The VM.
        vm: VmKey,
        /// The other migration.
        by: String,
    },
    /// The VM's agent names reasons against any migration. The first of them is the condition's reason.
    NotMigratable {
        /// The VM.
        vm: VmKey,
        /// Its node.
        node: String,
        /// The reasons; at least one.
        blockers: Vec<Blocker>,
    },
    /// More than one device, and not all can be quiesced.
    PeerToPeerUnsupported {
        /// The VM.
        vm: VmKey,
        /// Those that cannot.
        devices: Vec<String>,
    },
    /// There is no such node.
    TargetNotFound {
        /// What was asked for.
        target: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The VM is there already.
    TargetIsSource {
        /// The VM.
        vm: VmKey,
        /// The node.
        node: String,
    },
    /// The node asked for does not answer.
    TargetNotReady {
        /// The node.
        target: String,
        /// Why it does not answer.
        error: String,
    },
    /// The node asked for does not have the devices.
    NoMatchingDevices {
        /// The VM.
        vm: VmKey,
        /// What it lacks.
        lack: Lack,
    },
    /// No node has the devices.
    NoSuitableNode {
        /// The VM.
        vm: VmKey,
        /// Its node.
        source: String,
        /// What each of the other nodes lacks.
        lacks: Vec<String>,
    },
}

impl Refusal {
    /// CamelCase, for a condition's reason.
    pub fn reason(&self) -> &str {
        match self {
            Self::NotMigratable { blockers, .. } => {
                blockers.first().map_or_else(|| self.into(), |blocker| blocker.reason.as_str())
            }
            _ => self.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidSpec { message } => f.write_str(message),
            Self::VmNotFound { vm, known, silent_nodes, no_nodes } => {
                write!(f, "No node reports a VM {vm}.")?;
                if *no_nodes {
                    return write!(f, " There is no MigrationNode; create one for each host with an agent.");
                }
                if !silent_nodes.is_empty() {
                    write!(f, " Not asked, since not Ready: {}.", list(silent_nodes))?;
                }
                if !known.is_empty() {
                    write!(f, " Reported are: {}.", list(known))?;
                }
                write!(f, " `kubectl get assignedvms -A` lists all of them.")
            }
            Self::ReportedTwice { vm, nodes } => write!(
                f,
                "VM {vm} is reported by several nodes: {}. It may be running twice; find out which copy is the VM, and \
                 end the other before anything else.",
                list(nodes)
            ),
            Self::SourceNotReady { vm, node, error } => write!(
                f,
                "VM {vm} was last seen on {node}, and that node is not Ready: {error}. Bring its agent back first."
            ),
            Self::MigrationInProgress { vm, by } => write!(
                f,
                "VM {vm} is already being migrated by {by}. Wait until it has ended, or delete it to give it up."
            ),
            Self::NotMigratable { vm, node, blockers } => {
                write!(f, "VM {vm} on {node} cannot be migrated: ")?;
                let messages: Vec<&str> = blockers.iter().map(|b| b.message.trim_end_matches('.')).collect();
                write!(f, "{}.", messages.join("; "))?;
                if blockers.iter().all(|b| b.lifted_by_assume_isolated) {
                    write!(f, " {ASSUME_ISOLATED}")?;
                }
                Ok(())
            }
            Self::PeerToPeerUnsupported { vm, devices } => write!(
                f,
                "VM {vm} has several devices, and these cannot be quiesced before they are stopped, since \
                 their drivers do not support P2P: {}. {ASSUME_ISOLATED}",
                list(devices)
            ),
            Self::TargetNotFound { target, known } if known.is_empty() => write!(
                f,
                "There is no MigrationNode {target:?}, nor any other that could be the target. Create one for the host \
                 that the VM shall go to."
            ),
            Self::TargetNotFound { target, known } => {
                write!(f, "There is no MigrationNode {target:?}. There are: {}.", list(known))
            }
            Self::TargetIsSource { vm, node } => write!(
                f,
                "VM {vm} is on {node} already. Name another node in spec.target.nodeName, or leave it out."
            ),
            Self::TargetNotReady { target, error } => {
                write!(
                    f,
                    "The target {target} is not Ready: {error}. Bring its agent back, or name another node."
                )
            }
            Self::NoMatchingDevices { vm, lack } => write!(
                f,
                "The devices of VM {vm} have no match: {lack}. Free the devices, or name another node."
            ),
            Self::NoSuitableNode { vm, source, lacks } if lacks.is_empty() => write!(
                f,
                "There is no node that VM {vm} could go to: {source}, where it is, is the only MigrationNode."
            ),
            Self::NoSuitableNode { vm, lacks, .. } => {
                write!(f, "No node has free devices that match those of VM {vm}: {}.", list_of(lacks, "; "))
            }
        }
    }
}

const ASSUME_ISOLATED: &str =
    "If its devices never talk to each other, state so by spec.peerToPeer: AssumeIsolated.";

fn list<T: fmt::Display>(items: &[T]) -> String {
    list_of(items, ", ")
}

fn list_of<T: fmt::Display>(items: &[T], separator: &str) -> String {
    let mut text: Vec<String> = items.iter().take(LISTED).map(ToString::to_string).collect();
    if items.len() > LISTED {
        text.push(format!("{} more", items.len() - LISTED));
    }
    text.join(separator)
}
