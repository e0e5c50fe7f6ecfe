//! The agent's gRPC services, and what they share: who may do what, what is under way, and what there is on the node.

pub mod registry;
pub mod transfer;
