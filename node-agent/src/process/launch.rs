//! Starting a VMM's program: as a child that outlives the agent, in a session and a control group of its own,
//! without a shell, with its output in a file.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};

use super::cgroup::Cgroup;
use super::exec::Descriptor;

/// How much of its log is quoted when it fails to start.
const QUOTED_LOG_LINES: usize = 8;
const QUOTED_LOG_BYTES: u64 = 2048;

/// Pause between two attempts to connect to a socket that exists: bind(2) shows in the directory, listen(2)
/// does not.
pub(crate) const NOT_LISTENING_YET: Duration = Duration::from_millis(10);

/// What to start.
pub(crate) struct Launch<'a> {
    /// The command that becomes the program: the agent's own, as [`twin-exec`](super::exec).
    pub(crate) launcher: &'a [OsString],
    /// It exists.
    pub(crate) cgroup: &'a Cgroup,
    /// The program's working directory; it exists.
    pub(crate) directory: &'a Path,
    /// Receives the output of the program; created if it does not exist.
    pub(crate) log: &'a Path,
    /// Files that the program gets open.
    pub(crate) descriptors: &'a [Descriptor],
    /// Absolute; the caller has checked that it is allowed.
    pub(crate) program: &'a Path,
    pub(crate) arguments: &'a [String],
}

/// Why the program was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("cannot write {path}: {source}")]
    Log { path: PathBuf, source: io::Error },
    #[error("cannot start {program}: {source}")]
    Start { program: String, source: io::Error },
}

impl Launch<'_> {
    pub(crate) fn spawn(&self) -> Result<Child, LaunchError> {
        let open = || OpenOptions::new().create(true).append(true).mode(0o600).open(self.log);
        let output = open().and_then(|file| Ok((file.try_clone()?, file)));
        let (stdout, stderr) =
            output.map_err(|source| LaunchError::Log { path: self.log.to_owned(), source })?;
        let mut launcher = self.launcher.iter();
        let program = launcher.next().cloned().unwrap_or_default();
        Command::new(&program)
            .args(launcher)
            .arg("--cgroup")
            .arg(self.cgroup.path())
            .args(self.descriptors.iter().map(|descriptor| format!("--descriptor={descriptor}")))
            .arg("--")
            .arg(self.program)
            .args(self.arguments)
            .current_dir(self.directory)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .map_err(|source| LaunchError::Start { program: program.display().to_string(), source })
    }
}

/// The last lines of a log; empty if it cannot be read.
pub(crate) fn end_of(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(QUOTED_LOG_BYTES)))?;
        let mut end = Vec::new();
        file.take(QUOTED_LOG_BYTES).read_to_end(&mut end)?;
        Ok(end)
    };
    let end = read().unwrap_or_default();
    let end = String::from_utf8_lossy(&end);
    let lines: Vec<&str> = end.lines().collect();
    let skipped = lines.len().saturating_sub(QUOTED_LOG_LINES);
    lines.get(skipped..).unwrap_or_default().join("\n")
}
