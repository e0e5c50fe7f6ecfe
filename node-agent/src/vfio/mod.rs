//! VFIO devices: their migration states, and the kernel's calls that change and move them.
//!
//! | module | what it does |
//! |---|---|
//! | [`state`] | the states, the arcs between them, the path for a device's features. Pure |
//! | [`device`], [`error`] | the seam to a device: its calls and its errors |
//! | [`kernel`] | devices of the kernel, by migration v2 |
//! | [`borrow`], [`probe`] | opening one: borrowed from a VMM's process, or a free one for a moment |
//! | [`worker`] | a thread per device, and the async handle to it |
//! | `fake` | a device in memory that records calls and fails on demand (tests, feature `faults`) |

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
