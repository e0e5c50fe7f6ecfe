//! VFIO devices: the kernel's calls that change their migration states and move their data. The states themselves are the core's
//! ([`slackwater_handover::state`]).
//!
//! | module | what it knows |
//! |---|---|
//! | `uapi` | the kernel's numbers in the core's types |
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
mod stream;
mod sys;
mod uapi;
pub mod worker;
