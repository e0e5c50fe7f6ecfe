//! VFIO devices: their migration states, and the kernel's calls that change and move them.

pub mod state;
