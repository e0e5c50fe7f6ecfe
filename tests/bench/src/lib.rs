//! Benchmarks. [`fleet`] is about many migrations at once; all else is about one.
//!
//! That measures Slackwater's migration of a QEMU VM against QEMU's own, on the same two nodes, in turns.
//!
//! *Plain* is QEMU's `migrate` over TCP between the nodes, requested by QMP on a monitor of the lab, to a
//! QEMU that runs as soon as it has loaded; the agents are not involved. *Product* is `kubectl apply`,
//! operator and agents. Both have the same `downtime-limit`, `max-bandwidth` and
//! `avail-switchover-bandwidth`. Plain has no capabilities but `events` and `return-path`, so that QEMU's own
//! `downtime` means the same for both: until the destination has loaded everything.
//!
//! The common measure is the kernels' ([`marks`]): from the source's last run of a vCPU to the destination's
//! first. Nodes are emulated and share this machine's processors, so compare only figures of one run, and
//! only by their ratio.

pub mod figures;
pub mod fleet;
pub mod marks;
mod measurement;
pub mod report;
mod run;

pub use measurement::{Measurement, Mover};
pub use run::{Bench, Plan};
