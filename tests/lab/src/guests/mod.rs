//! What runs in the VMs of QEMU's that the lab has moved: guests that notice when a VM, one of its devices or its disk loses
//! anything, and say so on the port where QEMU takes a guest's debug output ([`DEBUG_PORT`]).

pub mod counter;
pub mod lines;
pub mod linux;
mod report;

pub use report::Report;

/// Where the guests say what they have to say: QEMU's `isa-debugcon`.
pub const DEBUG_PORT: u16 = 0xe9;
