//! A folder that another user may write to: a VM's, in which its VMM makes its socket.
//!
//! It is opened once, as a directory, and everything in it is reached from that descriptor. No link is
//! followed, neither in place of the folder nor in it (openat2(2): RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS), so a
//! name that came from another machine, or a link that a tenant's process has put there, leads nowhere else.
//! What is unlinked is a socket, or a file that the agent itself names.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fchown, fstat, fsync, mkdirat, openat, openat2,
    renameat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};

/// A folder that another user may write to.
#[derive(Debug)]
pub(crate) struct Folder {
    directory: OwnedFd,
    path: PathBuf,
    owner: u32,
}

/// A socket that was found, and cannot be exchanged for another any more.
#[derive(Debug)]
pub(crate) struct FoundSocket {
    found: OwnedFd,
    /// Its owner.
    pub(crate) user: u32,
    /// Its permissions.
    pub(crate) mode: u32,
    /// The only user who could have made it: the owner of its folder, if nobody else may write there;
    /// otherwise the agent's own.
    pub(crate) maker: u32,
}

impl Folder {
    /// Opens a folder. None if there is none.
    ///
    /// # Errors
    /// If there is a link on its path, or it is something else than a directory.
    pub(crate) fn open(path: &Path) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match openat2(CWD, path, flags, Mode::empty(), without_links()) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::NOTDIR) => return Err(io::Error::other("it is not a directory")),
            Err(Errno::LOOP) => return Err(io::Error::other("it is a symbolic link, or one is on its path")),
            Err(errno) => return Err(errno.into()),
        };
        let owner = fstat(&directory)?.st_uid;
        Ok(Some(Self { directory, path: path.to_owned(), owner }))
    }

    /// Opens a folder, and makes it if there is none. It is for `owner` alone from then on, or for the agent's
    /// user; files in it keep their owners.
    ///
    /// # Errors
    /// As [`Folder::open`], or if it cannot be made.
    pub(crate) fn make(path: &Path, owner: Option<u32>) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        match mkdirat(CWD, path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut folder = Self::open(path)?.ok_or(Errno::NOENT)?;
        folder.give(&folder.directory, owner)?;
        rustix::fs::fchmod(&folder.directory, Mode::RWXU)?;
        folder.owner = fstat(&folder.directory)?.st_uid;
        Ok(folder)
    }

    /// Makes the folders in which `name` lies, one in the other.
    ///
    /// # Errors
    /// If one of them is a link, or cannot be made.
    pub(crate) fn make_parents(&self, name: &Path, owner: Option<u32>) -> io::Result<()> {
        let mut made = PathBuf::new();
        for component in name.parent().into_iter().flat_map(Path::components) {
            let Component::Normal(part) = component else { return Err(Errno::XDEV.into()) };
            let parent = self.directory_of(&made)?;
            match mkdirat(&parent, part, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            made.push(part);
            self.give(self.directory_of(&made)?, owner)?;
        }
        Ok(())
    }

    fn give(&self, to_give: impl AsFd, owner: Option<u32>) -> io::Result<()> {
        let Some(owner) = owner else { return Ok(()) };
        Ok(fchown(to_give, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?)
    }

    /// The user that it belongs to.
    pub(crate) fn owner(&self) -> u32 {
        self.owner
    }

    /// Where `path`, which may be absolute, lies in this folder. None if it lies elsewhere.
    pub(crate) fn relative<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        relative(&self.path, path)
    }

    /// Opens one of the agent's own files for reading, one more byte than `limit` at most. None if there is
    /// none.
    ///
    /// # Errors
    /// If it is not a regular file with one name that belongs to the agent's user or to the folder's.
    pub(crate) fn read(&self, name: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = self.open_own(name)? else { return Ok(None) };
        let mut text = Vec::new();
        file.take(limit as u64 + 1).read_to_end(&mut text)?;
        Ok(Some(text))
    }

    /// As [`Folder::read`], but open.
    pub(crate) fn open_own(&self, name: &str) -> io::Result<Option<File>> {
        self.open_own_for(name, OFlags::RDONLY)
    }

    /// As [`Folder::open_own`], for reading and appending.
    pub(crate) fn append_own(&self, name: &str) -> io::Result<Option<File>> {
        self.open_own_for(name, OFlags::RDWR | OFlags::APPEND)
    }

    fn open_own_for(&self, name: &str, access: OFlags) -> io::Result<Option<File>> {
        // To open a pipe would wait for its other end.
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NXIO) => return Err(io::Error::other("it is not a regular file")),
            Err(errno) => return Err(errno.into()),
        };
        let found = file.metadata()?;
        let agent = geteuid().as_raw();
        if !found.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        } else if found.nlink() != 1 {
            return Err(io::Error::other("it has another name, too (a hard link)"));
        } else if ![agent, self.owner].contains(&found.uid()) {
            let user = found.uid();
            return Err(io::Error::other(format!(
                "it belongs to user {user}, and not to the folder's owner"
            )));
        }
        Ok(Some(file))
    }

    /// Whether there is something of this name.
    ///
    /// # Errors
    /// If that cannot be seen.
    pub(crate) fn has(&self, name: &str) -> io::Result<bool> {
        match statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Creates one of the agent's own files, for its user alone, in place of what has this name.
    ///
    /// # Errors
    /// If it is a directory, or cannot be made.
    pub(crate) fn create_own(&self, name: &str) -> io::Result<File> {
        self.remove_own(name)?;
        let flags = OFlags::WRONLY
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        Ok(openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Gives one of the agent's own files another name at once, durably.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub(crate) fn rename_own(&self, from: &str, to: &str) -> io::Result<()> {
        renameat(&self.directory, from, &self.directory, to)?;
        Ok(fsync(&self.directory)?)
    }

    /// Removes one of the agent's own files. A link is removed, not followed; a missing file is not an error.
    ///
    /// # Errors
    /// If it is a directory, or cannot be removed.
    pub(crate) fn remove_own(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => Err(io::Error::other(format!("{name} is a directory"))),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes a socket. Anything else that has this name stays, and so does what lies elsewhere.
    ///
    /// # Errors
    /// If the socket cannot be removed.
    pub(crate) fn remove_socket(&self, path: &Path) -> io::Result<()> {
        let Some(name) = self.relative(path) else { return Ok(()) };
        let (Some(parent), Some(last)) = (name.parent(), name.file_name()) else { return Ok(()) };
        // It is behind a link, or not there.
        let Ok(parent) = self.directory_of(parent) else { return Ok(()) };
        match statat(&parent, last, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if is_socket(&found) => Ok(unlinkat(&parent, last, AtFlags::empty())?),
            _ => Ok(()),
        }
    }

    /// Binds a socket that the folder's owner and the agent can use.
    ///
    /// # Errors
    /// If there is something of this name that is not a socket, or it cannot be made.
    pub(crate) fn bind<L>(&self, path: &Path, bind: impl FnOnce(&Path) -> io::Result<L>) -> io::Result<L> {
        self.remove_socket(path)?;
        let name = self.relative(path).ok_or(Errno::XDEV)?;
        let (Some(parent), Some(last)) = (name.parent(), name.file_name()) else {
            return Err(Errno::INVAL.into());
        };
        let parent = self.directory_of(parent)?;
        // bind(2) follows no link in the place of the last name; the others are behind the descriptor.
        let listener = bind(&of_descriptor(&parent).join(last))?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = openat(&parent, last, flags, Mode::empty())?;
        let found = fstat(&made)?;
        if !is_socket(&found) || found.st_uid != geteuid().as_raw() || found.st_nlink != 1 {
            return Err(io::Error::other("it was exchanged for something else"));
        }
        let magic = of_descriptor(&made);
        std::fs::set_permissions(&magic, std::fs::Permissions::from_mode(0o600))?;
        if self.owner != geteuid().as_raw() {
            std::os::unix::fs::chown(&magic, Some(self.owner), None)?;
        }
        Ok(listener)
    }

    /// Removes the folder if nothing else is in it.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub(crate) fn remove_if_empty(self) -> io::Result<()> {
        match std::fs::remove_dir(&self.path) {
            Err(error)
                if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    fn directory_of(&self, name: &Path) -> io::Result<OwnedFd> {
        let name = if name.as_os_str().is_empty() { Path::new(".") } else { name };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat2(&self.directory, name, flags, Mode::empty(), without_links() | ResolveFlags::BENEATH)?)
    }
}

/// Where `path`, which may be absolute, lies in `folder`. None if it lies elsewhere.
pub(crate) fn relative<'a>(folder: &Path, path: &'a Path) -> Option<&'a Path> {
    let inside = if path.is_absolute() { path.strip_prefix(folder).ok()? } else { path };
    let plain = inside.components().all(|component| matches!(component, Component::Normal(_)));
    (plain && inside.file_name().is_some()).then_some(inside)
}

fn without_links() -> ResolveFlags {
    ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn is_socket(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Socket
}

fn of_descriptor(descriptor: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Finds a socket by its absolute path, on which there may be no link.
///
/// # Errors
/// What the kernel says, or that it is something else than a socket.
pub(crate) fn find_socket(path: &Path) -> io::Result<FoundSocket> {
    let (Some(parent), Some(last)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other("it is not a socket"));
    };
    let links = |errno| match errno {
        Errno::LOOP => io::Error::other("there is a symbolic link on its path"),
        other => other.into(),
    };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let parent = openat2(CWD, parent, flags | OFlags::DIRECTORY, Mode::empty(), without_links());
    let parent = parent.map_err(links)?;
    let found = openat(&parent, last, flags | OFlags::NOFOLLOW, Mode::empty())?;
    let (folder, socket) = (fstat(&parent)?, fstat(&found)?);
    if !is_socket(&socket) {
        return Err(io::Error::other("it is not a socket"));
    }
    let shared = Mode::from_raw_mode(folder.st_mode).intersects(Mode::WGRP | Mode::WOTH);
    Ok(FoundSocket {
        found,
        user: socket.st_uid,
        mode: socket.st_mode & 0o7777,
        maker: if shared { geteuid().as_raw() } else { folder.st_uid },
    })
}

impl FoundSocket {
    /// A path to it that leads to no other, as long as this lives.
    pub(crate) fn path(&self) -> PathBuf {
        of_descriptor(&self.found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_plain_names_below_the_folder_are_in_it() {
        let folder = Path::new("/run/slackwater/vms/demo.a");
        for (path, expected) in [
            ("vmm.sock", Some("vmm.sock")),
            ("sub/vmm.sock", Some("sub/vmm.sock")),
            ("/run/slackwater/vms/demo.a/vmm.sock", Some("vmm.sock")),
            ("/run/slackwater/vms/demo.a", None),
            ("/run/slackwater/vms/demo.ab/vmm.sock", None),
            ("/etc/shadow", None),
            ("../demo.b/vmm.sock", None),
            ("", None),
        ] {
            assert_eq!(relative(folder, Path::new(path)), expected.map(Path::new), "{path}");
        }
    }

    #[test]
    fn a_socket_is_removed_and_nothing_else_that_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("vm"), dir.path().join("outside"));
        let folder = Folder::make(&inside, None).unwrap();
        let _outside = UnixListener::bind(&outside).unwrap();
        std::fs::write(inside.join("disk.img"), "precious").unwrap();
        symlink(&outside, inside.join("link")).unwrap();
        symlink(dir.path(), inside.join("folder")).unwrap();
        let _socket = UnixListener::bind(inside.join("vmm.sock")).unwrap();
        for name in ["disk.img", "link", "folder/outside", "../outside", "missing/x", "vmm.sock"] {
            folder.remove_socket(Path::new(name)).unwrap();
        }
        folder.remove_socket(&outside).unwrap();
        assert!(outside.exists());
        assert!(inside.join("disk.img").exists());
        assert!(inside.join("link").is_symlink(), "a link is not a socket");
        assert!(!inside.join("vmm.sock").exists());
    }

    #[test]
    fn own_files_replace_links_and_pipes_and_are_read_only_as_what_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        let inside = dir.path().join("vm");
        let folder = Folder::make(&inside, None).unwrap();
        let refused = |name: &str| folder.read(name, 9).unwrap_err().to_string();
        symlink(&secret, inside.join("link")).unwrap();
        assert_eq!(refused("link"), "it is not a regular file");
        std::fs::hard_link(&secret, inside.join("hard")).unwrap();
        assert_eq!(refused("hard"), "it has another name, too (a hard link)");
        rustix::fs::mkfifoat(CWD, inside.join("pipe"), Mode::RWXU).unwrap();
        assert_eq!(refused("pipe"), "it is not a regular file");
        assert_eq!(folder.read("missing", 9).unwrap(), None);
        for name in ["link", "hard", "pipe"] {
            use std::io::Write;
            folder.create_own(name).unwrap().write_all(b"written").unwrap();
            assert_eq!(folder.read(name, 3).unwrap().unwrap(), b"writ");
        }
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "secret");
    }

    #[test]
    fn a_folder_that_is_a_link_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("vm");
        symlink(dir.path(), &link).unwrap();
        let expected = "it is a symbolic link, or one is on its path";
        for path in [link.clone(), link.join("sub")] {
            assert_eq!(Folder::open(&path).unwrap_err().to_string(), expected);
            assert_eq!(Folder::make(&path, None).unwrap_err().to_string(), expected);
        }
        assert!(Folder::open(&dir.path().join("missing")).unwrap().is_none());
    }

    #[test]
    fn a_socket_is_found_without_following_a_link_and_bound_without_following_one() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        let folder = Folder::make(&real, None).unwrap();
        let path = real.join("x.sock");
        let listener = folder.bind(&path, |path| UnixListener::bind(path)).unwrap();
        let found = find_socket(&path).unwrap();
        let me = geteuid().as_raw();
        assert_eq!((found.user, found.mode, found.maker), (me, 0o600, me));
        std::os::unix::net::UnixStream::connect(found.path()).unwrap();
        listener.accept().unwrap();

        let refused = |path: &Path| find_socket(path).unwrap_err().to_string();
        symlink(&real, dir.path().join("folder")).unwrap();
        assert_eq!(refused(&dir.path().join("folder/x.sock")), "there is a symbolic link on its path");
        symlink(&path, real.join("link.sock")).unwrap();
        assert_eq!(refused(&real.join("link.sock")), "it is not a socket");
        symlink(dir.path().join("elsewhere"), real.join("dangling")).unwrap();
        folder.bind(&real.join("dangling"), |path| UnixListener::bind(path)).unwrap_err();
        assert!(!dir.path().join("elsewhere").exists());
        assert!(folder.bind(Path::new("folder/y.sock"), |path| UnixListener::bind(path)).is_err());
    }
}
