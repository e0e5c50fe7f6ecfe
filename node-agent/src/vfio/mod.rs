//! VFIO devices: their migration states, and the kernel's calls that change and move them.
//!
//! | module | what it knows |
//! |---|---|
//! | [`state`] | the states, the arcs between them, the path for a device's features. Pure |
//! | [`device`], [`error`] | the seam at a device: what it can be asked, and how it fails |
//! | [`kernel`] | the kernel's devices, by migration v2 |
//! | [`borrow`], [`probe`] | how to get at one: from a VMM's process, or a free one for a moment |
//! | [`worker`] | a thread per device, and the async handle to it |
//! | `fake` | a device in memory that records and goes wrong (tests, feature `faults`) |

pub mod borrow;
pub mod device;
pub mod error;
#[cfg(any(test, feature = "faults"))]
pub mod fake;
pub mod kernel;
pub mod os_error;
pub mod probe;
pub mod state;
mod stream;
mod sys;
pub mod worker;
