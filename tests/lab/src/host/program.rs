//! A program of the workspace that runs on this machine for as long as the lab needs it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use rustix::process::Signal;

use super::children::{self, RunningChild};
use super::installed::workspace_program;
use crate::error::LabError;

/// A running program. It is killed when this is dropped, and when the lab's process ends for any reason.
#[derive(Debug)]
pub struct HostProgram {
    child: RunningChild,
    log: PathBuf,
}

impl HostProgram {
    /// Starts the program of the workspace named `name`, which is beside the one that runs. Its standard
    /// error is appended to `log`.
    ///
    /// # Errors
    /// When it is not built, or cannot be started.
    pub async fn start(
        name: &str,
        arguments: &[&str],
        env: &[(&str, &str)],
        log: &Path,
    ) -> Result<Self, LabError> {
        let program = workspace_program(name)?;
        let file = std::fs::File::options().create(true).append(true).open(log);
        let file = file.map_err(LabError::io(format!("opening {}", log.display())))?;
        let child = children::start(&program.to_string_lossy(), |command| {
            command.args(arguments).envs(env.iter().copied()).stdout(Stdio::null()).stderr(file);
        })
        .await?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// The content of its log so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        self.child.ended().await;
    }

    /// Kills it, and returns when it has ended.
    pub async fn kill(self) {
        self.child.signal(Signal::KILL);
        self.child.ended().await;
    }
}
