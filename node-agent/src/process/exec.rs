//! The step between the agent and a twin: the agent's own program, called as
//! `twin-exec --cgroup DIR --sandbox JSON [--descriptor NUMBER=PATH]... -- PROGRAM ARGUMENT...`.
//!
//! It leaves the agent's session and control group, closes its files to other users, opens the descriptors
//! that the program gets, enters the sandbox, and becomes the program. It keeps no other descriptor and no
//! variable of the agent's environment. Between fork and exec of one's own process only
//! async-signal-safe code may run, which takes `unsafe`; a program of its own has no such limit. The agent
//! itself has none of these descriptors: a forgotten one would keep a device bound.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;

use super::sandbox::{Sandbox, SandboxError, check};
use crate::vfio::sys::close_on_exec;

/// The name of the subcommand.
pub const TWIN_EXEC: &str = "twin-exec";

/// The arguments of `twin-exec`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct TwinExec {
    /// Directory of the control group to enter
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
    /// What the program may reach: a Sandbox, as JSON. Without it, everything that the agent's user may
    #[arg(long, value_parser = sandbox_of_json)]
    pub sandbox: Option<Sandbox>,
    /// Say what of the files after PROGRAM can be read there, and end
    #[arg(long, requires = "sandbox")]
    pub check: bool,
    /// File that the program gets open, for reading and writing
    #[arg(long = "descriptor", value_name = "NUMBER=PATH")]
    pub descriptors: Vec<Descriptor>,
    /// Program to become, and its arguments
    #[arg(last = true, required = true, num_args = 1..)]
    pub command: Vec<OsString>,
}

fn sandbox_of_json(text: &str) -> Result<Sandbox, serde_json::Error> {
    serde_json::from_str(text)
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
    /// A descriptor of the agent's.
    #[error("cannot close the agent's descriptors")]
    CloseOthers(#[source] io::Error),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The answer of a check.
    #[error("cannot write the answer")]
    Answer(#[source] io::Error),
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

/// A path with programs for a program that looks for one; what it finds there, its sandbox decides.
const PROGRAMS: &str = "/usr/bin:/bin";

impl TwinExec {
    /// Becomes the program. Returns if it cannot, or after a check.
    ///
    /// # Errors
    /// [`TwinExecError`]
    pub fn run(self) -> Result<(), TwinExecError> {
        rustix::process::setsid().map_err(|errno| TwinExecError::BeginSession(errno.into()))?;
        if let Some(path) = self.cgroup {
            // 0 is the writing process.
            std::fs::write(path.join("cgroup.procs"), "0")
                .map_err(|source| TwinExecError::EnterCgroup { path, source })?;
        }
        let mut open = Vec::with_capacity(self.descriptors.len());
        for descriptor in self.descriptors {
            match descriptor.open() {
                Ok(file) => open.push(file),
                Err(source) => return Err(TwinExecError::Open { descriptor, source }),
            }
        }
        close_others(&open).map_err(TwinExecError::CloseOthers)?;
        let mut command = self.command.into_iter();
        let program = command.next().ok_or(TwinExecError::NoProgram)?;
        let mut executed = Command::new(&program);
        if let Some(sandbox) = &self.sandbox {
            sandbox.enter()?;
            let folder = &sandbox.directory;
            executed.env_clear().env("PATH", PROGRAMS).env("HOME", folder).env("TMPDIR", folder);
        }
        if self.check {
            let answer = check::answer(command.as_slice());
            return io::stdout().write_all(answer.as_bytes()).map_err(TwinExecError::Answer);
        }
        // The files that the VMM creates, above all its socket, are for its user alone.
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
        let source = executed.args(command).exec();
        Err(TwinExecError::Execute { program, source })
    }
}

/// Lets the program have its output and these, and no descriptor that the agent itself was started with.
fn close_others(kept: &[OwnedFd]) -> io::Result<()> {
    let mut others = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        others.extend(
            number.filter(|number| *number > 2 && !kept.iter().any(|open| open.as_raw_fd() == *number)),
        );
    }
    others.into_iter().try_for_each(close_on_exec)
}
