//! The agent's gRPC services, and what they share.
//!
//! | module | what it is about |
//! |---|---|
//! | [`node`], [`transfer`] | the calls, for the operator and for other agents |
//! | [`attempts`] | beginning an attempt, and taking one up again after a restart |
//! | [`registry`] | the migrations that this node takes part in, and who may call for them |
//! | [`inventory`] | the node's VMs and devices, and what blocks a migration |
//! | `vmms`, `connections`, `watching` | the VMMs that answer, and what they say without being asked |
//! | `asking`, `borrowing` | questions to the kernel that may hang; the devices of a VM, borrowed from its VMM |
//! | `preflight` | whether this node's QEMU could take over a VM |
//! | `whole` | calls that outlive their caller |
//! | `request`, `reason`, [`NodeConfig`] | what a request must look like, the reasons, the configuration |

mod asking;
pub mod attempts;
mod blockers;
mod borrowing;
mod config;
mod connections;
pub mod inventory;
pub mod node;
mod preflight;
mod reason;
pub mod registry;
mod request;
pub mod transfer;
mod vmms;
mod watching;
mod whole;

pub use config::NodeConfig;
