//! VFIO devices: the kernel's calls that change their migration states and move their data. The states
//! themselves are the core's ([`slackwater_handover::state`]).
//!
//! | module | what it does |
//! |---|---|
//! | `uapi` | the kernel's numbers in the core's types |
//! | [`device`], [`error`] | the seam to a device: its calls and its errors |
//! | [`kernel`] | devices of the kernel, by migration v2 |
//! | [`borrow`], [`probe`] | opening one: borrowed from a VMM's process, or a free one for a moment |
//! | [`liveness`] | whether a VMM that was written down is alive, gone, or not known |
//! | [`worker`] | a thread per device, and the async handle to it |
//! | `fake` | a device in memory that records calls and fails on demand (tests, feature `faults`) |

pub mod borrow;
pub mod device;
pub mod error;
#[cfg(any(test, feature = "faults"))]
pub mod fake;
pub mod kernel;
pub mod liveness;
pub mod os_error;
pub mod probe;
mod stream;
pub(crate) mod sys;
mod uapi;
pub mod worker;
