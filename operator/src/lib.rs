//! The operator of Slackwater: plans and watches migrations; the agents on the nodes carry them out.
//!
//! | module | what it knows |
//! |---|---|
//! | [`inventory`], [`plan`], [`conditions`] | plain data and decisions: no client, no gRPC, no clock |
//! | [`leadership`], [`epoch`] | which of several operators acts, and how the agents tell them apart |
//! | [`fleet`] | the agents: one open `Watch` for each |
//! | [`migration`] | one VMMigration, from its plan to its end |
//! | [`publish`] | MigrationNodes and AssignedVMs, written from what the agents report |
//! | [`cluster`] | the Kubernetes API |
//! | [`homes`] | which node is known to have which VM |
//! | [`changes`] | who has to look at what again |
//! | [`crds`] | the YAML of the CRDs |

#![forbid(unsafe_code)]

mod backoff;
pub mod changes;
pub mod cluster;
pub mod conditions;
pub mod crds;
pub mod epoch;
pub mod fleet;
pub mod homes;
pub mod inventory;
pub mod leadership;
mod lifecycle;
pub mod migration;
pub mod moment;
pub mod notice;
pub mod plan;
pub mod publish;
mod reason;

pub use lifecycle::{Policy, RunError, run};
