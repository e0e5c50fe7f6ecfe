//! The operator of Slackwater: plans and watches migrations; the agents on the nodes carry them out.

#![forbid(unsafe_code)]

pub mod crds;
pub mod inventory;
pub mod plan;
