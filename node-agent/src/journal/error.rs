//! Errors of reading and writing a journal. Each names the file, and says what to do where something can be
//! done.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// A journal could not be read or written. Its old content stays.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The id of a migration cannot be used as a file name.
    #[error("{id:?} is not a migration's id: 1 to 64 characters of [a-z0-9-] are")]
    InvalidId {
        /// The id.
        id: String,
    },
    /// Another agent works with this state directory.
    #[error("another agent{holder} works with the state directory {}: end it, or give this one its \
        own", state_dir.display())]
    Locked {
        /// The state directory.
        state_dir: PathBuf,
        /// ` (process N)`, if its number is known.
        holder: String,
    },
    /// A newer agent wrote it, in a format that this one does not know.
    #[error(
        "{} is of journal format {found}, and this agent reads formats up to {known}: run the newer agent that \
         wrote it",
        file.display()
    )]
    NewerVersion {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format that this agent knows.
        known: u32,
    },
    /// As [`JournalError::NewerVersion`], and the migration that it is about has not ended here: an agent
    /// does not start over it.
    #[error(
        "{} is an open journal of format {found}, and this agent reads formats up to {known}: it does not start \
         over it. Run the newer agent that wrote it until the migration has ended, and drain the migrations of \
         a node before a downgrade",
        file.display()
    )]
    NewerVersionOpen {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// Bytes are missing.
    #[error(
        "{} is truncated or damaged: it needs {needs_bytes} bytes and has {has_bytes}",
        file.display()
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Bytes of the header and of the content that it announces.
        needs_bytes: u64,
        /// Bytes that the file has.
        has_bytes: u64,
    },
    /// The content is not what was written.
    #[error("{} is damaged: its checksum does not match its content", file.display())]
    ChecksumMismatch {
        /// The file.
        file: PathBuf,
    },
    /// A file with a journal's name is not a journal.
    #[error("{} is not a journal of Slackwater: it does not begin as one does", file.display())]
    NotAJournal {
        /// The file.
        file: PathBuf,
    },
    /// The disk is full, or a quota is used up.
    #[error("no space for {}: {needed_bytes} bytes are needed, twice", file.display())]
    NoSpace {
        /// The file.
        file: PathBuf,
        /// Bytes that one of its two copies takes.
        needed_bytes: u64,
    },
    /// More than was allocated for a record.
    #[error("the record for {} takes {has_bytes} bytes, and at most {limit_bytes} fit", file.display())]
    ContentTooLarge {
        /// The file.
        file: PathBuf,
        /// Bytes of the content.
        has_bytes: u64,
        /// Bytes that fit.
        limit_bytes: u64,
    },
    /// There is a journal of this name that is not finished.
    #[error("{} is there already, and has not been finished", file.display())]
    Unfinished {
        /// The file.
        file: PathBuf,
    },
    /// The epoch cannot be forgotten now.
    #[error(
        "{} is of a migration that has not ended here: start the agent and let the migration end, before the \
         operator's epoch is forgotten",
        file.display()
    )]
    AttemptOpen {
        /// The file.
        file: PathBuf,
    },
    /// The state directory could not be created or opened.
    #[error("cannot open the state directory {}", path.display())]
    OpenDirectory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The directory of journals could not be listed.
    #[error("cannot list {}", path.display())]
    List {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be created or opened.
    #[error("cannot open {}", file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be written or allocated.
    #[error("cannot write {}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The content could not be synced to stable storage.
    #[error("cannot sync {}", file.display())]
    Sync {
        /// The file or directory.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The new content could not replace the old one.
    #[error("cannot put the new content of {} in place", file.display())]
    Replace {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be removed.
    #[error("cannot remove {}", file.display())]
    Remove {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl JournalError {
    /// What is on the disk may be good: another try may succeed, once the disk has room or answers again.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Open { source, .. } => source.kind() != io::ErrorKind::NotFound,
            Self::NoSpace { .. }
            | Self::OpenDirectory { .. }
            | Self::List { .. }
            | Self::Read { .. }
            | Self::Write { .. }
            | Self::Sync { .. }
            | Self::Replace { .. }
            | Self::Remove { .. } => true,
            Self::InvalidId { .. }
            | Self::Locked { .. }
            | Self::NewerVersion { .. }
            | Self::NewerVersionOpen { .. }
            | Self::Truncated { .. }
            | Self::ChecksumMismatch { .. }
            | Self::NotAJournal { .. }
            | Self::ContentTooLarge { .. }
            | Self::Unfinished { .. }
            | Self::AttemptOpen { .. } => false,
        }
    }

    /// With what the kernel said.
    pub fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}
