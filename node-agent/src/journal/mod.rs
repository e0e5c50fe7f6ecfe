//! The agent's memory across restarts: a small file for each end of each migration, durable and replaced as a
//! whole.
//!
//! ```text
//!  <state_dir>/lock                 held by the only agent that may write here
//!  <state_dir>/journal/<id>.source  what this node has journalled as a migration's source
//!                     /<id>.destination
//!                     /epoch        the highest operator epoch so far
//!                     /identity     tells this journal from one that was begun anew
//! ```
//!
//! This module knows files, not protocols: the caller decides what a record says, and writes JSON. It makes
//! two promises: content for which [`JournalFile::write`] has returned survives a power cut, and a write that
//! fails, or is cut off anywhere, leaves the old content. Space for all later records of a migration is
//! allocated when its file is created.
//!
//! Each file names the version of its content. Content of an older version is read as it is, with its
//! version; the next record is written in the newest one. A file of a newer version is never touched, and an
//! open one keeps the agent from starting.
//!
//! **Every call blocks**, for as long as the disk takes to sync: from async code, through
//! `tokio::task::spawn_blocking`.

mod disk_faults;
#[cfg(test)]
mod disk_tests;
mod error;
mod file;
mod forget;
mod format;
#[cfg(test)]
mod tests;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use std::{fmt, io};

use parking_lot::Mutex;
use strum::{Display, EnumString, IntoStaticStr};

pub use error::JournalError;
use file::{Copies, Directory, NEW, SPARE, Stored};
pub use forget::forget_epoch;
use format::{EPOCH_VERSION, NEWEST_VERSION};

/// Bytes that are allocated for each of the two copies of a journal.
pub const SPACE_BYTES: usize = 384 * 1024;

/// The same, of an agent of version 0.1.0: an open journal of that size is read, and grows when it is reopened.
const EARLIER_SPACE_BYTES: usize = 64 * 1024;

/// Bytes of content that fit into a record.
pub const CONTENT_MAX_BYTES: usize = file::content_limit(SPACE_BYTES);

const EPOCH: &str = "epoch";
const EPOCH_SPACE_BYTES: usize = 4096;

const IDENTITY: &str = "identity";
const IDENTITY_SPACE_BYTES: usize = 4096;

/// The end of a migration that a journal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Display, EnumString, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Role {
    /// This node had the VM.
    Source,
    /// This node is to have it.
    Destination,
}

impl Role {
    /// As in the name of a file.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Identifies a journal: a migration, and which end of it this node is. Both ends of one migration may be on
/// one node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    id: String,
    role: Role,
}

impl Key {
    /// [`JournalError::InvalidId`] unless the id is 1 to 64 characters of `[a-z0-9-]`.
    pub fn new(id: impl Into<String>, role: Role) -> Result<Self, JournalError> {
        let id = id.into();
        if is_id(&id) { Ok(Self { id, role }) } else { Err(JournalError::InvalidId { id }) }
    }

    /// The migration.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Which end.
    pub fn role(&self) -> Role {
        self.role
    }

    fn of_file_name(name: &str) -> Option<Self> {
        let (id, role) = name.split_once('.')?;
        Self::new(id, role.parse().ok()?).ok()
    }

    fn file_name(&self) -> String {
        format!("{}.{}", self.id, self.role)
    }
}

fn is_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=64).contains(&text.len()) && text.bytes().all(allowed)
}

fn new_identity() -> Result<String, JournalError> {
    let file = Path::new("/proc/sys/kernel/random/uuid");
    let unreadable = |source| JournalError::Read { file: file.to_owned(), source };
    Ok(std::fs::read_to_string(file).map_err(unreadable)?.trim().to_owned())
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file_name())
    }
}

/// What a journal holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// How the bytes are to be read: 1 up to the newest version that this agent writes.
    pub version: u32,
    /// What was written.
    pub bytes: Vec<u8>,
}

/// A journal of this node, with its content or the error of reading it.
pub type Found = (Key, Result<Content, JournalError>);

/// All journals of this node. No other process can open them while this, a clone of it, or a [`JournalFile`]
/// lives.
#[derive(Clone, Debug)]
pub struct Journal {
    directory: Arc<Directory>,
    lock: Arc<File>,
    /// Opened at the first [`Journal::set_epoch`].
    epoch: Arc<Mutex<Option<Copies>>>,
    /// Held while the identity is looked up, so that it is made once.
    identity: Arc<Mutex<()>>,
}

impl Journal {
    /// Creates missing directories (mode 0700), takes the lock ([`JournalError::Locked`]), and removes the
    /// unfinished files of an agent that died. The spare copy of a journal that cannot be read stays: an
    /// administrator may need it.
    ///
    /// [`JournalError::NewerVersionOpen`] if an open journal is of a newer version than this agent knows.
    /// Then no journal is changed.
    pub fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let path = state_dir.join("journal");
        let unusable = |source| JournalError::OpenDirectory { path: state_dir.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(unusable)?;
        let lock = lock(state_dir)?;
        let directory = Directory::open(path)?;
        // The directories themselves must survive a power cut, too.
        let parent = state_dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        for path in [Some(state_dir), parent].into_iter().flatten() {
            Directory::open(path.to_owned())?.sync()?;
        }
        let journal = Self {
            directory: Arc::new(directory),
            lock: Arc::new(lock),
            epoch: Arc::default(),
            identity: Arc::default(),
        };
        journal.refuse_newer_open()?;
        journal.clear_leftovers()?;
        Ok(journal)
    }

    /// An agent that is older than an open journal can neither continue the migration nor answer for it.
    fn refuse_newer_open(&self) -> Result<(), JournalError> {
        for key in self.keys()? {
            if let Err(newer @ JournalError::NewerVersionOpen { .. }) = self.read(&key.file_name()) {
                return Err(newer);
            }
        }
        Ok(())
    }

    /// The file of a journal, for a person.
    pub fn file(&self, key: &Key) -> PathBuf {
        self.directory.file(&key.file_name())
    }

    /// Every journal of this node, in the order of their keys, each with its content or the error of reading
    /// it. Files that are not named as a journal are skipped.
    pub fn read_all(&self) -> Result<Vec<Found>, JournalError> {
        let found = |key: Key| {
            let content = self.read_one(&key);
            (key, content)
        };
        Ok(self.keys()?.into_iter().map(found).collect())
    }

    /// One of them, with its content or the error of reading it.
    pub fn read_one(&self, key: &Key) -> Result<Content, JournalError> {
        let stored = self.read(&key.file_name())?;
        Ok(Content { version: stored.version, bytes: stored.content })
    }

    /// Creates the journal of a key, with space for every later record; its first content is durable when
    /// this returns.
    ///
    /// One that has been finished is replaced, by an atomic rename. [`JournalError::Unfinished`] if there is
    /// an unfinished one, and the error of reading it if it cannot be read: in either case nothing changes.
    /// If creating it fails, nothing of it stays, as far as the disk allows:
    /// [`Journal::left_by_failed_creation`] makes sure of that.
    pub fn create(&self, key: &Key, content: &[u8]) -> Result<JournalFile, JournalError> {
        let name = key.file_name();
        match self.read(&name) {
            Ok(Stored { finished: true, .. }) => {}
            Ok(_) => return Err(JournalError::Unfinished { file: self.directory.file(&name) }),
            Err(JournalError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(unreadable) => return Err(unreadable),
        }
        let copies = Copies::create(&self.directory, &name, SPACE_BYTES, NEWEST_VERSION, content)?;
        Ok(JournalFile { copies, _lock: Arc::clone(&self.lock) })
    }

    /// What [`Journal::create`] has left of a journal although it failed: `None` if it is durable that there
    /// is nothing open of it.
    ///
    /// # Errors
    /// If that cannot be found out, or made durable, yet. To be repeated.
    pub fn left_by_failed_creation(&self, key: &Key) -> Result<Option<JournalFile>, JournalError> {
        self.directory.sync()?;
        match self.read(&key.file_name()) {
            Ok(Stored { finished: true, .. }) => Ok(None),
            Ok(_) => self.reopen(key).map(Some),
            Err(JournalError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens an existing journal, and allocates its spare copy again. A finished one becomes unfinished.
    /// The error of reading it, if it cannot be read: a damaged journal is never overwritten.
    ///
    /// A key has one [`JournalFile`] at a time: two would write into the same spare copy.
    pub fn reopen(&self, key: &Key) -> Result<JournalFile, JournalError> {
        let name = key.file_name();
        self.read(&name)?;
        let copies = Copies::reopen(&self.directory, &name, SPACE_BYTES, NEWEST_VERSION)?;
        Ok(JournalFile { copies, _lock: Arc::clone(&self.lock) })
    }

    /// Removes the oldest finished journals (by the time of their last write) until `keep` of them are left,
    /// and returns the removed. Only those count that [`JournalFile::finish`] has closed, whose content
    /// `is_finished` confirms and whose end has been acknowledged; an unreadable journal is never removed.
    pub fn prune(
        &self,
        keep: usize,
        is_finished: impl Fn(&Key, &Content) -> bool,
    ) -> Result<Vec<Key>, JournalError> {
        let mut finished: Vec<(SystemTime, Key)> = Vec::new();
        for key in self.keys()? {
            let name = key.file_name();
            if let Ok(Stored { version, content: bytes, finished: true, acknowledged: true }) =
                self.read(&name)
                && is_finished(&key, &Content { version, bytes })
            {
                let file = self.directory.file(&name);
                let written = std::fs::metadata(&file).and_then(|metadata| metadata.modified());
                finished.push((written.map_err(|source| JournalError::Read { file, source })?, key));
            }
        }
        finished.sort();
        let excess = finished.len().saturating_sub(keep);
        let removed: Vec<Key> = finished.into_iter().take(excess).map(|(_, key)| key).collect();
        for key in &removed {
            self.directory.remove(&key.file_name())?;
        }
        if !removed.is_empty() {
            self.directory.sync()?;
        }
        Ok(removed)
    }

    /// Notes in a finished journal that the operator knows how it ended, durably. [`JournalError::Unfinished`] if
    /// it is not finished. Without a journal there is nothing to note.
    pub fn acknowledge(&self, key: &Key) -> Result<(), JournalError> {
        match file::acknowledge(&self.directory, &key.file_name(), SPACE_BYTES) {
            Err(JournalError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Whether the end of a journal has been acknowledged.
    pub fn is_acknowledged(&self, key: &Key) -> Result<bool, JournalError> {
        self.read(&key.file_name()).map(|stored| stored.acknowledged)
    }

    /// Removes a finished journal whose end has been acknowledged. Any other one stays.
    pub fn remove_acknowledged(&self, key: &Key) -> Result<(), JournalError> {
        if matches!(self.read(&key.file_name()), Ok(Stored { finished: true, acknowledged: true, .. })) {
            self.directory.remove(&key.file_name())?;
        }
        Ok(())
    }

    /// The highest operator epoch that [`Journal::set_epoch`] has kept; 0 if it never has.
    pub fn epoch(&self) -> Result<u64, JournalError> {
        match file::read(&self.directory, EPOCH, EPOCH_SPACE_BYTES) {
            Ok(stored) => {
                let epoch = stored.content.as_slice().try_into().map(u64::from_le_bytes);
                epoch.map_err(|_| JournalError::NotAJournal { file: self.directory.file(EPOCH) })
            }
            Err(JournalError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Keeps an operator epoch, durable when this returns. One that is not higher than the kept one changes
    /// nothing.
    pub fn set_epoch(&self, epoch: u64) -> Result<(), JournalError> {
        let mut copies = self.epoch.lock();
        if self.epoch()? >= epoch {
            return Ok(());
        }
        let content = epoch.to_le_bytes();
        if copies.is_none() && self.directory.file(EPOCH).exists() {
            *copies = Some(Copies::reopen(&self.directory, EPOCH, EPOCH_SPACE_BYTES, EPOCH_VERSION)?);
        }
        match copies.as_mut() {
            Some(copies) => copies.write(&content),
            None => {
                let created =
                    Copies::create(&self.directory, EPOCH, EPOCH_SPACE_BYTES, EPOCH_VERSION, &content)?;
                *copies = Some(created);
                Ok(())
            }
        }
    }

    /// Tells this journal from every other one, and from one that was begun anew in its place: 1 to 64
    /// characters of `[a-z0-9-]`, made when it is asked for first and durable when this returns. A damaged one
    /// is replaced: nothing that was said of the journal before counts then.
    ///
    /// # Errors
    /// If it cannot be read, or made.
    pub fn identity(&self) -> Result<String, JournalError> {
        let _made_once = self.identity.lock();
        match file::read(&self.directory, IDENTITY, IDENTITY_SPACE_BYTES) {
            Ok(Stored { content, .. }) => {
                if let Some(identity) = String::from_utf8(content).ok().filter(|text| is_id(text)) {
                    return Ok(identity);
                }
            }
            Err(unreadable @ JournalError::Read { .. }) => return Err(unreadable),
            Err(JournalError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(damaged) => tracing::warn!(%damaged, "the journal's identity is replaced"),
        }
        let identity = new_identity()?;
        let (space, content) = (IDENTITY_SPACE_BYTES, identity.as_bytes());
        Copies::create(&self.directory, IDENTITY, space, EPOCH_VERSION, content)?.finish(content)?;
        Ok(identity)
    }

    /// From now on, no sync succeeds, or every one does again.
    #[cfg(test)]
    pub(crate) fn fail_syncs(&self, fail: bool) {
        use disk_faults::Step;
        self.directory.faults.set(move |step| match step {
            Step::SyncFile(_) | Step::SyncDirectory if fail => Err(rustix::io::Errno::IO.into()),
            _ => Ok(()),
        });
    }

    fn read(&self, name: &str) -> Result<Stored, JournalError> {
        file::read(&self.directory, name, SPACE_BYTES)
    }

    /// Of all journals that are here, in order.
    fn keys(&self) -> Result<Vec<Key>, JournalError> {
        let mut keys: Vec<Key> = self.names()?.iter().filter_map(|name| Key::of_file_name(name)).collect();
        keys.sort();
        Ok(keys)
    }

    fn names(&self) -> Result<Vec<String>, JournalError> {
        let list_error = |source| JournalError::List { path: self.directory.path().to_owned(), source };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.directory.path()).map_err(list_error)? {
            // A name that is not UTF-8 is not a journal's.
            names.extend(entry.map_err(list_error)?.file_name().into_string());
        }
        Ok(names)
    }

    /// Removes files that were being created, and spares without their journal or beside a finished one.
    fn clear_leftovers(&self) -> Result<(), JournalError> {
        for name in self.names()? {
            let is_leftover = match (name.strip_suffix(NEW), name.strip_suffix(SPARE)) {
                (Some(of), _) => [EPOCH, IDENTITY].contains(&of) || Key::of_file_name(of).is_some(),
                (_, Some(IDENTITY)) => true,
                (_, Some(of)) if Key::of_file_name(of).is_some() => match self.read(of) {
                    Ok(stored) => stored.finished,
                    Err(JournalError::Open { source, .. }) => source.kind() == io::ErrorKind::NotFound,
                    Err(_) => false,
                },
                _ => false,
            };
            if is_leftover {
                self.directory.remove(&name)?;
            }
        }
        Ok(())
    }
}

/// One journal that is being written.
#[derive(Debug)]
pub struct JournalFile {
    copies: Copies,
    _lock: Arc<File>,
}

impl JournalFile {
    /// Replaces the content; the new one is durable when this returns. It allocates no space.
    ///
    /// If it fails, the old content stays, and the call may be repeated. One case is in doubt: if the name of
    /// the new content could not be made durable ([`JournalError::Sync`] naming the directory, or
    /// [`JournalError::Replace`] without an exchange of names), the old content is put back as far as that
    /// succeeds, and after a power cut either may be found.
    pub fn write(&mut self, content: &[u8]) -> Result<(), JournalError> {
        self.copies.write(content)
    }

    /// As [`JournalFile::write`], for the last time: the spare copy and unused space are freed, and the
    /// journal stays readable until it is pruned. If it fails, the old content stays, with the same exception,
    /// and the call may be repeated; no space is needed for that.
    pub fn finish(&mut self, content: &[u8]) -> Result<(), JournalError> {
        self.copies.finish(content)
    }
}

/// Takes the lock of a state directory for as long as the file lives: the kernel drops it with the process.
fn lock(state_dir: &Path) -> Result<File, JournalError> {
    let path: PathBuf = state_dir.join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&path).map_err(|source| JournalError::Open { file: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let known = file.read_to_string(&mut text).is_ok() && !text.trim().is_empty();
            let holder = if known { format!(" (process {})", text.trim()) } else { String::new() };
            return Err(JournalError::Locked { state_dir: state_dir.to_owned(), holder });
        }
        Err(TryLockError::Error(source)) => return Err(JournalError::Open { file: path, source }),
    }
    // For the message to a second agent; it is not an error if it cannot be written.
    let _ =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(file)
}
