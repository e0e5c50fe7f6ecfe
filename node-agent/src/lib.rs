//! The node agent: it takes the VFIO devices of a VM through the kernel's migration states, together, and
//! moves their state and the VM's own to another node.

#![deny(unsafe_code)]

pub mod attempt;
mod faults;
pub mod host;
pub mod journal;
pub mod process;
pub mod service;
pub mod transfer;
pub mod vfio;
pub mod vmm;
