//! Slackwater's route of moving a VM of QEMU's, measured against QEMU's own on the same two nodes, in turns.
//!
//! *Plain* is QEMU's `migrate` over TCP between the nodes, told by QMP alone, on a monitor of the lab's own, to a QEMU that runs as
//! soon as it has loaded; the agents have no part in it. *Product* is `kubectl apply`, operator and agents. Both have the same `downtime-limit`, `max-bandwidth`
//! and `avail-switchover-bandwidth`; plain has no capabilities but `events` and `return-path`, so that QEMU's own `downtime` says the
//! same of both: until the destination has loaded everything.
//!
//! The measure that both share is the kernels' ([`marks`]): from the source's last run of a vCPU to the destination's first. Nodes are
//! emulated and share this machine's processors, so only figures of one run may be compared, and only their ratio means anything.

pub mod figures;
pub mod marks;
mod measurement;
pub mod report;
mod run;

pub use measurement::{Measurement, Mover};
pub use run::{Bench, Plan};
