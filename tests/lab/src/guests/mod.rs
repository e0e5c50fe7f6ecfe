//! The guests of the lab's QEMU VMs. They notice when the VM, one of its devices or its disk loses anything,
//! and report it on the port where QEMU takes a guest's debug output ([`DEBUG_PORT`]).

pub mod counter;
pub mod lines;
pub mod linux;
mod report;

pub use report::Report;

/// The port on which the guests report: QEMU's `isa-debugcon`.
pub const DEBUG_PORT: u16 = 0xe9;
