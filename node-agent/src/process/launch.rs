//! Starting a VMM's program: as a child that does not end with the agent, in a session and a control group of its own, without a
//! shell, with its output in a file.

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

/// How much of its log is told when it fails to start.
const TOLD_LOG_LINES: usize = 8;
const TOLD_LOG_BYTES: u64 = 2048;

/// Between bind(2), which can be seen, and listen(2), which cannot.
pub(crate) const NOT_LISTENING_YET: Duration = Duration::from_millis(10);

/// What to start.
pub(crate) struct Launch<'a> {
    /// The command that becomes the program: [`launcher`](super::twin::launcher).
    pub(crate) launcher: &'a [OsString],
    /// It is there.
    pub(crate) cgroup: &'a Cgroup,
    /// The program's working directory; it is there.
    pub(crate) directory: &'a Path,
    /// Takes what the program says; made if it is not there.
    pub(crate) log: &'a Path,
    /// What it is given open.
    pub(crate) descriptors: &'a [Descriptor],
    /// Absolute; the caller has checked that it is allowed.
    pub(crate) program: &'a Path,
    pub(crate) arguments: &'a [String],
}

/// Why nothing was started.
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

/// The last lines of a log, as far as they can be read.
pub(crate) fn end_of(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TOLD_LOG_BYTES)))?;
        let mut end = Vec::new();
        file.take(TOLD_LOG_BYTES).read_to_end(&mut end)?;
        Ok(end)
    };
    let end = read().unwrap_or_default();
    let end = String::from_utf8_lossy(&end);
    let lines: Vec<&str> = end.lines().collect();
    let told = lines.len().saturating_sub(TOLD_LOG_LINES);
    lines.get(told..).unwrap_or_default().join("\n")
}
