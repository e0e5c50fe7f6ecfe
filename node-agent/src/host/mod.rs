//! The node as the agent reads it: devices, VMs, clocks, and which process holds which device. Pure parsers
//! under thin shells; the roots of sysfs and procfs are parameters.

pub mod clock;
pub mod devices;
pub mod holders;
pub mod identity;
pub mod node;
pub mod placeholders;
pub mod twin_logs;
pub mod twin_users;
pub mod vm;
pub mod vms;
