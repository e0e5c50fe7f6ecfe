//! Fault points: places where a test can make something fail.
//!
//! The functions here exist in every build, with the same names and signatures. With the feature `faults`
//! they look up what a test has set (`on/`); without it they do nothing and are inlined to nothing
//! (`off.rs`), so no release program has them. `make lint` checks that: no release program contains a name
//! from `on/names.rs`.
//!
//! | fault point | where it is called | what a test can set |
//! |---|---|---|
//! | `halt` | when either end of a hand-over enters a phase | the hand-over halts in that phase |
//! | `serve_device` | when a device is borrowed for a migration | calls to the device fail or hang |
//! | `hang_in_probe` | when a free device is asked what it advertises | the question hangs |
//! | `BlobFaults` | when a blob is sent | the blob is damaged, or stalls |
//! | `ignores_device_model` | when a target is compared with its source | another model is accepted |

#[cfg(not(feature = "faults"))]
mod off;
#[cfg(feature = "faults")]
mod on;

#[cfg(not(feature = "faults"))]
pub(crate) use self::off::{BlobFaults, halt, hang_in_probe, ignores_device_model, serve_device};
#[cfg(feature = "faults")]
pub(crate) use self::on::{BlobFaults, halt, hang_in_probe, ignores_device_model, serve_device};

/// The end of a hand-over that halts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    Source,
    Destination,
}
