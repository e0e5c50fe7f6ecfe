//! Processes of this node: how the agent starts one that outlives it, keeps it in a control group, and clears
//! it away.
//!
//! | module | what it knows |
//! |---|---|
//! | [`launch`] | how to start a VMM's program, and what to quote of its log |
//! | [`log_limit`] | how to keep that log short |
//! | [`exec`] | the step between the agent and the program: session, cgroup, umask, open descriptors |
//! | [`sandbox`] | what the kernel lets the program reach |
//! | [`cgroup`] | a control group for each twin |
//! | [`file_events`] | when a file or a directory changes |
//! | [`folder`] | how to use a folder that another user may write to |
//!
//! It knows no VM and no VMM.

pub mod cgroup;
pub mod exec;
pub(crate) mod file_events;
pub(crate) mod folder;
pub(crate) mod launch;
pub(crate) mod log_limit;
pub mod sandbox;
