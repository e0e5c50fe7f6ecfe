//! What the agent knows of its node: devices, VMs, clocks, and who holds what. Pure parsers under thin shells; the roots of
//! sysfs and procfs are parameters.

pub mod clock;
pub mod devices;
pub mod holders;
pub mod identity;
pub mod node;
pub mod placeholders;
pub mod vm;
pub mod vms;
