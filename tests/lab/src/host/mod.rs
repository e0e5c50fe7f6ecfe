//! What the lab has on this machine: its folder, the programs that it starts, and what connects the nodes.

pub(crate) mod children;
pub(crate) mod folder;
pub(crate) mod installed;
mod program;
mod relay;
pub(crate) mod shared_disk;
pub(crate) mod switch;

pub use folder::KEEP_VARIABLE;
pub use installed::workspace_program;
pub use program::HostProgram;
pub use relay::Relay;
pub use shared_disk::SHARED_DISK_ADDRESS;
