//! What runs in the VMs of QEMU's that the lab has moved: guests that notice when a VM or one of its devices loses anything, and
//! say so on the port where QEMU takes a guest's debug output.

pub mod counter;
