//! An attempt to migrate one VM, at one end: carries out the effects of the core ([`slackwater_handover`]),
//! and turns what happens into its events.
//!
//! | file | what it is about |
//! |---|---|
//! | [`source`], [`destination`] | one end each: the task that owns the state machine, and the handle to it |
//! | `device.rs`, `vmm_calls.rs` | what both ends do to a device, and ask of a VMM |
//! | `tasks.rs` | runs the future of an effect and sends the signal that it yields |
//! | `sending.rs`, `rounds.rs`, `receiving.rs` | a blob between a device or a VMM and the wire |
//! | [`link`], `answers.rs` | the source's connections to the destination, and what its answers mean |
//! | [`unheard`] | a source that keeps the VM, and a destination that may not know |
//! | [`ledger`], [`entry`] | the journal of the attempt: when it is written, and what it contains |
//! | [`events`] | the events of the attempt, for the operator |
//! | `limits.rs`, `timings.rs` | how long a phase may last, and how long the parts of the migration took |
//!
//! Arrows: `source/` and `destination/` use the other files and never each other. `answers.rs`, `limits.rs`,
//! `rounds.rs` and `timings.rs` are pure. From outside, only `service/` uses this folder; it uses the core, `proto/`,
//! `transfer/`, `journal/`, `vmm/`, `vfio/`,
//! `host/` and `faults/`.

mod answers;
pub mod destination;
mod device;
pub mod entry;
pub mod events;
pub mod ledger;
mod limits;
pub mod link;
mod receiving;
mod rounds;
mod sending;
pub mod source;
mod tasks;
#[cfg(test)]
pub(crate) mod tests;
mod timings;
pub mod unheard;
mod vmm_calls;
