//! The operator against a real API server (1.20), with agents that the tests play: what it asks of whom and when, and what it
//! shows. That the agents then do it is shown elsewhere, on real devices.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

mod attempts;
mod budget;
mod doubt;
mod fake_agent;
mod giving_up;
mod joining;
mod leading;
mod refusals;
mod reports;
mod success;
mod world;
