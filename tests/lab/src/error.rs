//! What can go wrong in the lab.

use std::{
    io,
    path::{Path, PathBuf},
};

/// A failure of the lab itself, named by the action that failed. What a program in a node answers is not one
/// of them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// Something that `tests/setup/install` provides is missing.
    #[error("{what} is not installed: run tests/setup/install {what}")]
    NotInstalled {
        /// What to install.
        what: String,
    },
    /// A program of the workspace is missing.
    #[error("there is no program {name} beside {folder}: build it first")]
    NotBuilt {
        /// The program.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// An operation on a file or a socket failed.
    #[error("{action}")]
    Io {
        /// What was being done.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A node did not come up, or went down.
    #[error("node {node}: {reason}; its console ends with\n{console}")]
    NodeDown {
        /// Which.
        node: String,
        /// What happened.
        reason: String,
        /// The last lines of its serial console: the file goes with the lab.
        console: String,
    },
    /// A node's control service refused or failed.
    #[error("node {node}: {message}")]
    Refused {
        /// Which.
        node: String,
        /// The service's message.
        message: String,
    },
    /// A program that had to succeed failed.
    #[error("{program} ended with {ending}: {stderr}")]
    ProgramFailed {
        /// Its name.
        program: String,
        /// How it ended.
        ending: String,
        /// Its standard error.
        stderr: String,
    },
    /// An action took longer than its limit.
    #[error("{action} took longer than {seconds} s")]
    TimedOut {
        /// What was being done.
        action: String,
        /// The limit.
        seconds: u64,
    },
    /// The configuration is invalid.
    #[error("the lab's configuration: {0}")]
    Configuration(String),
    /// A certificate could not be made.
    #[error("making the certificate of {subject}")]
    Certificate {
        /// The subject of the certificate.
        subject: String,
        /// Why it failed.
        source: rcgen::Error,
    },
    /// The control plane did not come up.
    #[error("the control plane: {0}")]
    ControlPlane(String),
    /// The witness's record is incomplete.
    #[error("the witness of node {node}: {reason}")]
    Witness {
        /// Which.
        node: String,
        /// What is missing.
        reason: String,
    },
}

impl LabError {
    /// For `map_err` on an I/O operation.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}

/// The last lines of a log, for an error's text: the file itself goes with the lab.
pub(crate) fn last_lines(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
}
