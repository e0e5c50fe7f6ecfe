//! The VMs of the node: directories `<run-dir>/vms/<namespace>.<name>` with a `vm.json`, watched, not polled.
//!
//! A directory without a `vm.json` is not a VM: a twin has one until it runs. A broken `vm.json` is listed
//! with its error. A writer completes the file first and then moves it into place, as [`publish`] does; else
//! the list may show it broken for a moment.
//!
//! A VM leaves the list only when its directory or its `vm.json` is certainly not there. What cannot be read
//! stays in it with the reason, and is read again soon.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher};
use rustix::process::geteuid;
use tokio::sync::watch;
use tracing::{info, warn};

use super::vm::{self, VM_JSON_LIMIT_BYTES, VmJson, VmJsonError};
use crate::process::file_events::is_change;
use crate::process::folder::Folder;

/// The file that makes a directory a VM.
const VM_JSON: &str = "vm.json";

/// Where it is written before it is moved into place.
const TEMPORARY: &str = ".vm.json.new";

/// A directory with a `vm.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmEntry {
    /// Absolute, if the run directory is.
    pub directory: PathBuf,
    /// The VM, or why the file cannot be used.
    pub vm: Result<KnownVm, UnusableVm>,
}

/// Why a `vm.json` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableVm {
    /// It cannot be read.
    #[error("cannot read vm.json: {reason}")]
    Read {
        /// What the kernel said, or what it is instead of a file.
        reason: String,
    },
    /// The directory of all VMs cannot be listed.
    #[error("whether its directory is still there is not known: {reason}")]
    Unlisted {
        /// What the kernel said.
        reason: String,
    },
    /// Its content is not valid.
    #[error(transparent)]
    Content(#[from] VmJsonError),
    /// It is the `vm.json` of another directory.
    #[error("the directory is named `{directory}`, but vm.json says `{vm}` (<namespace>.<name>)")]
    Directory {
        /// The directory's name.
        directory: String,
        /// The name that the file asks for.
        vm: String,
    },
}

/// A VM whose `vm.json` is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownVm {
    /// Its content.
    pub json: VmJson,
    /// Its text, as it goes to a destination.
    pub text: String,
    /// Its directory.
    pub directory: PathBuf,
    /// The socket of its VMM.
    pub socket: PathBuf,
}

/// Why the VMs cannot be watched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchVmsError {
    /// The directory of the VMs cannot be made.
    #[error("cannot make the directory {path}")]
    MakeDirectory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be listed, so which VMs there are is not known.
    #[error("cannot list the directory {path}")]
    List {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be watched.
    #[error("cannot watch the directory {path}")]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: notify::Error,
    },
    /// No thread.
    #[error("cannot start the thread that watches the VMs")]
    StartThread(#[source] io::Error),
}

/// The directory of the VM, or the twin, of this namespace and name.
pub fn directory(run_dir: &Path, vm: &VmJson) -> PathBuf {
    directory_of(run_dir, &vm.namespace, &vm.name)
}

/// As [`directory`], for a VM without its `vm.json`.
pub fn directory_of(run_dir: &Path, namespace: &str, name: &str) -> PathBuf {
    run_dir.join("vms").join(format!("{namespace}.{name}"))
}

/// Whether the directory holds a VM. A twin's does not yet.
///
/// # Errors
/// If it is a link, or cannot be looked into.
pub fn holds_vm(directory: &Path) -> io::Result<bool> {
    Folder::open(directory)?.map_or(Ok(false), |folder| folder.has(VM_JSON))
}

/// Makes the VM known whose directory this is: writes its `vm.json` at once or not at all, durably.
///
/// # Errors
/// If the file cannot be written. There is then none, or the one that was there before.
pub fn publish(directory: &Path, vm_json: &str) -> io::Result<()> {
    let folder = Folder::open(directory)?.ok_or(io::ErrorKind::NotFound)?;
    let mut file = folder.create_own(TEMPORARY)?;
    file.write_all(vm_json.as_bytes())?;
    file.sync_all()?;
    folder.rename_own(TEMPORARY, VM_JSON)
}

/// Takes a VM away from this node: its `vm.json` first, so that half of a VM is never seen, then the agent's
/// own `files` and the socket if they are in the directory, then the directory, if nothing else is in it.
/// Files of others (a disk, say) stay, and so does everything that is elsewhere, whatever the socket names.
///
/// # Errors
/// If something cannot be removed. A missing file is not an error.
pub fn retire(directory: &Path, socket: &Path, files: &[&str]) -> io::Result<()> {
    let Some(folder) = Folder::open(directory)? else { return Ok(()) };
    for file in [VM_JSON, TEMPORARY].iter().chain(files) {
        folder.remove_own(file)?;
    }
    folder.remove_socket(socket)?;
    folder.remove_if_empty()
}

/// The list of VMs, kept up to date for as long as this lives.
#[derive(Debug)]
pub struct VmWatch {
    list: watch::Receiver<Vec<VmEntry>>,
    wake: mpsc::Sender<Wake>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wake {
    List,
    Stop,
}

impl VmWatch {
    /// Reads `<run_dir>/vms`, which is created if it does not exist, and watches it from then on.
    ///
    /// # Errors
    /// [`WatchVmsError`].
    pub fn start(run_dir: &Path) -> Result<Self, WatchVmsError> {
        let vms = run_dir.join("vms");
        fs::create_dir_all(&vms)
            .map_err(|source| WatchVmsError::MakeDirectory { path: vms.clone(), source })?;
        let watch_error = |source| WatchVmsError::Watch { path: vms.clone(), source };
        let (wake, woken) = mpsc::channel();
        let waker = wake.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // An error may hide any change. Reads do not count: listing reads.
            if event.as_ref().map_or(true, is_change) {
                // Fails only after the thread has ended.
                let _ = waker.send(Wake::List);
            }
        })
        .map_err(watch_error)?;
        watcher.watch(&vms, RecursiveMode::NonRecursive).map_err(watch_error)?;
        let mut watcher = Watching { watcher, unwatched: BTreeSet::new() };
        let found = list(&vms, |directory| watcher.watch(directory));
        if let Some(source) = found.error {
            return Err(WatchVmsError::List { path: vms, source });
        }
        let again = watcher.must_look_again(&found.vms);
        let (sender, list) = watch::channel(found.vms);
        thread::Builder::new()
            .name("vm-watch".to_owned())
            .spawn(move || keep_listing(&vms, watcher, again, &woken, &sender))
            .map_err(WatchVmsError::StartThread)?;
        Ok(Self { list, wake })
    }

    /// The list as of now, sorted by directory, and its changes.
    pub fn list(&self) -> watch::Receiver<Vec<VmEntry>> {
        self.list.clone()
    }
}

impl Drop for VmWatch {
    fn drop(&mut self) {
        // Fails only if the thread has ended.
        let _ = self.wake.send(Wake::Stop);
    }
}

/// How soon what could not be read is read again: no event reports that it can be.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// `again`: the first listing is to be repeated soon.
fn keep_listing(
    vms: &Path,
    mut watcher: Watching,
    mut again: bool,
    woken: &mpsc::Receiver<Wake>,
    sender: &watch::Sender<Vec<VmEntry>>,
) {
    loop {
        let wake = match woken.recv_timeout(if again { LOOK_AGAIN } else { Duration::MAX }) {
            Ok(wake) => wake,
            Err(RecvTimeoutError::Timeout) => Wake::List,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        // One listing covers all changes until now.
        if wake == Wake::Stop || woken.try_iter().any(|wake| wake == Wake::Stop) {
            return;
        }
        if again {
            // Another directory may have taken the place of the one that is watched.
            watcher.watch(vms);
        }
        let Listing { vms: mut found, error } = list(vms, |directory| watcher.watch(directory));
        if let Some(error) = &error {
            keep_unlisted(&mut found, &sender.borrow(), &format!("{}: {error}", vms.display()));
        }
        again = error.is_some() || watcher.must_look_again(&found);
        sender.send_if_modified(|list| {
            let modified = *list != found;
            if modified {
                log_changes(list, &found);
                *list = found;
            }
            modified
        });
    }
}

/// The directories that are watched.
struct Watching {
    watcher: RecommendedWatcher,
    /// Those that could not be.
    unwatched: BTreeSet<PathBuf>,
}

impl Watching {
    /// A directory is watched before it is read, so that no change is missed. Watching it again is harmless,
    /// and needed where one of the same name took its place.
    fn watch(&mut self, directory: &Path) {
        match self.watcher.watch(directory, RecursiveMode::NonRecursive) {
            Err(error) if !matches!(directory.try_exists(), Ok(false)) => {
                if self.unwatched.insert(directory.to_owned()) {
                    let directory = directory.display();
                    warn!(%directory, %error, "cannot watch a VM's directory: it is looked at every {LOOK_AGAIN:?}");
                }
            }
            _ => {
                self.unwatched.remove(directory);
            }
        }
    }

    /// Whether something may change without an event.
    fn must_look_again(&self, found: &[VmEntry]) -> bool {
        let unread = |entry: &VmEntry| matches!(entry.vm, Err(UnusableVm::Read { .. }));
        !self.unwatched.is_empty() || found.iter().any(unread)
    }
}

/// Keeps what was known before and was not found by a listing that broke off: the VM may be there.
fn keep_unlisted(found: &mut Vec<VmEntry>, before: &[VmEntry], reason: &str) {
    for entry in before {
        if !found.iter().any(|other| other.directory == entry.directory) {
            let vm = Err(UnusableVm::Unlisted { reason: reason.to_owned() });
            found.push(VmEntry { directory: entry.directory.clone(), vm });
        }
    }
    found.sort_by(|a, b| a.directory.cmp(&b.directory));
}

fn log_changes(before: &[VmEntry], after: &[VmEntry]) {
    for entry in after.iter().filter(|entry| !before.contains(entry)) {
        let directory = entry.directory.display();
        match &entry.vm {
            Ok(_) => info!(%directory, "VM known"),
            Err(reason) => warn!(%directory, %reason, "VM not usable"),
        }
    }
    for entry in before {
        if !after.iter().any(|other| other.directory == entry.directory) {
            info!(directory = %entry.directory.display(), "VM gone");
        }
    }
}

/// What a look at the directory of the VMs has found.
#[derive(Debug, Default)]
struct Listing {
    /// Sorted by directory.
    vms: Vec<VmEntry>,
    /// Why these may not be all.
    error: Option<io::Error>,
}

/// All directories in `vms` with a `vm.json`. `watch` is called for each directory before it is read.
fn list(vms: &Path, mut watch: impl FnMut(&Path)) -> Listing {
    let mut listing = Listing::default();
    let directories = match fs::read_dir(vms) {
        Ok(directories) => directories,
        Err(error) => return Listing { error: Some(error), ..listing },
    };
    for entry in directories {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                listing.error = Some(error);
                continue;
            }
        };
        let directory = entry.path();
        let vm = match entry.file_type() {
            // Links are not followed: the name of the directory is the name of the VM.
            Ok(kind) if !kind.is_dir() => continue,
            Ok(_) => {
                watch(&directory);
                read(&directory)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => Err(UnusableVm::Read { reason: error.to_string() }),
        };
        if let Some(vm) = vm.transpose() {
            listing.vms.push(VmEntry { directory, vm });
        }
    }
    listing.vms.sort_by(|a, b| a.directory.cmp(&b.directory));
    listing
}

/// A VM's own directory, which its VMM may write to. None if there is no `vm.json`.
fn read(directory: &Path) -> Result<Option<KnownVm>, UnusableVm> {
    let unreadable = |error: io::Error| UnusableVm::Read { reason: error.to_string() };
    let Some(folder) = Folder::open(directory).map_err(unreadable)? else { return Ok(None) };
    let Some(text) = folder.read(VM_JSON, VM_JSON_LIMIT_BYTES).map_err(unreadable)? else { return Ok(None) };
    let text =
        String::from_utf8(text).map_err(|_| UnusableVm::Read { reason: "it is not UTF-8".to_owned() })?;
    parse(&folder, directory, text).map(Some)
}

fn parse(folder: &Folder, directory: &Path, text: String) -> Result<KnownVm, UnusableVm> {
    let json = vm::parse(&text)?;
    let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name != json.directory_name() {
        return Err(UnusableVm::Directory { directory: name.to_owned(), vm: json.directory_name() });
    }
    let socket = json.socket_in(directory)?;
    // Whoever may write the file must not point the agent at the VMM of another.
    if folder.owner() != geteuid().as_raw() && folder.relative(&socket).is_none() {
        return Err(json.socket_elsewhere(directory).into());
    }
    Ok(KnownVm { json, text, directory: directory.to_owned(), socket })
}

#[cfg(test)]
mod tests {
    use notify::EventKind;
    use notify::event::{AccessKind, AccessMode};

    use super::*;

    fn vm_json(name: &str) -> String {
        format!(
            r#"{{"name": "{name}", "namespace": "demo", "vmm": {{"kind": "contract", "socket": "vmm.sock"}},
                "twin": {{"program": "/bin/vmm", "args": ["{{socket}}"]}}}}"#
        )
    }

    /// `demo.counter` for a good one, `demo.counter: why` for a broken one.
    fn lines(list: &[VmEntry]) -> Vec<String> {
        let line = |entry: &VmEntry| {
            let name = entry.directory.file_name().unwrap().to_str().unwrap();
            match &entry.vm {
                Ok(vm) => {
                    assert_eq!(vm.socket, entry.directory.join("vmm.sock"));
                    name.to_owned()
                }
                Err(reason) => format!("{name}: {reason}"),
            }
        };
        list.iter().map(line).collect()
    }

    /// Waits until the list is as wanted.
    async fn becomes(list: &mut watch::Receiver<Vec<VmEntry>>, wanted: &[&str]) {
        let seen = list.wait_for(|list| lines(list) == wanted);
        let in_time = tokio::time::timeout(Duration::from_secs(10), seen).await.is_ok();
        assert!(in_time, "instead of {wanted:?}: {:?}", lines(&list.borrow()));
    }

    #[tokio::test]
    async fn vms_come_and_go_with_their_files_and_a_directory_alone_is_not_a_vm() {
        let run = tempfile::tempdir().unwrap();
        let vms = run.path().join("vms");
        fs::create_dir_all(vms.join("demo.early")).unwrap();
        publish(&vms.join("demo.early"), &vm_json("early")).unwrap();

        let watch = VmWatch::start(run.path()).unwrap();
        let mut list = watch.list();
        assert_eq!(
            lines(&list.borrow_and_update()),
            ["demo.early"],
            "what is there at the start is there at once"
        );

        let twin = vms.join("demo.twin");
        fs::create_dir(&twin).unwrap();
        fs::write(twin.join("twin.log"), "starting").unwrap();
        fs::create_dir(vms.join("demo.late")).unwrap();
        fs::write(vms.join("demo.late/vm.json"), vm_json("late")).unwrap();
        becomes(&mut list, &["demo.early", "demo.late"]).await;

        publish(&twin, &vm_json("twin")).unwrap();
        becomes(&mut list, &["demo.early", "demo.late", "demo.twin"]).await;

        let socket = Path::new("vmm.sock");
        retire(&vms.join("demo.early"), socket, &[]).unwrap();
        retire(&vms.join("demo.early"), socket, &[]).unwrap();
        assert!(!vms.join("demo.early").exists());
        fs::remove_file(vms.join("demo.late/vm.json")).unwrap();
        becomes(&mut list, &["demo.twin"]).await;

        // One of the same name in its place: the watch of the old directory would see nothing of it.
        fs::write(twin.join("disk.img"), "precious").unwrap();
        retire(&twin, socket, &["twin.log"]).unwrap();
        assert_eq!(fs::read_dir(&twin).unwrap().count(), 1, "the disk stays, and nothing else");
        fs::remove_dir_all(&twin).unwrap();
        fs::create_dir(&twin).unwrap();
        becomes(&mut list, &[]).await;
        publish(&twin, &vm_json("twin")).unwrap();
        becomes(&mut list, &["demo.twin"]).await;
    }

    #[tokio::test]
    async fn broken_files_are_listed_with_their_error_until_they_are_repaired() {
        let run = tempfile::tempdir().unwrap();
        let watch = VmWatch::start(run.path()).unwrap();
        let mut list = watch.list();
        let vms = run.path().join("vms");
        for name in ["demo.a", "demo.b", "demo.c", "demo.d", "demo.e", ".hidden"] {
            fs::create_dir(vms.join(name)).unwrap();
        }
        fs::write(vms.join("demo.a/vm.json"), vm_json("other")).unwrap();
        fs::write(vms.join("demo.b/vm.json"), "{}").unwrap();
        fs::create_dir(vms.join("demo.c/vm.json")).unwrap();
        fs::write(vms.join("demo.d/vm.json"), " ".repeat(VM_JSON_LIMIT_BYTES + 9)).unwrap();
        fs::write(vms.join("notes.txt"), "no directory").unwrap();
        std::os::unix::fs::symlink(vms.join("notes.txt"), vms.join("demo.e/vm.json")).unwrap();
        // It is not followed: the name of the directory is the name of the VM.
        std::os::unix::fs::symlink(vms.join("demo.b"), vms.join("demo.f")).unwrap();
        becomes(
            &mut list,
            &[
                "demo.a: the directory is named `demo.a`, but vm.json says `demo.other` (<namespace>.<name>)",
                "demo.b: vm.json: missing field `name` at line 1 column 2",
                "demo.c: cannot read vm.json: it is not a regular file",
                "demo.d: vm.json has 65537 bytes or more: at most 65536 are read",
                "demo.e: cannot read vm.json: it is not a regular file",
            ],
        )
        .await;
        fs::remove_dir(vms.join("demo.c/vm.json")).unwrap();
        for name in ["a", "b", "c", "d", "e"] {
            publish(&vms.join(format!("demo.{name}")), &vm_json(name)).unwrap();
        }
        becomes(&mut list, &["demo.a", "demo.b", "demo.c", "demo.d", "demo.e"]).await;
        assert_eq!(fs::read_to_string(vms.join("notes.txt")).unwrap(), "no directory");
    }

    #[tokio::test]
    async fn a_vm_stays_in_the_list_while_the_directory_cannot_be_listed_and_is_known_again_after_that() {
        let run = tempfile::tempdir().unwrap();
        let vms = run.path().join("vms");
        for name in ["a", "b"] {
            fs::create_dir_all(vms.join(format!("demo.{name}"))).unwrap();
            publish(&vms.join(format!("demo.{name}")), &vm_json(name)).unwrap();
        }
        let watch = VmWatch::start(run.path()).unwrap();
        let mut list = watch.list();
        for in_its_place in ["nothing", "a file"] {
            becomes(&mut list, &["demo.a", "demo.b"]).await;
            fs::rename(&vms, run.path().join("away")).unwrap();
            if in_its_place == "a file" {
                fs::write(&vms, "").unwrap();
            }
            // Something that wakes the watch.
            fs::create_dir(run.path().join("away/demo.c")).unwrap();
            let unlisted = list.wait_for(|list| {
                list.len() == 2
                    && list.iter().all(|entry| matches!(entry.vm, Err(UnusableVm::Unlisted { .. })))
            });
            let in_time = tokio::time::timeout(Duration::from_secs(10), unlisted).await.is_ok();
            assert!(in_time, "{in_its_place}: {:?}", lines(&list.borrow()));
            fs::remove_dir(run.path().join("away/demo.c")).unwrap();
            let _ = fs::remove_file(&vms);
            fs::rename(run.path().join("away"), &vms).unwrap();
        }
        becomes(&mut list, &["demo.a", "demo.b"]).await;
        fs::remove_file(vms.join("demo.a/vm.json")).unwrap();
        becomes(&mut list, &["demo.b"]).await;
    }

    #[test]
    fn an_agent_that_cannot_list_the_vms_does_not_start_with_none() {
        let run = tempfile::tempdir().unwrap();
        let listing = list(&run.path().join("vms"), |_| {});
        assert!(listing.error.is_some() && listing.vms.is_empty(), "{listing:?}");
    }

    #[tokio::test]
    async fn a_folder_of_another_user_has_its_socket_in_it_and_a_vm_json_that_is_its_own() {
        if !geteuid().is_root() {
            eprintln!("not run: only root gives a folder to another user");
            return;
        }
        let run = tempfile::tempdir().unwrap();
        let vms = run.path().join("vms");
        let elsewhere = |name: &str| vm_json(name).replace("vmm.sock", "/run/slackwater/vms/demo.z/vmm.sock");
        for (name, owner, writer) in [("a", 7, 0), ("b", 7, 7), ("c", 7, 8), ("d", 0, 8), ("e", 0, 0)] {
            let folder = vms.join(format!("demo.{name}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("vm.json"), if name == "b" { vm_json(name) } else { elsewhere(name) })
                .unwrap();
            for (path, user) in [(folder.join("vm.json"), writer), (folder, owner)] {
                std::os::unix::fs::chown(path, Some(user), None).unwrap();
            }
        }
        let watch = VmWatch::start(run.path()).unwrap();
        let list = watch.list();
        let list = list.borrow();
        let told: Vec<_> = list
            .iter()
            .map(|entry| entry.vm.as_ref().err().map(ToString::to_string).unwrap_or_default())
            .collect();
        assert_eq!(told.len(), 5);
        assert!(
            told[0].contains("field `vmm.socket`: `/run/slackwater/vms/demo.z/vmm.sock` must lie in"),
            "{told:?}"
        );
        assert_eq!(told[1], "");
        assert_eq!(told[2], "cannot read vm.json: it belongs to user 8, and not to the folder's owner");
        assert_eq!(told[3], told[2]);
        assert_eq!(told[4], "", "only root has written it");
    }

    #[tokio::test]
    async fn a_listing_does_not_cause_another_and_the_watch_ends_with_its_owner() {
        let run = tempfile::tempdir().unwrap();
        let changes = |kind| is_change(&Event::new(kind));
        assert!(!changes(EventKind::Access(AccessKind::Open(AccessMode::Any))));
        assert!(!changes(EventKind::Access(AccessKind::Close(AccessMode::Read))));
        assert!(changes(EventKind::Access(AccessKind::Close(AccessMode::Write))));

        let watch = VmWatch::start(run.path()).unwrap();
        let mut list = watch.list();
        drop(watch);
        let ended = tokio::time::timeout(Duration::from_secs(10), list.changed()).await.unwrap();
        assert!(ended.is_err(), "the thread goes on");
    }

    #[test]
    fn a_run_directory_that_cannot_be_made_is_named() {
        let error = VmWatch::start(Path::new("/proc/slackwater")).unwrap_err();
        assert_eq!(error.to_string(), "cannot make the directory /proc/slackwater/vms");
    }
}
