//! A control group of its own for each twin, so that a twin outlives the agent that started it, and leaves
//! nothing behind when it is discarded. Version 2 only: cgroup.kill is atomic, and cgroup.events reports when
//! the last process has gone.
//!
//! `<root>/slackwater/<namespace>.<name>-<migration>`, as in Documentation/admin-guide/cgroup-v2.rst.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use super::file_events::FileEvents;

/// The group of all twins, below the root.
const PARENT: &str = "slackwater";

/// CGROUP2_SUPER_MAGIC of include/uapi/linux/magic.h.
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// Why a control group could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// Not version 2.
    #[error(
        "{path} is not cgroup v2: mount it there (`mount -t cgroup2`), or boot with systemd.unified_cgroup_hierarchy=1"
    )]
    NotV2 {
        /// The root.
        path: PathBuf,
    },
    /// The root does not exist or cannot be read.
    #[error("cannot use the cgroups at {path}")]
    Root {
        /// The root.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name that cannot be the name of a directory.
    #[error("`{name}` cannot be the name of a cgroup")]
    Name {
        /// The name.
        name: String,
    },
    /// No permission, or a limit on how many there may be.
    #[error("cannot make the cgroup {path}")]
    Make {
        /// The group.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There are processes in it.
    #[error("the cgroup {path} is in use by process {pid}")]
    InUse {
        /// The group.
        path: PathBuf,
        /// One of its processes.
        pid: u32,
    },
    /// One of its files.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its last process did not end.
    #[error("processes of the cgroup {path} are still there {} ms after they have been killed", limit.as_millis())]
    StillThere {
        /// The group.
        path: PathBuf,
        /// How long they had.
        limit: Duration,
    },
    /// No inotify.
    #[error("cannot watch {path}")]
    Watch {
        /// The file.
        path: PathBuf,
        /// Why.
        source: notify::Error,
    },
}

/// The error and what caused it, in one line.
pub(crate) fn error_chain(error: &CgroupError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// A twin's control group. Dropping it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the group `<root>/slackwater/<name>`, or takes over an empty one of that name.
    ///
    /// # Errors
    /// [`CgroupError`]: no cgroup v2 at `root`, no permission, or a group of that name with processes in it.
    pub fn make(root: &Path, name: &str) -> Result<Self, CgroupError> {
        let at_root = |source: io::Error| CgroupError::Root { path: root.to_owned(), source };
        let kind = rustix::fs::statfs(root).map_err(|errno| at_root(errno.into()))?;
        if kind.f_type as i64 != CGROUP2_SUPER_MAGIC {
            return Err(CgroupError::NotV2 { path: root.to_owned() });
        }
        let group = Self::with_name(root, name)?;
        fs::create_dir_all(&group.path)
            .map_err(|source| CgroupError::Make { path: group.path.clone(), source })?;
        match group.processes()?.first() {
            Some(pid) => Err(CgroupError::InUse { path: group.path, pid: *pid }),
            None => Ok(group),
        }
    }

    /// The group `<root>/slackwater/<name>`, whether it exists or not.
    ///
    /// # Errors
    /// [`CgroupError::Name`].
    pub fn with_name(root: &Path, name: &str) -> Result<Self, CgroupError> {
        let mut components = Path::new(name).components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name)
        {
            return Err(CgroupError::Name { name: name.to_owned() });
        }
        Ok(Self { path: root.join(PARENT).join(name) })
    }

    /// The group of a process if the agent made it: `None` for a VMM that was not started as a twin.
    ///
    /// # Errors
    /// If `/proc/<pid>/cgroup` cannot be read.
    pub fn of_process(root: &Path, pid: u32) -> Result<Option<Self>, CgroupError> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = fs::read_to_string(&path).map_err(|source| CgroupError::File { path, source })?;
        Ok(twins_group(&text).map(|name| Self { path: root.join(PARENT).join(name) }))
    }

    /// Its name: [`Cgroup::with_name`] finds it again by that.
    pub fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The processes in it, by their numbers in the agent's PID namespace.
    ///
    /// # Errors
    /// If cgroup.procs cannot be read, or has a line that is no number.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let read = fs::read_to_string(&path).and_then(|text| {
            let number = |line: &str| {
                line.parse().map_err(|_| io::Error::other(format!("`{line}` is not the number of a process")))
            };
            text.lines().map(number).collect()
        });
        read.map_err(|source| CgroupError::File { path, source })
    }

    /// Kills all its processes, waits until it is empty, and removes it. It is not an error if the group does
    /// not exist.
    ///
    /// # Errors
    /// [`CgroupError::StillThere`] after `limit`; a process in an uninterruptible sleep cannot be killed.
    /// [`CgroupError::File`], [`CgroupError::Watch`].
    pub async fn clear(&self, limit: Duration) -> Result<(), CgroupError> {
        let events = self.path.join("cgroup.events");
        // Watched before the kill: the last process may end before the first look.
        let changes = match FileEvents::watch(&events) {
            Ok(changes) => changes,
            Err(_) if matches!(self.path.try_exists(), Ok(false)) => return Ok(()),
            Err(source) => return Err(CgroupError::Watch { path: events, source }),
        };
        let kill = self.path.join("cgroup.kill");
        fs::write(&kill, "1").map_err(|source| CgroupError::File { path: kill, source })?;
        let emptied = async {
            while populated(&events)? {
                changes.next().await;
            }
            Ok(())
        };
        timeout(limit, emptied)
            .await
            .map_err(|_| CgroupError::StillThere { path: self.path.clone(), limit })??;
        fs::remove_dir(&self.path).map_err(|source| CgroupError::File { path: self.path.clone(), source })
    }
}

/// Whether cgroup.events says that there are processes in the group or below it. It must say so: without a
/// word, the group is not empty.
fn populated(events: &Path) -> Result<bool, CgroupError> {
    let read = fs::read_to_string(events).and_then(|text| {
        text.lines()
            .find_map(|line| match line {
                "populated 0" => Some(false),
                "populated 1" => Some(true),
                _ => None,
            })
            .ok_or_else(|| io::Error::other("it does not say whether the group is populated"))
    });
    read.map_err(|source| CgroupError::File { path: events.to_owned(), source })
}

/// The name of a twin's group in `/proc/<pid>/cgroup`, where `0::` begins the line of version 2.
fn twins_group(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let name = path.strip_prefix('/')?.strip_prefix(PARENT)?.strip_prefix('/')?;
    (!name.is_empty() && !name.contains('/')).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cgroup_v2_the_error_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let message = |root: &Path| Cgroup::make(root, "demo.counter-1").unwrap_err().to_string();
        assert_eq!(
            message(dir.path()),
            format!(
                "{} is not cgroup v2: mount it there (`mount -t cgroup2`), or boot with \
                 systemd.unified_cgroup_hierarchy=1",
                dir.path().display()
            )
        );
        assert_eq!(message(Path::new("/nowhere")), "cannot use the cgroups at /nowhere");
    }

    #[test]
    fn a_group_is_empty_only_if_the_kernel_says_so() {
        let root = tempfile::tempdir().unwrap();
        let group = Cgroup::with_name(root.path(), "demo.counter-1").unwrap();
        assert!(group.processes().is_err(), "there is no such file");
        fs::create_dir_all(group.path()).unwrap();
        let events = group.path().join("cgroup.events");
        for (text, expected) in [
            ("populated 1\nfrozen 0\n", Some(true)),
            ("frozen 0\npopulated 0\n", Some(false)),
            ("", None),
            ("frozen 0\npopu", None),
        ] {
            fs::write(&events, text).unwrap();
            assert_eq!(populated(&events).ok(), expected, "{text:?}");
        }
        for (text, expected) in [("", Some(vec![])), ("7\n9\n", Some(vec![7, 9])), ("7\n-\n", None)] {
            fs::write(group.path().join("cgroup.procs"), text).unwrap();
            assert_eq!(group.processes().ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn only_a_group_directly_below_the_agents_is_a_twins() {
        assert_eq!(twins_group("0::/slackwater/demo.a-1\n"), Some("demo.a-1"));
        assert_eq!(twins_group("5:pids:/x\n0::/slackwater/demo.a-1\n"), Some("demo.a-1"));
        for other in [
            "",
            "0::/",
            "0::/slackwater",
            "0::/slackwater/",
            "0::/slackwater/a/b",
            "1:x:/slackwater/a",
            "0::/xslackwater/a",
        ] {
            assert_eq!(twins_group(other), None, "{other}");
        }
    }
}
