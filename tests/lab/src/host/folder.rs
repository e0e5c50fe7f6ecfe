//! The folder in which a lab keeps its sockets, logs and data.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::error::LabError;

const PREFIX: &str = "slackwater-lab-";

/// Set to keep the folder when the lab ends.
pub const KEEP_VARIABLE: &str = "SLACKWATER_LAB_KEEP";

/// A lab's folder, removed when this is dropped. The folder is locked while it is in use; one that is not is
/// a killed lab's, and the next lab removes it.
#[derive(Debug)]
pub(crate) struct LabFolder {
    path: PathBuf,
    keep: bool,
    _lock: File,
}

impl LabFolder {
    /// Creates a folder (with a short name: a Unix socket's path has at most 107 bytes), and removes those
    /// that killed labs left.
    pub(crate) fn make() -> Result<Self, LabError> {
        let parent = std::env::temp_dir();
        remove_abandoned(&parent);
        let failed = |path: &Path| LabError::io(format!("making a folder in {}", path.display()));
        let path =
            tempfile::Builder::new().prefix(PREFIX).tempdir_in(&parent).map_err(failed(&parent))?.keep();
        let lock = File::create(path.join("lock")).map_err(failed(&path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| failed(&path)(errno.into()))?;
        Ok(Self { path, keep: std::env::var_os(KEEP_VARIABLE).is_some(), _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LabFolder {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("{KEEP_VARIABLE}: the lab's files are in {}", self.path.display());
        } else {
            // The next lab tries again.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn remove_abandoned(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
        // A folder without a lock was kept on purpose, or is being created.
        if ours
            && let Ok(lock) = File::open(path.join("lock"))
            && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = fs::remove_dir_all(&path);
        }
    }
}
