//! The hand-over: how exactly one of two nodes ends up running the VM.
//!
//! ```text
//!  source                                            destination
//!  Connecting ─────────── Hello ───────────────────▶ Reserved (twin paused, devices in RESUMING)
//!             ◀────────── Ready ────────────────────
//!  PreCopying ─────────── blobs ───────────────────▶ Loading
//!  Pausing, Quiescing, Stopping     slack water
//!  Capturing  ─────────── blobs, trailers ─────────▶ Loading: lengths and digests verified
//!                                                    Verifying: RESUMING -> STOP, read back
//!             ◀────────── Loaded ───────────────────  Loaded
//!  Committing              point of no return
//!  AwaitingStarted ────── Commit ──────────────────▶ Starting: from here the source's copy is dead
//!                                                    RUNNING_P2P, RUNNING, vCPUs
//!             ◀────────── Started ──────────────────  Running
//!  Releasing
//! ```
//!
//! Any failure before Committing ends in a rollback at the source and a discard at the destination. After it
//! the source acts on what the destination has journalled, and on nothing else: RUNNING ends it, DISCARDED
//! lets it roll back, and until it receives one of these it asks.
//!
//! | module | what it decides |
//! |---|---|
//! | [`source`], [`destination`] | what the agent of each end does next |
//! | [`resolver`] | what the operator relays between two agents that cannot settle it themselves |
//! | [`policy`] | which order of stops is safe for a VM's devices |
//! | [`devices`], [`state`] | where devices are, and which states, arcs and paths a device has |
//! | [`record`], [`failure`], [`blob`] | the words that all of them use |
//!
//! All of it is pure: `step(state, event) -> (state, effects)`, without a clock, a runtime, a transport or a
//! file. The node agent and the operator perform the effects and turn what happens into events. This crate's
//! tests explore the same code in a model of the world, exhaustively and at random.

pub mod blob;
pub mod destination;
pub mod devices;
pub mod failure;
pub mod policy;
pub mod record;
pub mod resolver;
pub mod source;
pub mod state;

pub use blob::{Blob, blobs};
pub use failure::{Failure, Reason};
pub use record::{Record, Word};
