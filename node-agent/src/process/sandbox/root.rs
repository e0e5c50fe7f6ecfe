//! The root directory of a sandbox: a tmpfs, and in it what the program sees.
//!
//! The files and folders of the node are cloned as detached mounts (open_tree(2)) before anything is changed;
//! the new root is entered; then they are attached. So no path is looked up in a tree that a program can write
//! to while the node's own root can still be reached.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, StatVfsMountFlags, fstatvfs, makedev, mknodat, statvfs};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_move, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, chroot, pivot_root, umask};
use rustix::thread::UnshareFlags;

use super::error::step;
use super::{Node, Sandbox, SandboxError, Shown};

/// Character devices that every program has: `drivers/char/mem.c` of the kernel.
const COMMON: [(&str, u32, u32); 5] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)];

/// A folder is empty, and this is more than enough for it.
const SIZE: &std::ffi::CStr = c"mode=755,size=1m,nr_inodes=4096";
/// Only the program's own processes, and nothing besides processes: Documentation/filesystems/proc.rst.
const OWN_PROCESSES: &std::ffi::CStr = c"hidepid=invisible,subset=pid";
const HOST_NAME: &[u8] = b"twin";

const ALWAYS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// A file or folder of the node, cloned and not yet attached.
struct Cloned<'a> {
    mount: OwnedFd,
    shown: &'a Shown,
    is_folder: bool,
    /// What its own mount forbids, and must go on to forbid.
    forbidden: MountFlags,
}

/// Moves this process into namespaces and a root of its own.
pub(super) fn enter(sandbox: &Sandbox) -> Result<(), SandboxError> {
    if sandbox.user == 0 {
        return Err(SandboxError::Root);
    }
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    flags.set(UnshareFlags::NEWNET, !sandbox.host_network);
    unshare(flags).map_err(step("leave the node's namespaces (unshare)"))?;
    rustix::system::sethostname(HOST_NAME).map_err(step("set the host's name"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("make its mounts private"))?;

    let own = Shown { path: sandbox.directory.clone(), writable: true };
    let mut shown: Vec<&Shown> = sandbox.shown.iter().chain([&own]).collect();
    // A folder before what lies in it.
    shown.sort();
    let cloned = shown.into_iter().map(clone).collect::<Result<Vec<_>, _>>()?;

    umask(Mode::WGRP | Mode::WOTH);
    let at = &sandbox.directory;
    mount("tmpfs", at, "tmpfs", ALWAYS, SIZE).map_err(step("mount its root"))?;
    chdir(at).map_err(step("enter its root"))?;
    change_root()?;

    fs::create_dir("/dev").map_err(step("make /dev"))?;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("tmpfs", "/dev", "tmpfs", devices, SIZE).map_err(step("mount /dev"))?;
    for (name, major, minor) in COMMON {
        make_node(&Path::new("/dev").join(name), major, minor, 0o666, None)?;
    }
    for Node { path, major, minor } in &sandbox.devices {
        if !path.starts_with("/dev") {
            return Err(not_shown(path)(io::Error::other("a device must be below /dev")));
        }
        make_node(path, *major, *minor, 0o600, Some(sandbox.user))?;
    }
    fs::create_dir("/proc").map_err(step("make /proc"))?;
    mount("proc", "/proc", "proc", ALWAYS | MountFlags::NOEXEC, OWN_PROCESSES)
        .map_err(step("mount /proc"))?;
    for cloned in cloned {
        let path = &cloned.shown.path;
        attach(&cloned).map_err(not_shown(path))?;
    }
    for link in &sandbox.links {
        make_parents(&link.path)
            .and_then(|()| symlink(&link.target, &link.path))
            .map_err(not_shown(&link.path))?;
    }
    for (path, more) in [("/dev", devices), ("/", ALWAYS)] {
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | more, c"")
            .map_err(step("make its root read-only"))?;
    }
    chdir(at).map_err(step("enter the twin's folder"))
}

fn not_shown(path: &Path) -> impl Fn(io::Error) -> SandboxError {
    move |source| SandboxError::Show { path: path.to_owned(), source }
}

#[expect(deprecated, reason = "unshare_unsafe() is unsafe because of FILES, which is not among these flags")]
fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    rustix::thread::unshare(flags.difference(UnshareFlags::FILES))
}

fn clone(shown: &Shown) -> Result<Cloned<'_>, SandboxError> {
    let failed = not_shown(&shown.path);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let found = fs::metadata(&shown.path).map_err(&failed)?;
    if !found.is_dir() && !found.is_file() {
        return Err(failed(io::Error::other("only folders and regular files are shown")));
    }
    let own = statvfs(&shown.path).map_err(|errno| failed(errno.into()))?.f_flag;
    let mount = open_tree(CWD, &shown.path, flags).map_err(|errno| failed(errno.into()))?;
    // The path may lead elsewhere by now.
    let cloned = fstatvfs(&mount).map_err(|errno| failed(errno.into()))?.f_flag;
    let mut forbidden = MountFlags::empty();
    forbidden.set(MountFlags::RDONLY, (own | cloned).contains(StatVfsMountFlags::RDONLY));
    forbidden.set(MountFlags::NOEXEC, (own | cloned).contains(StatVfsMountFlags::NOEXEC));
    Ok(Cloned { mount, shown, is_folder: found.is_dir(), forbidden })
}

/// Makes the current directory, on which a file system is mounted, the root, and takes the node's away.
fn change_root() -> Result<(), SandboxError> {
    match pivot_root(".", ".") {
        // The old root now lies on the new one.
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(step("take the node's root away"))?,
        // The root is an initramfs, which cannot be exchanged. It is covered, as switch_root(8) does it: without
        // CAP_SYS_CHROOT and without a descriptor of it there is no way back.
        Err(Errno::INVAL) => cover_root()?,
        Err(errno) => return Err(step("exchange the root (pivot_root)")(errno)),
    }
    chdir("/").map_err(step("enter its root"))
}

/// As [`change_root`], for a root that cannot be exchanged.
pub(super) fn cover_root() -> Result<(), SandboxError> {
    mount_move(".", "/").map_err(step("cover the node's root"))?;
    chroot(".").map_err(step("enter its root (chroot)"))
}

fn make_parents(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

fn make_node(path: &Path, major: u32, minor: u32, mode: u32, user: Option<u32>) -> Result<(), SandboxError> {
    let make = || -> io::Result<()> {
        make_parents(path)?;
        mknodat(CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(mode), makedev(major, minor))?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        user.map_or(Ok(()), |user| chown(path, Some(user), Some(user)))
    };
    make().map_err(not_shown(path))
}

fn attach(cloned: &Cloned<'_>) -> io::Result<()> {
    let path: &PathBuf = &cloned.shown.path;
    if cloned.is_folder {
        fs::create_dir_all(path)?;
    } else {
        make_parents(path)?;
        // It is there already if its folder is shown, too.
        if fs::symlink_metadata(path).is_err() {
            fs::File::create_new(path)?;
        }
    }
    move_mount(&cloned.mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let mut flags = MountFlags::BIND | ALWAYS | cloned.forbidden;
    if !cloned.shown.writable {
        flags |= MountFlags::RDONLY;
    }
    Ok(mount_remount(path, flags, c"")?)
}
