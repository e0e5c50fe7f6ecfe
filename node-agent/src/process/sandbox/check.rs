//! Asking the kernel, before a program is started, what its user would be able to read in its sandbox.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Access, AtFlags, CWD, accessat};
use tokio::process::Command;
use tokio::time::timeout;

use super::Sandbox;

/// Building the sandbox and looking takes milliseconds, on an emulated node a second.
const LIMIT: Duration = Duration::from_secs(20);

/// Why it could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The launcher could not be run.
    #[error("the launcher could not be run")]
    Run(#[source] io::Error),
    /// It has not ended.
    #[error("the launcher did not end within {} s", LIMIT.as_secs())]
    Silent,
    /// No sandbox could be made.
    #[error("{0}")]
    Sandbox(String),
    /// It said something else than was asked.
    #[error("the launcher's answer is not understood: {0:?}")]
    Answer(String),
}

/// What can be done with a file in a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It can be read.
    Readable,
    /// It is not there.
    NotThere,
    /// The user may not read it.
    Denied,
}

impl Reach {
    fn of(path: &str) -> Self {
        match accessat(CWD, path, Access::READ_OK, AtFlags::empty()) {
            Ok(()) => Self::Readable,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Self::NotThere,
            Err(_) => Self::Denied,
        }
    }

    const ALL: [(Self, char); 3] = [(Self::Readable, 'r'), (Self::NotThere, '-'), (Self::Denied, 'x')];

    fn letter(self) -> char {
        Self::ALL.iter().find(|(reach, _)| *reach == self).map_or('x', |(_, letter)| *letter)
    }
}

/// In the sandbox: the answer for these paths, a letter for each.
pub(crate) fn answer(paths: &[OsString]) -> String {
    paths.iter().map(|path| path.to_str().map_or(Reach::Denied, Reach::of).letter()).collect()
}

/// What the user of the sandbox could do with each of these files.
///
/// # Errors
/// [`CheckError`]
pub async fn check(
    launcher: &[OsString],
    sandbox: &Sandbox,
    paths: &[PathBuf],
) -> Result<Vec<Reach>, CheckError> {
    let json = serde_json::to_string(sandbox).map_err(|error| CheckError::Run(error.into()))?;
    let mut launcher = launcher.iter();
    let mut command = Command::new(launcher.next().cloned().unwrap_or_default());
    command.args(launcher).args(["--sandbox", &json, "--check", "--"]);
    // The first stands for the program.
    command.arg("-").args(paths).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output =
        timeout(LIMIT, command.output()).await.map_err(|_| CheckError::Silent)?.map_err(CheckError::Run)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        return Err(CheckError::Sandbox(text(&output.stderr)));
    }
    let answer = text(&output.stdout);
    let found: Vec<Reach> = answer
        .chars()
        .filter_map(|letter| Reach::ALL.iter().find(|(_, known)| *known == letter).map(|(reach, _)| *reach))
        .collect();
    if found.len() != paths.len() || found.len() != answer.chars().count() {
        return Err(CheckError::Answer(answer));
    }
    Ok(found)
}
