//! VFIO devices: their migration states, and the kernel's calls that change and move them.

pub mod device;
pub mod error;
#[cfg(any(test, feature = "faults"))]
pub mod fake;
pub mod os_error;
pub mod state;
pub mod worker;
