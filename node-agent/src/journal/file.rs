//! One file that is replaced as a whole or not at all, and whose space is allocated before it is needed.
//!
//! ```text
//!  NAME        the current content         ◀─┐ renameat2(RENAME_EXCHANGE), then the directory is synced
//!  NAME.spare  written whole, then synced  ◀─┘
//!  NAME.new    while NAME is being created; a leftover of it has no meaning
//! ```
//!
//! Both copies are written over their whole size when they are created, so that later writes allocate
//! nothing: they succeed on a disk that has become full. (A file system that never writes in place, such as
//! Btrfs or ZFS, cannot promise that.)
//!
//! Where RENAME_EXCHANGE does not exist (NFS, for one), a third copy is allocated before each write to become
//! the next spare, and the written one is renamed over the current one. There a write fails on a full disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, RenameFlags, fallocate, renameat, renameat_with};
use rustix::io::Errno;

use super::JournalError;
use super::format::{HEADER_BYTES, NEWEST_VERSION, Refusal, decode, encode};

/// Suffix of the other copy.
pub(super) const SPARE: &str = ".spare";
/// Suffix of a file that is being created.
pub(super) const NEW: &str = ".new";

/// The directory of the files, held open so that it can be synced.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
}

impl Directory {
    pub(super) fn open(path: PathBuf) -> Result<Self, JournalError> {
        match File::open(&path) {
            Ok(handle) => Ok(Self { path, handle }),
            Err(source) => Err(JournalError::OpenDirectory { path, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn sync(&self) -> Result<(), JournalError> {
        self.handle.sync_all().map_err(|source| JournalError::Sync { file: self.path.clone(), source })
    }

    /// Removes a file; a missing one is not an error.
    pub(super) fn remove(&self, name: &str) -> Result<(), JournalError> {
        let file = self.file(name);
        match std::fs::remove_file(&file) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Remove { file, source })
            }
            _ => Ok(()),
        }
    }

    /// False if the file system cannot exchange names.
    fn exchange(&self, one: &str, other: &str) -> Result<bool, Errno> {
        match renameat_with(&self.handle, one, &self.handle, other, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Gives a new file its name, durably. The file that had the name is removed; on a failure it keeps the
    /// name.
    fn introduce(&self, new: &str, name: &str) -> Result<(), JournalError> {
        let replace_error =
            |errno: Errno| JournalError::Replace { file: self.file(name), source: errno.into() };
        let exchanged = match self.exchange(new, name) {
            Err(Errno::NOENT) => false,
            other => other.map_err(replace_error)?,
        };
        if !exchanged {
            self.rename(new, name).map_err(replace_error)?;
        }
        self.sync().inspect_err(|_| {
            // Best effort: the disk is failing.
            let _ = match exchanged {
                true => self.exchange(new, name).is_ok(),
                false => self.remove(name).is_ok(),
            };
        })?;
        self.remove(new)
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), Errno> {
        renameat(&self.handle, from, &self.handle, to)
    }
}

/// A file with its spare copy.
#[derive(Debug)]
pub(super) struct Copies {
    directory: Arc<Directory>,
    name: String,
    /// Bytes of each copy.
    space: usize,
    /// The version in the header of what is written.
    version: u32,
    /// The file `name`.
    pub(super) live: File,
    /// The file `name` with [`SPARE`].
    pub(super) spare: File,
    /// Whether names are exchanged; tests turn it off to take the other path.
    pub(super) exchanges: bool,
}

impl Copies {
    /// Creates a file with its spare, in place of an existing one; its first content is durable when this
    /// returns. If it fails, both copies are removed and the existing file stays.
    pub(super) fn create(
        directory: &Arc<Directory>,
        name: &str,
        space: usize,
        version: u32,
        content: &[u8],
    ) -> Result<Self, JournalError> {
        let (spare_name, new_name) = (format!("{name}{SPARE}"), format!("{name}{NEW}"));
        directory.remove(&spare_name)?;
        directory.remove(&new_name)?;
        let bytes = record(directory, name, space, version, content)?;
        let create = || -> Result<Self, JournalError> {
            let spare = allocated(directory, &spare_name, space, &[])?;
            let live = allocated(directory, &new_name, space, &bytes)?;
            directory.introduce(&new_name, name)?;
            Ok(Self {
                directory: Arc::clone(directory),
                name: name.to_owned(),
                space,
                version,
                live,
                spare,
                exchanges: true,
            })
        };
        create().inspect_err(|_| {
            // Best effort: leftovers have no meaning, and are removed at the next start.
            let _ = directory.remove(&new_name);
            let _ = directory.remove(&spare_name);
        })
    }

    /// Opens an existing file. Its spare is allocated again.
    pub(super) fn reopen(
        directory: &Arc<Directory>,
        name: &str,
        space: usize,
        version: u32,
    ) -> Result<Self, JournalError> {
        let file = directory.file(name);
        let opened = OpenOptions::new().read(true).write(true).custom_flags(no_follow()).open(&file);
        let live = opened.map_err(|source| JournalError::Open { file: file.clone(), source })?;
        let has = live.metadata().map_err(|source| JournalError::Read { file: file.clone(), source })?.len();
        let missing = space.saturating_sub(usize::try_from(has).unwrap_or(usize::MAX));
        if missing > 0 {
            // It was finished. Zeroes after the content do not change it.
            live.write_all_at(&vec![0; missing], has).map_err(|source| cannot_write(&file, space, source))?;
            live.sync_all().map_err(|source| JournalError::Sync { file, source })?;
        }
        let spare = allocated(directory, &format!("{name}{SPARE}"), space, &[])?;
        directory.sync()?;
        Ok(Self {
            directory: Arc::clone(directory),
            name: name.to_owned(),
            space,
            version,
            live,
            spare,
            exchanges: true,
        })
    }

    /// Replaces the content.
    pub(super) fn write(&mut self, content: &[u8]) -> Result<(), JournalError> {
        let mut bytes = record(&self.directory, &self.name, self.space, self.version, content)?;
        bytes.resize(self.space, 0);
        self.fill_spare(&bytes)?;
        self.put_in_place()
    }

    /// Replaces the content for the last time, and frees the space that is no longer needed.
    pub(super) fn finish(mut self, content: &[u8]) -> Result<(), JournalError> {
        let bytes = record(&self.directory, &self.name, self.space, self.version, content)?;
        self.fill_spare(&bytes)?;
        let spare_file = self.directory.file(&self.spare_name());
        let write_error = |source| JournalError::Write { file: spare_file.clone(), source };
        self.spare.set_len(bytes.len() as u64).map_err(write_error)?;
        self.spare.sync_all().map_err(|source| JournalError::Sync { file: spare_file.clone(), source })?;
        self.put_in_place()?;
        // The record is durable. A spare that stays is removed at the next start.
        if let Err(error) = self.directory.remove(&self.spare_name()).and_then(|()| self.directory.sync()) {
            tracing::warn!(%error, "the spare copy of a finished journal stays for now");
        }
        Ok(())
    }

    fn spare_name(&self) -> String {
        format!("{}{SPARE}", self.name)
    }

    fn fill_spare(&self, bytes: &[u8]) -> Result<(), JournalError> {
        let file = self.directory.file(&self.spare_name());
        self.spare.write_all_at(bytes, 0).map_err(|source| cannot_write(&file, self.space, source))?;
        self.spare.sync_all().map_err(|source| cannot_sync(&file, self.space, source))
    }

    fn put_in_place(&mut self) -> Result<(), JournalError> {
        let spare_name = self.spare_name();
        if self.exchanges {
            let exchanged = self.directory.exchange(&spare_name, &self.name);
            self.exchanges = exchanged.map_err(|errno| self.cannot_replace(errno))?;
        }
        if !self.exchanges {
            return self.rename_in_place();
        }
        let synced = self.directory.sync();
        // It is not known to be durable, so the old content is put back. If that fails, too, the names stay
        // as they are.
        let undone = synced.is_err() && matches!(self.directory.exchange(&spare_name, &self.name), Ok(true));
        if !undone {
            std::mem::swap(&mut self.live, &mut self.spare);
        }
        synced
    }

    /// Without an exchange of names: the next spare first, so that there is always one.
    fn rename_in_place(&mut self) -> Result<(), JournalError> {
        let (spare_name, new_name) = (self.spare_name(), format!("{}{NEW}", self.name));
        let next_spare = allocated(&self.directory, &new_name, self.space, &[])?;
        self.directory.rename(&spare_name, &self.name).map_err(|errno| self.cannot_replace(errno))?;
        self.directory.rename(&new_name, &spare_name).map_err(|errno| self.cannot_replace(errno))?;
        self.live = std::mem::replace(&mut self.spare, next_spare);
        self.directory.sync()
    }

    fn cannot_replace(&self, errno: Errno) -> JournalError {
        JournalError::Replace { file: self.directory.file(&self.name), source: errno.into() }
    }
}

/// What a file holds.
pub(super) struct Stored {
    /// How the content is to be read.
    pub(super) version: u32,
    /// What was written.
    pub(super) content: Vec<u8>,
    /// Nothing will be written any more.
    pub(super) finished: bool,
}

/// The content of a file.
pub(super) fn read(directory: &Directory, name: &str, space: usize) -> Result<Stored, JournalError> {
    let file = directory.file(name);
    let opened = OpenOptions::new().read(true).custom_flags(no_follow()).open(&file);
    let handle = opened.map_err(|source| JournalError::Open { file: file.clone(), source })?;
    let mut bytes = Vec::new();
    // Never more than the space of one, whatever the file has.
    io::Read::read_to_end(&mut io::Read::take(handle, space as u64), &mut bytes)
        .map_err(|source| JournalError::Read { file: file.clone(), source })?;
    let finished = bytes.len() < space;
    match decode(&bytes) {
        Ok(decoded) => Ok(Stored { version: decoded.version, content: decoded.content.to_vec(), finished }),
        Err(Refusal::NotAJournal) => Err(JournalError::NotAJournal { file }),
        Err(Refusal::NewerVersion(found)) if finished => {
            Err(JournalError::NewerVersion { file, found, known: NEWEST_VERSION })
        }
        Err(Refusal::NewerVersion(found)) => {
            Err(JournalError::NewerVersionOpen { file, found, known: NEWEST_VERSION })
        }
        Err(Refusal::Truncated { needs_bytes }) => {
            Err(JournalError::Truncated { file, needs_bytes, has_bytes: bytes.len() as u64 })
        }
        Err(Refusal::ChecksumMismatch) => Err(JournalError::ChecksumMismatch { file }),
    }
}

/// The bytes of a record, if they fit. One byte less than the space is taken, so that a full file is never a
/// finished one.
fn record(
    directory: &Directory,
    name: &str,
    space: usize,
    version: u32,
    content: &[u8],
) -> Result<Vec<u8>, JournalError> {
    encode(version, content).filter(|bytes| bytes.len() < space).ok_or_else(|| {
        JournalError::ContentTooLarge {
            file: directory.file(name),
            has_bytes: content.len() as u64,
            limit_bytes: content_limit(space) as u64,
        }
    })
}

/// Bytes of content that fit into a copy of this size.
pub(super) const fn content_limit(space: usize) -> usize {
    space - HEADER_BYTES - 1
}

/// A file of this size, all of it written and synced, beginning with these bytes. The directory is not synced
/// yet.
fn allocated(directory: &Directory, name: &str, space: usize, begin: &[u8]) -> Result<File, JournalError> {
    let path = directory.file(name);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(no_follow());
    let file = options.open(&path).map_err(|source| match is_full(&source) {
        true => no_space(&path, space),
        false => JournalError::Open { file: path.clone(), source },
    })?;
    match fallocate(&file, FallocateFlags::empty(), 0, space as u64) {
        // Where this is not supported, the following write allocates.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(errno) => return Err(cannot_write(&path, space, errno.into())),
    }
    let mut bytes = begin.to_vec();
    bytes.resize(space, 0);
    file.write_all_at(&bytes, 0).map_err(|source| cannot_write(&path, space, source))?;
    file.set_len(space as u64).map_err(|source| cannot_write(&path, space, source))?;
    file.sync_all().map_err(|source| cannot_sync(&path, space, source))?;
    Ok(file)
}

fn cannot_write(file: &Path, space: usize, source: io::Error) -> JournalError {
    match is_full(&source) {
        true => no_space(file, space),
        false => JournalError::Write { file: file.to_owned(), source },
    }
}

/// Some file systems find out only now that there is no space.
fn cannot_sync(file: &Path, space: usize, source: io::Error) -> JournalError {
    match is_full(&source) {
        true => no_space(file, space),
        false => JournalError::Sync { file: file.to_owned(), source },
    }
}

fn no_space(file: &Path, space: usize) -> JournalError {
    JournalError::NoSpace { file: file.to_owned(), needed_bytes: space as u64 }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A link in place of a file is not followed: another program put it there.
fn no_follow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}
