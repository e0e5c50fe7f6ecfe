//! The hand-over in a model of the world: the product's own machines of both ends and the operator's
//! resolver, where every message outside the stream may be lost, late or repeated, the stream may break
//! anywhere, and agents, VMMs, devices and disks fail at any step. There is one world and two explorers: an
//! exhaustive search for small worlds, and random walks for large ones.
//!
//! `SLACKWATER_MODEL_FAULTS=4 cargo test -p slackwater-handover --test model -- --ignored --nocapture` goes
//! deeper than every build does; `SLACKWATER_MODEL_WALKS` is the number of random walks.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

mod crashes;
mod effects;
mod exhaustive;
mod healing;
mod kinds;
mod messages;
mod mutants;
mod operator;
mod properties;
mod random;
mod random_tests;
mod rules;
mod second_migration;
mod steps;
mod world;
