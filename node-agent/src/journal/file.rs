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
//!
//! After a step has failed, nothing that was known before is relied on: not which file has which name, nor
//! that what was written reached the disk (the kernel drops pages that it could not write, and a later sync
//! of the same descriptor succeeds). The next write first syncs the directory, since the spare may have the
//! name of the current content on the disk, and then opens both files by their names and fills the spare
//! anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, RenameFlags, fallocate, renameat, renameat_with};
use rustix::io::Errno;

#[cfg(test)]
use super::disk_faults::DiskFaults;
use super::disk_faults::Step;
use super::format::{ACKNOWLEDGED, HEADER_BYTES, NEWEST_VERSION, Refusal, decode, encode};
use super::{EARLIER_SPACE_BYTES, JournalError};

/// Suffix of the other copy.
pub(super) const SPARE: &str = ".spare";
/// Suffix of a file that is being created.
pub(super) const NEW: &str = ".new";

/// The directory of the files, held open so that it can be synced.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
    #[cfg(test)]
    pub(super) faults: DiskFaults,
}

impl Directory {
    pub(super) fn open(path: PathBuf) -> Result<Self, JournalError> {
        match File::open(&path) {
            Ok(handle) => Ok(Self {
                path,
                handle,
                #[cfg(test)]
                faults: DiskFaults::default(),
            }),
            Err(source) => Err(JournalError::OpenDirectory { path, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Called before each step on the disk: tests let it fail here.
    #[cfg(test)]
    fn before(&self, step: Step<'_>) -> io::Result<()> {
        self.faults.before(step)
    }

    #[cfg(not(test))]
    fn before(&self, _: Step<'_>) -> io::Result<()> {
        Ok(())
    }

    pub(super) fn sync(&self) -> Result<(), JournalError> {
        let synced = self.before(Step::SyncDirectory).and_then(|()| self.handle.sync_all());
        synced.map_err(|source| JournalError::Sync { file: self.path.clone(), source })
    }

    /// Removes a file; a missing one is not an error.
    pub(super) fn remove(&self, name: &str) -> Result<(), JournalError> {
        let file = self.file(name);
        match self.before(Step::Remove(name)).and_then(|()| std::fs::remove_file(&file)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Remove { file, source })
            }
            _ => Ok(()),
        }
    }

    /// False if the file system cannot exchange names.
    fn exchange(&self, one: &str, other: &str) -> Result<bool, Errno> {
        self.before(Step::Rename(other)).map_err(errno)?;
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
        // It is in place. What had the name before is removed at the next start.
        if let Err(error) = self.remove(new) {
            tracing::warn!(%error, "what a journal has replaced stays for now");
        }
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), Errno> {
        self.before(Step::Rename(to)).map_err(errno)?;
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
    live: File,
    /// The file `name` with [`SPARE`].
    pub(super) spare: File,
    /// Whether names are exchanged; tests turn it off to take the other path.
    pub(super) exchanges: bool,
    /// A step has failed, or nothing is to be written any more: what the names stand for is looked up before
    /// anything is written.
    in_doubt: bool,
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
                in_doubt: false,
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
        // Which file has which name must be durable before the spare is written: see the module.
        directory.sync()?;
        let live = grown(directory, name, space)?;
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
            in_doubt: false,
        })
    }

    /// Replaces the content.
    pub(super) fn write(&mut self, content: &[u8]) -> Result<(), JournalError> {
        let bytes = record(&self.directory, &self.name, self.space, self.version, content)?;
        if self.in_doubt {
            let exchanges = self.exchanges;
            *self = Self::reopen(&self.directory, &self.name, self.space, self.version)?;
            self.exchanges = exchanges;
        }
        self.in_doubt = true;
        self.fill_spare(&bytes)?;
        self.put_in_place()?;
        self.in_doubt = false;
        Ok(())
    }

    /// Replaces the content for the last time, and frees the space that is no longer needed. May be repeated.
    pub(super) fn finish(&mut self, content: &[u8]) -> Result<(), JournalError> {
        let mut bytes = record(&self.directory, &self.name, self.space, self.version, content)?;
        bytes.extend(std::iter::repeat_n(0, ACKNOWLEDGED.len()));
        if is_size_of_open(bytes.len(), self.space) {
            bytes.push(0);
        }
        let spare_name = self.spare_name();
        if self.in_doubt {
            // A spare that an earlier try has cut to its content is long enough: no space is needed.
            self.directory.sync()?;
            read(&self.directory, &self.name, self.space)?;
            self.spare = open_or_create(&self.directory, &spare_name, self.space)?;
        }
        self.in_doubt = true;
        self.fill_spare(&bytes)?;
        let spare_file = self.directory.file(&spare_name);
        let cut = self.directory.before(Step::Truncate(&spare_name));
        let cut = cut.and_then(|()| self.spare.set_len(bytes.len() as u64));
        cut.map_err(|source| JournalError::Write { file: spare_file, source })?;
        self.sync_spare()?;
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
        let name = self.spare_name();
        let written = self.directory.before(Step::Write(&name));
        let written = written.and_then(|()| self.spare.write_all_at(bytes, 0));
        written.map_err(|source| cannot_write(&self.directory.file(&name), self.space, source))?;
        self.sync_spare()
    }

    fn sync_spare(&self) -> Result<(), JournalError> {
        let name = self.spare_name();
        let synced = self.directory.before(Step::SyncFile(&name)).and_then(|()| self.spare.sync_all());
        synced.map_err(|source| cannot_sync(&self.directory.file(&name), self.space, source))
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
        if let Err(error) = self.directory.sync() {
            // It is not known to be durable, so the old content is put back. If that fails, too, the names
            // stay as they are.
            let _ = self.directory.exchange(&spare_name, &self.name);
            return Err(error);
        }
        std::mem::swap(&mut self.live, &mut self.spare);
        Ok(())
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
    /// The operator knows how it ended.
    pub(super) acknowledged: bool,
}

/// Marks a finished file, in the room that it has for that: what it holds stays as it is. May be repeated.
pub(super) fn acknowledge(directory: &Directory, name: &str, space: usize) -> Result<(), JournalError> {
    let stored = read(directory, name, space)?;
    let file = directory.file(name);
    if !stored.finished {
        return Err(JournalError::Unfinished { file });
    }
    let opened = OpenOptions::new().write(true).custom_flags(no_follow()).open(&file);
    let handle = opened.map_err(|source| JournalError::Open { file: file.clone(), source })?;
    let behind = (HEADER_BYTES + stored.content.len()) as u64;
    let written =
        directory.before(Step::Write(name)).and_then(|()| handle.write_all_at(ACKNOWLEDGED, behind));
    written.map_err(|source| cannot_write(&file, space, source))?;
    let synced = directory.before(Step::SyncFile(name)).and_then(|()| handle.sync_all());
    synced.map_err(|source| cannot_sync(&file, space, source))
}

/// The content of a file.
pub(super) fn read(directory: &Directory, name: &str, space: usize) -> Result<Stored, JournalError> {
    let file = directory.file(name);
    let opened = directory.before(Step::Read(name));
    let opened = opened.and_then(|()| OpenOptions::new().read(true).custom_flags(no_follow()).open(&file));
    let handle = opened.map_err(|source| JournalError::Open { file: file.clone(), source })?;
    let mut bytes = Vec::new();
    // Never more than the space of one, whatever the file has.
    io::Read::read_to_end(&mut io::Read::take(handle, space as u64), &mut bytes)
        .map_err(|source| JournalError::Read { file: file.clone(), source })?;
    let finished = !is_size_of_open(bytes.len(), space);
    match decode(&bytes) {
        Ok(decoded) => {
            let behind = bytes.get(HEADER_BYTES + decoded.content.len()..).unwrap_or_default();
            let acknowledged = finished && behind.starts_with(ACKNOWLEDGED);
            let (version, content) = (decoded.version, decoded.content.to_vec());
            Ok(Stored { version, content, finished, acknowledged })
        }
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

/// The bytes of a record, if they fit. Some less than the space are taken, so that a full file is never a
/// finished one.
fn record(
    directory: &Directory,
    name: &str,
    space: usize,
    version: u32,
    content: &[u8],
) -> Result<Vec<u8>, JournalError> {
    let fits = content.len() <= content_limit(space);
    encode(version, content).filter(|_| fits).ok_or_else(|| JournalError::ContentTooLarge {
        file: directory.file(name),
        has_bytes: content.len() as u64,
        limit_bytes: content_limit(space) as u64,
    })
}

/// Bytes of content that fit into a copy of this size.
pub(super) const fn content_limit(space: usize) -> usize {
    space - HEADER_BYTES - ACKNOWLEDGED.len() - 2
}

/// A file of this size, all of it written and synced, beginning with these bytes. The directory is not synced
/// yet.
fn allocated(directory: &Directory, name: &str, space: usize, begin: &[u8]) -> Result<File, JournalError> {
    let path = directory.file(name);
    let file = open_or_create(directory, name, space)?;
    directory.before(Step::Write(name)).map_err(|source| cannot_write(&path, space, source))?;
    match fallocate(&file, FallocateFlags::empty(), 0, space as u64) {
        // Where this is not supported, the following write allocates.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(errno) => return Err(cannot_write(&path, space, errno.into())),
    }
    let mut bytes = begin.to_vec();
    bytes.resize(space, 0);
    file.write_all_at(&bytes, 0).map_err(|source| cannot_write(&path, space, source))?;
    file.set_len(space as u64).map_err(|source| cannot_write(&path, space, source))?;
    let synced = directory.before(Step::SyncFile(name)).and_then(|()| file.sync_all());
    synced.map_err(|source| cannot_sync(&path, space, source))?;
    Ok(file)
}

fn open_or_create(directory: &Directory, name: &str, space: usize) -> Result<File, JournalError> {
    let path = directory.file(name);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(no_follow());
    let opened = directory.before(Step::Open(name)).and_then(|()| options.open(&path));
    opened.map_err(|source| match is_full(&source) {
        true => no_space(&path, space),
        false => JournalError::Open { file: path, source },
    })
}

/// An existing file, whose space is allocated again if it was finished. It must hold a record that is whole:
/// zeroes after the content do not change it.
fn grown(directory: &Directory, name: &str, space: usize) -> Result<File, JournalError> {
    read(directory, name, space)?;
    let path = directory.file(name);
    let opened = OpenOptions::new().read(true).write(true).custom_flags(no_follow()).open(&path);
    let file = opened.map_err(|source| JournalError::Open { file: path.clone(), source })?;
    let has = file.metadata().map_err(|source| JournalError::Read { file: path.clone(), source })?.len();
    let missing = space.saturating_sub(usize::try_from(has).unwrap_or(usize::MAX));
    if missing > 0 {
        let written = directory.before(Step::Write(name));
        let written = written.and_then(|()| file.write_all_at(&vec![0; missing], has));
        written.map_err(|source| cannot_write(&path, space, source))?;
        let synced = directory.before(Step::SyncFile(name)).and_then(|()| file.sync_all());
        synced.map_err(|source| cannot_sync(&path, space, source))?;
    }
    Ok(file)
}

/// Whether a file of this length is not finished.
fn is_size_of_open(length: usize, space: usize) -> bool {
    length == space || length == EARLIER_SPACE_BYTES
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

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A link in place of a file is not followed: another program put it there.
fn no_follow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}
