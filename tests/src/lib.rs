//! The lab in which Slackwater is tested on the real thing: machines that boot a kernel with VFIO devices that migrate, a
//! Kubernetes control plane, a small virtual machine monitor whose VM is moved, and the kernel's own trace as a witness of what
//! happened.

pub mod bench;
pub mod cluster;
pub mod faults;
pub mod guests;
pub mod lab;
pub mod vmm;
pub mod witness;
