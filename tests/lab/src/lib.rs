//! The lab in which Slackwater is tested on the real thing: machines that boot a kernel with VFIO devices that migrate, a
//! Kubernetes control plane, and the kernel's own trace as a witness of what happened.

pub mod cluster;
pub mod faults;
pub mod guests;
pub mod lab;
pub mod witness;
