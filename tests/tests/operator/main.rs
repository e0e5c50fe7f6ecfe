//! The operator against a real API server (1.20), with fake agents: which calls it makes and when, and which
//! status it writes. Other tests show on real devices that the agents carry out these calls.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod aborting;
mod attempts;
mod budget;
mod doubt;
mod ended;
mod fake_agent;
mod hanging;
mod joining;
mod leading;
mod lost_source;
mod names;
mod objects;
mod refusals;
mod reports;
mod success;
mod world;
