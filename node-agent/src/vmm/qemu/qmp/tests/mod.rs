mod broken;
mod commands;
mod events;
mod real;
pub(in crate::vmm::qemu) mod server;
