//! The streams that make up a VM's state.

use std::fmt;

/// One of the streams that make up a VM's state. [`Display`](fmt::Display) names it for a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Blob {
    /// A device's, by its index in the VM's order.
    Device(usize),
    /// RAM and machine state, as the VMM gives them.
    Vmm,
}

impl fmt::Display for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(index) => write!(f, "the state of device {index}"),
            Self::Vmm => f.write_str("RAM and machine state"),
        }
    }
}

/// All blobs of a VM with `devices` devices.
pub fn blobs(devices: usize) -> impl Iterator<Item = Blob> {
    (0..devices).map(Blob::Device).chain([Blob::Vmm])
}
