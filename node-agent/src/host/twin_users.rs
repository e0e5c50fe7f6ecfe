//! The users that twins run as: one for each, from a range that nothing else on the node uses.
//!
//! A VM gets the number that its name leads to, if that is free, so that on nodes with the same range it
//! mostly has the same one: who may read its disks is then said once. A folder of `vms/` keeps the number for
//! as long as the VM is here.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use parking_lot::Mutex;

/// Users by their numbers, the last one included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
    last: u32,
}

/// No user of a distribution, of systemd, or of a container is among these (systemd: UIDS-GIDS.md).
pub const DEFAULT_RANGE: &str = "1900000000-1900065535";

/// A text is not a [`UserRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it must be FIRST-LAST, two numbers of users from 1 to 4294967293 in this order")]
pub struct ParseRangeError;

impl FromStr for UserRange {
    type Err = ParseRangeError;

    fn from_str(text: &str) -> Result<Self, ParseRangeError> {
        let (first, last) = text.split_once('-').ok_or(ParseRangeError)?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| ParseRangeError);
        let (first, last) = (number(first)?, number(last)?);
        // 2^32 - 1 means "no user", and 2^32 - 2 is nobody's in some user namespaces.
        if first == 0 || last < first || last > u32::MAX - 2 {
            return Err(ParseRangeError);
        }
        Ok(Self { first, last })
    }
}

impl UserRange {
    /// The first one.
    pub fn first(self) -> u32 {
        self.first
    }

    /// The one for a VM: the first that is free, from the one to which its name leads. None if none is free.
    fn choose(self, vm: &str, used: &BTreeSet<u32>) -> Option<u32> {
        let count = u64::from(self.last - self.first) + 1;
        let start = u64::from(crc32fast::hash(vm.as_bytes())) % count;
        let candidates = (0..count).map(|step| u64::from(self.first) + (start + step) % count);
        candidates.filter_map(|user| u32::try_from(user).ok()).find(|user| !used.contains(user))
    }
}

/// No user for a twin.
#[derive(Debug, thiserror::Error)]
pub enum NoUserError {
    /// It cannot be seen which ones are in use.
    #[error("which users are in use cannot be seen: {path}: {source}")]
    Look {
        /// What was looked at.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// All are in use.
    #[error(
        "no user of --twin-uid-range {first}-{last} is free: each has a process, a twin or a VM's folder"
    )]
    NoneFree {
        /// The range's first.
        first: u32,
        /// And last.
        last: u32,
    },
}

/// The users that twins run as. Clones share what is taken.
#[derive(Clone, Debug)]
pub struct TwinUsers {
    range: UserRange,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

/// A user that one twin has. Free again when this is dropped, unless something of the twin is there.
#[derive(Debug)]
pub struct TwinUser {
    number: u32,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

impl TwinUsers {
    /// None is taken.
    pub fn new(range: UserRange) -> Self {
        Self { range, taken: Arc::default() }
    }

    /// One for the twin of a VM, whose folder is `folder`: no other folder beside it belongs to that user, no
    /// process is of it, and no other twin has it.
    ///
    /// # Errors
    /// [`NoUserError`]
    pub fn take(&self, vm: &str, folder: &Path) -> Result<TwinUser, NoUserError> {
        let mut used = owners_beside(folder)?;
        used.extend(of_processes(Path::new("/proc"))?);
        let mut taken = self.taken.lock();
        used.extend(taken.iter());
        let UserRange { first, last } = self.range;
        let number = self.range.choose(vm, &used).ok_or(NoUserError::NoneFree { first, last })?;
        taken.insert(number);
        Ok(TwinUser { number, taken: Arc::clone(&self.taken) })
    }

    /// The one that a journalled twin has.
    pub fn take_again(&self, number: u32) -> TwinUser {
        self.taken.lock().insert(number);
        TwinUser { number, taken: Arc::clone(&self.taken) }
    }
}

impl TwinUser {
    /// Of the user and of its group.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Drop for TwinUser {
    fn drop(&mut self) {
        self.taken.lock().remove(&self.number);
    }
}

fn owners_beside(folder: &Path) -> Result<BTreeSet<u32>, NoUserError> {
    let Some(parent) = folder.parent() else { return Ok(BTreeSet::new()) };
    let failed = |source| NoUserError::Look { path: parent.to_owned(), source };
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut owners = BTreeSet::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.path() == folder {
            continue;
        }
        match entry.metadata() {
            Ok(found) => drop(owners.insert(found.uid())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(owners)
}

/// The users of all processes: the real, the effective, the saved and the file system's.
fn of_processes(proc: &Path) -> Result<BTreeSet<u32>, NoUserError> {
    let failed = |source| NoUserError::Look { path: proc.to_owned(), source };
    let mut users = BTreeSet::new();
    for entry in fs::read_dir(proc).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // It may have ended meanwhile.
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
        users.extend(line.split_whitespace().filter_map(|number| number.parse::<u32>().ok()));
    }
    Ok(users)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_and_others_are_refused() {
        let range: UserRange = DEFAULT_RANGE.parse().unwrap();
        assert_eq!(range, UserRange { first: 1_900_000_000, last: 1_900_065_535 });
        assert!("7-7".parse::<UserRange>().is_ok());
        for bad in ["", "7", "0-7", "8-7", "-7", "7-", "a-b", "1-4294967294", "1-2-3"] {
            assert_eq!(bad.parse::<UserRange>(), Err(ParseRangeError), "{bad}");
        }
    }

    #[test]
    fn a_vm_gets_the_same_user_everywhere_unless_that_is_taken_and_no_two_get_the_same() {
        let range: UserRange = "100-104".parse().unwrap();
        let mut used = BTreeSet::new();
        let wanted = range.choose("demo/web", &used).unwrap();
        assert_eq!(range.choose("demo/web", &used), Some(wanted));
        for _ in 0..5 {
            let user = range.choose("demo/web", &used).unwrap();
            assert!((100..=104).contains(&user));
            assert!(used.insert(user), "{user} was given twice");
        }
        assert_eq!(range.choose("demo/web", &used), None);
    }

    #[test]
    fn a_user_with_a_process_a_folder_or_a_twin_is_not_free() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("demo.web");
        fs::create_dir(&folder).unwrap();
        fs::create_dir(dir.path().join("demo.other")).unwrap();
        let me = rustix::process::geteuid().as_raw();
        assert!(of_processes(Path::new("/proc")).unwrap().contains(&me));
        assert!(owners_beside(&folder).unwrap().contains(&me));
        fs::remove_dir(dir.path().join("demo.other")).unwrap();
        assert!(owners_beside(&folder).unwrap().is_empty(), "its own folder keeps no user from it");

        let users = TwinUsers::new("1900000007-1900000007".parse().unwrap());
        let user = users.take("demo/web", &folder).unwrap();
        assert_eq!(user.number(), 1_900_000_007);
        let error = users.take("demo/other", &dir.path().join("demo.other")).unwrap_err().to_string();
        assert!(error.starts_with("no user of --twin-uid-range 1900000007-1900000007 is free"), "{error}");
        drop(user);
        drop(users.take_again(1_900_000_007));
        users.take("demo/other", &dir.path().join("demo.other")).unwrap();
    }
}
