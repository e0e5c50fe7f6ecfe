//! What the kernel lets a twin reach. Its arguments come from another machine, so nothing here depends on
//! what they say.
//!
//! ```text
//! agent ── [`Sandbox`], as JSON ──▶ twin-exec, as root and with one thread
//!                                     new mount, network, IPC and UTS namespaces
//!                                     [`root`]    its own /: the program, folders, /dev, /proc
//!                                     [`rights`]  limits, no capability, no new privileges, its own user
//!                                     [`filter`]  seccomp
//!                                     exec ──▶ the program
//! ```
//!
//! There is no process between the agent and the program and no PID namespace, so the program keeps the number
//! that the agent knows; /proc shows it no process of another user. docs/decisions/0023 says why.

pub mod check;
mod error;
mod filter;
pub mod program;
mod rights;
mod root;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::error::SandboxError;

/// What a program is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// The number of its user and of its group. Never 0.
    pub user: u32,
    /// Its working directory, which it may write to. It belongs to the user.
    pub directory: PathBuf,
    /// Files and folders of the node that it sees, each at its own path. What is mounted below a folder is
    /// not shown with it.
    pub shown: Vec<Shown>,
    /// Symbolic links that it sees.
    pub links: Vec<Link>,
    /// Devices that it has besides `null`, `zero`, `full`, `random` and `urandom`.
    pub devices: Vec<Node>,
    /// Whether it is in the node's network namespace. If not, it is alone in one.
    pub host_network: bool,
    /// RLIMIT_MEMLOCK.
    pub locked_memory_bytes: u64,
}

/// A file or a folder of the node that a program sees.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shown {
    /// Absolute.
    pub path: PathBuf,
    /// Whether the program may write to it, as far as its user may.
    pub writable: bool,
}

impl Shown {
    /// For reading.
    pub fn read_only(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), writable: false }
    }
}

/// A symbolic link that a program sees.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Absolute.
    pub path: PathBuf,
    /// Where it leads.
    pub target: PathBuf,
}

/// A character device that a program has; it belongs to its user.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Absolute, below `/dev`.
    pub path: PathBuf,
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
}

impl Node {
    /// A device of this node, at its own path. None if there is none.
    ///
    /// # Errors
    /// If it cannot be looked at, or is no character device.
    pub fn of(path: &std::path::Path) -> std::io::Result<Option<Self>> {
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        let found = match std::fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if !found.file_type().is_char_device() {
            return Err(std::io::Error::other("it is not a character device"));
        }
        let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
        Ok(Some(Self { path: path.to_owned(), major, minor }))
    }
}

impl Sandbox {
    /// Moves this process, which runs as root and has one thread, into the sandbox. What remains is to execute
    /// the program.
    ///
    /// # Errors
    /// The step that failed. The process is then neither inside nor outside, and must end.
    pub(crate) fn enter(&self) -> Result<(), SandboxError> {
        root::enter(self)?;
        rights::give_up(self)?;
        filter::install()
    }
}

#[cfg(test)]
#[path = "attack_tests.rs"]
mod attacks;
