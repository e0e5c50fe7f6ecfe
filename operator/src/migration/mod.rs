//! Migrations: from an accepted VMMigration to its end.
//!
//! | module | what it knows |
//! |---|---|
//! | [`step`] | what comes next (pure) |
//! | [`fact`] | what the status says of what has become known (pure) |
//! | [`trace`] | the events of an attempt (pure) |
//! | [`request`] | what the agents are asked (pure) |
//! | [`claims`] | which VMs and devices are spoken for |
//! | [`controller`] | which objects need attention |
//! | `run`, `follow`, `inquiry`, `retry` | one migration: asks the agents and writes the status |

pub mod claims;
pub mod controller;
pub mod fact;
mod follow;
mod inquiry;
pub mod request;
mod retry;
mod run;
pub mod step;
pub mod trace;

pub use slackwater_handover::resolver;
