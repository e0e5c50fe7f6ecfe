//! The step between the agent and a twin: the agent's own program, called as
//! `twin-exec --cgroup DIR [--descriptor NUMBER=PATH]... -- PROGRAM ARGUMENT...`.
//!
//! It leaves the agent's session and control group, closes its files to other users, opens the descriptors
//! that the program gets, and becomes the program. Between fork and exec of one's own process only
//! async-signal-safe code may run, which takes `unsafe`; a program of its own has no such limit. The agent
//! itself has none of these descriptors: a forgotten one would keep a device bound.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

/// The name of the subcommand.
pub const TWIN_EXEC: &str = "twin-exec";

/// The arguments of `twin-exec`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct TwinExec {
    /// Directory of the control group to enter
    #[arg(long)]
    pub cgroup: PathBuf,
    /// File that the program gets open, for reading and writing
    #[arg(long = "descriptor", value_name = "NUMBER=PATH")]
    pub descriptors: Vec<Descriptor>,
    /// Program to become, and its arguments
    #[arg(last = true, required = true, num_args = 1..)]
    pub command: Vec<OsString>,
}

/// A file that a program gets open. On the command line `NUMBER=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number in the program.
    pub number: i32,
    /// Its path.
    pub path: PathBuf,
}

/// A text is not a [`Descriptor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it must be NUMBER=PATH, with a number above 2 and an absolute path")]
pub struct ParseDescriptorError;

impl fmt::Display for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.number, self.path.display())
    }
}

impl FromStr for Descriptor {
    type Err = ParseDescriptorError;

    fn from_str(text: &str) -> Result<Self, ParseDescriptorError> {
        let parts = text.split_once('=').and_then(|(number, path)| Some((number.parse().ok()?, path)));
        match parts {
            Some((number, path)) if number > 2 && path.starts_with('/') => {
                Ok(Self { number, path: path.into() })
            }
            _ => Err(ParseDescriptorError),
        }
    }
}

impl Descriptor {
    /// Opens it by its number, and keeps it open over an exec.
    fn open(&self) -> io::Result<OwnedFd> {
        let file = File::options().read(true).write(true).open(&self.path)?;
        let descriptor = rustix::io::fcntl_dupfd_cloexec(&file, self.number)?;
        if descriptor.as_raw_fd() != self.number {
            return Err(io::Error::other(format!("descriptor {} is in use", self.number)));
        }
        rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::empty())?;
        Ok(descriptor)
    }
}

/// Why this process did not become the program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TwinExecError {
    /// It already leads a process group.
    #[error("cannot begin a session of its own")]
    BeginSession(#[source] io::Error),
    /// The group is gone, or may not be entered.
    #[error("cannot enter the cgroup {path}")]
    EnterCgroup {
        /// The group.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process holds the device, or the file does not exist.
    #[error("cannot open {} for the program", descriptor.path.display())]
    Open {
        /// What.
        descriptor: Descriptor,
        /// Why.
        source: io::Error,
    },
    /// The command line names no program.
    #[error("no program is named")]
    NoProgram,
    /// The program is missing or cannot be executed.
    #[error("cannot execute {}", program.display())]
    Execute {
        /// The program.
        program: OsString,
        /// Why.
        source: io::Error,
    },
}

impl TwinExec {
    /// Becomes the program. Returns only if it cannot.
    pub fn run(self) -> TwinExecError {
        if let Err(errno) = rustix::process::setsid() {
            return TwinExecError::BeginSession(errno.into());
        }
        // 0 is the writing process.
        if let Err(source) = std::fs::write(self.cgroup.join("cgroup.procs"), "0") {
            return TwinExecError::EnterCgroup { path: self.cgroup, source };
        }
        // The files that the VMM creates, above all its socket, are for this user alone.
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
        let mut open = Vec::with_capacity(self.descriptors.len());
        for descriptor in self.descriptors {
            match descriptor.open() {
                Ok(file) => open.push(file),
                Err(source) => return TwinExecError::Open { descriptor, source },
            }
        }
        let mut command = self.command.into_iter();
        let Some(program) = command.next() else { return TwinExecError::NoProgram };
        let source = Command::new(&program).args(command).exec();
        TwinExecError::Execute { program, source }
    }
}
