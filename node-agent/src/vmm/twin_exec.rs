//! What stands between the agent and a twin for a moment: the agent's own program, called as
//! `twin-exec --cgroup DIR -- PROGRAM ARGUMENT...`.
//!
//! It leaves the agent's session and control group, closes what it makes to other users, and becomes the program. Between fork and exec of one's own process only
//! async-signal-safe code may run, which takes `unsafe`; a program of its own may do as it likes.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// The name of the subcommand.
pub const TWIN_EXEC: &str = "twin-exec";

/// The arguments of `twin-exec`.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct TwinExec {
    /// Directory of the control group to enter
    #[arg(long)]
    pub cgroup: PathBuf,
    /// Program to become, and its arguments
    #[arg(last = true, required = true, num_args = 1..)]
    pub command: Vec<OsString>,
}

/// Why this process did not become the program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TwinExecError {
    /// It leads a process group already.
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
    /// There is no program to become.
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
        // 0 is the writer itself.
        if let Err(source) = std::fs::write(self.cgroup.join("cgroup.procs"), "0") {
            return TwinExecError::EnterCgroup { path: self.cgroup, source };
        }
        // What the VMM makes, its socket above all, is for this user alone.
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
        let mut command = self.command.into_iter();
        let Some(program) = command.next() else { return TwinExecError::NoProgram };
        let source = Command::new(&program).args(command).exec();
        TwinExecError::Execute { program, source }
    }
}
