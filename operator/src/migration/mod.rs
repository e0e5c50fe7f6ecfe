//! Migrations: from an accepted VMMigration to its end.
//!
//! | module | what it knows |
//! |---|---|
//! | [`step`] | what comes next (pure) |
//! | [`status`] | what the status says about what has become known (pure) |
//! | [`trace`] | the events of an attempt (pure) |
//! | [`request`] | what the agents are asked (pure) |
//! | [`claims`] | which VMs and devices belong to accepted migrations |
//! | [`retention`] | deleting those that have ended |
//! | [`context`] | what all migrations share |
//! | `agenda` | which migrations have a task, and which wait for one (pure) |
//! | [`controller`] | which objects need attention |
//! | `drive` | one migration: takes its steps, one after the other |
//! | `prepare`, `follow`, `release`, `acknowledge` | the steps |
//! | `run` | what every step needs: the object, its attempt, and settling it with both ends |
//! | `tracked` | the object: what the watch says, and writing its status |
//! | `attempt`, `inquiry` | what is known about the current attempt |
//! | `abort`, `journals` | asking an agent to give up, and what it has journalled |
//!
//! The arrows between these modules run downwards in this picture, and none runs back:
//!
//! ```text
//!  controller ─▶ drive ─▶ prepare, follow, release ─▶ run ─▶ attempt ─▶ inquiry ─▶ journals ─▶ request
//!                                   └─▶ abort               └─▶ tracked ─▶ status, context
//! ```

mod abort;
mod acknowledge;
mod agenda;
mod attempt;
pub mod claims;
pub mod context;
pub mod controller;
mod drive;
mod follow;
mod inquiry;
mod journals;
mod prepare;
mod release;
pub mod request;
pub mod retention;
mod run;
pub mod status;
pub mod step;
pub mod trace;
mod tracked;
