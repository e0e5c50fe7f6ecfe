//! The streams that make up a VM's state.

/// One of the streams that make up a VM's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Blob {
    /// A device's, by its index in the VM's order.
    Device(usize),
    /// RAM and machine state, as the VMM gives them.
    Vmm,
}

/// All blobs of a VM with `devices` devices.
pub fn blobs(devices: usize) -> impl Iterator<Item = Blob> {
    (0..devices).map(Blob::Device).chain([Blob::Vmm])
}
