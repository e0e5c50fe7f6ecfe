//! Starting a VMM's program: as a child that outlives the agent, in a session and a control group of its own,
//! without a shell, with its output in a file.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};

use super::cgroup::Cgroup;
use super::exec::Descriptor;
use super::folder::Folder;
use super::sandbox::Sandbox;

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
    /// Receives the output of the program.
    pub(crate) log: File,
    /// What the program may reach; None if it is one that the administrator alone has chosen, with arguments
    /// of the agent's.
    pub(crate) sandbox: Option<&'a Sandbox>,
    /// Files that the program gets open.
    pub(crate) descriptors: &'a [Descriptor],
    /// Absolute; the caller has checked that it is allowed.
    pub(crate) program: &'a Path,
    pub(crate) arguments: &'a [String],
}

/// The program was not started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {program}: {source}")]
pub(crate) struct LaunchError {
    pub(crate) program: String,
    pub(crate) source: io::Error,
}

impl Launch<'_> {
    pub(crate) fn spawn(self) -> Result<Child, LaunchError> {
        let mut launcher = self.launcher.iter();
        let program = launcher.next().cloned().unwrap_or_default();
        let failed = |source| LaunchError { program: program.display().to_string(), source };
        let output = self.log.try_clone().map_err(failed)?;
        let sandbox = self.sandbox.map(serde_json::to_string).transpose();
        let sandbox = sandbox.map_err(|error| failed(error.into()))?;
        Command::new(&program)
            .args(launcher)
            .arg("--cgroup")
            .arg(self.cgroup.path())
            .args(sandbox.map(|json| format!("--sandbox={json}")))
            .args(self.descriptors.iter().map(|descriptor| format!("--descriptor={descriptor}")))
            .arg("--")
            .arg(self.program)
            .args(self.arguments)
            .current_dir(self.directory)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(self.log)
            .spawn()
            .map_err(failed)
    }
}

/// The last lines of a log in a folder; empty if it cannot be read, or is not the agent's.
pub(crate) fn end_of(folder: &Path, log: &str) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let folder = Folder::open(folder)?.ok_or(io::ErrorKind::NotFound)?;
        let mut file = folder.open_own(log)?.ok_or(io::ErrorKind::NotFound)?;
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
    printable(&lines.get(skipped..).unwrap_or_default().join("\n"))
}

/// A program's words, for statuses and terminals: what would steer a terminal, or turn the direction of a
/// text, is replaced.
fn printable(text: &str) -> String {
    let steers = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    text.replace(steers, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_end_of_a_log_is_quoted_without_what_steers_a_terminal_and_from_a_hole_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let mut log = Folder::open(&path).unwrap().unwrap().create_own("twin.log").unwrap();
        log.set_len(1 << 40).unwrap();
        log.write_all("\nfine\tü\n\u{1b}]0;owned\u{7}\r\u{202e}txt\n".as_bytes()).unwrap();
        let quoted = end_of(&path, "twin.log");
        assert!(quoted.len() <= 3 * 2048, "{}", quoted.len());
        let words = "\nfine\tü\n\u{fffd}]0;owned\u{fffd}\u{fffd}\u{fffd}txt";
        assert!(quoted.ends_with(words), "{quoted}");
        assert!(!quoted.contains('\0'));
    }
}
