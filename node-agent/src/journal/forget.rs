//! Forgetting the highest operator epoch: an administrator's way out when it is wrong.

use std::path::Path;

use super::file::{NEW, SPARE};
use super::{EPOCH, Journal, JournalError};

/// Forgets the highest operator epoch that the agent of this state directory has seen, and returns it, unless
/// it could not be read. The next operator's counts.
///
/// Refused while an agent works with the directory ([`JournalError::Locked`]), and while a migration has not
/// ended ([`JournalError::AttemptOpen`]) or its journal cannot be read: an operator that was replaced long ago
/// could decide about it.
pub fn forget_epoch(state_dir: &Path) -> Result<Option<u64>, JournalError> {
    let path = state_dir.join("journal");
    // Opening a journal would make the directories of a mistyped path.
    std::fs::metadata(&path).map_err(|source| JournalError::OpenDirectory { path, source })?;
    let journal = Journal::open(state_dir)?;
    for key in journal.keys()? {
        if !journal.read(&key.file_name())?.finished {
            return Err(JournalError::AttemptOpen { file: journal.directory.file(&key.file_name()) });
        }
    }
    let known = journal.epoch().ok();
    for name in [EPOCH.to_owned(), format!("{EPOCH}{SPARE}"), format!("{EPOCH}{NEW}")] {
        journal.directory.remove(&name)?;
    }
    journal.directory.sync()?;
    Ok(known)
}
