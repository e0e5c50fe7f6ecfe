//! What another machine could ask of a twin's QEMU by its arguments, and what a QEMU that was taken over could
//! do. Each attack is tried with a twin without a sandbox, where it must succeed, or the test would show
//! nothing, and with one in its sandbox, where it must reach nothing. They go past preflight, which would
//! refuse most of them.
//!
//! Without QEMU, or where root makes no sandbox or no cgroup, these are skipped and print so. The launcher is
//! this test program itself: see [`act`].

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use futures::StreamExt;
use rustix::process::geteuid;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::QemuVmm;
use super::qmp::QmpClient;
use crate::host::vm::{VmmEntry, VmmKind};
use crate::process::cgroup::Cgroup;
use crate::process::exec::{TWIN_EXEC, TwinExec};
use crate::process::folder::Folder;
use crate::process::launch::Launch;
use crate::process::sandbox::Shown;
use crate::vmm::Vmm;
use crate::vmm::budget::Budget;
use crate::vmm::confinement::{Confined, Confinement};
use crate::vmm::contract::Deadlines;
use crate::vmm::qemu::preflight::confined::QEMU_SANDBOX;
use crate::vmm::twin::{self, Twin, TwinError, TwinPlan};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const USER: u32 = 1_900_005_432;
const LIMIT: Duration = Duration::from_secs(10);
const PLAY: [&str; 4] = ["--exact", "vmm::qemu::attacks::act", "--nocapture", "--"];
/// The least that a twin has. `-m` is small since the locked memory of these tests is.
const TWIN: &str = "-nodefaults -no-user-config -display none -machine pc,accel=tcg -cpu max -m 32 -S";

/// Not a test of its own: the launcher of the others.
#[test]
fn act() {
    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        twin: TwinExec,
    }
    let mut arguments: Vec<String> = std::env::args().skip_while(|argument| argument != "--").collect();
    let Some(name) = arguments.first_mut() else { return };
    *name = TWIN_EXEC.to_owned();
    let error = Arguments::parse_from(arguments).twin.run().unwrap_err();
    eprintln!("{error}: {:?}", std::error::Error::source(&error));
    std::process::exit(127);
}

struct Place {
    run: TempDir,
    cgroup_root: PathBuf,
    shown: Vec<Shown>,
    cgroups: RefCell<Vec<String>>,
}

impl Place {
    fn new() -> Option<Self> {
        let run = tempfile::tempdir().unwrap();
        fs::set_permissions(run.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let cgroup_root =
            ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from).into_iter().find(|root| {
                Cgroup::make(root, "test.probe").is_ok_and(|group| fs::remove_dir(group.path()).is_ok())
            });
        let can_unshare = || {
            let tried = std::process::Command::new("unshare").args(["--mount", "--net", "true"]).output();
            tried.is_ok_and(|output| output.status.success())
        };
        match cgroup_root {
            Some(cgroup_root) if geteuid().is_root() && Path::new(QEMU).exists() && can_unshare() => {
                Some(Self { run, cgroup_root, shown: Vec::new(), cgroups: RefCell::default() })
            }
            _ => {
                eprintln!("not run: it takes root, its namespaces and cgroups, and {QEMU}");
                None
            }
        }
    }

    fn path(&self, name: &str) -> String {
        self.run.path().join(name).display().to_string()
    }

    /// The plan of a twin with these arguments besides [`TWIN`].
    fn plan(&self, is_confined: bool, more: &[&str]) -> TwinPlan {
        static COUNTED: AtomicUsize = AtomicUsize::new(0);
        let this = std::env::current_exe().unwrap();
        let directory = self.run.path().join("vms/demo.web");
        let socket = directory.join("qmp.sock");
        let mut arguments: Vec<String> = TWIN.split(' ').map(str::to_owned).collect();
        arguments.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())]);
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        if is_confined {
            arguments.extend(QEMU_SANDBOX.map(str::to_owned));
        }
        let confinement = Confinement { shown: self.shown.clone(), ..Confinement::default() };
        let mut sandbox = confinement
            .sandbox(Confined {
                user: USER,
                directory: &directory,
                program: Path::new(QEMU),
                kind: VmmKind::Qemu,
                arguments: &arguments,
                descriptors: &[],
                devices: &[],
            })
            .unwrap();
        // More than this takes CAP_SYS_RESOURCE, which not every test machine has.
        sandbox.locked_memory_bytes = 4 << 20;
        let number = COUNTED.fetch_add(1, Ordering::Relaxed);
        let cgroup_name = format!("test.{}-qemu-{number}", std::process::id());
        self.cgroups.borrow_mut().push(cgroup_name.clone());
        TwinPlan {
            launcher: std::iter::once(this.into()).chain(PLAY.map(OsString::from)).collect(),
            cgroup_root: self.cgroup_root.clone(),
            cgroup_name,
            vmm: VmmEntry { kind: VmmKind::Qemu, socket: socket.clone(), devices: Vec::new() },
            directory,
            program: QEMU.into(),
            arguments,
            device_names: Vec::new(),
            descriptors: Vec::new(),
            sandbox: is_confined.then_some(sandbox),
            socket,
            start_limit: Duration::from_secs(30),
            deadlines: Deadlines::default(),
        }
    }

    async fn start(&self, is_confined: bool, more: &[&str]) -> Result<Twin, TwinError> {
        twin::start(self.plan(is_confined, &[&["-incoming", "defer"], more].concat())).await
    }

    /// A twin with these arguments starts without a sandbox, and with one QEMU says `words` and ends.
    async fn does_not_start(&self, more: &[&str], words: &str) {
        let free =
            self.start(false, more).await.unwrap_or_else(|error| panic!("{more:?} shows nothing: {error}"));
        free.discard(LIMIT).await.unwrap();
        let error = self.start(true, more).await.err().unwrap_or_else(|| panic!("{more:?} has started"));
        assert!(error.to_string().contains(words), "{more:?}: {error}");
    }
}

impl Drop for Place {
    /// A test that failed leaves nothing running.
    fn drop(&mut self) {
        for name in self.cgroups.borrow().iter() {
            let _ = fs::write(self.cgroup_root.join("slackwater").join(name).join("cgroup.kill"), "1");
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn a_twin_answers_and_loads_as_its_own_user_without_the_nodes_root() {
    let Some(place) = Place::new() else { return };
    let twin = place.start(true, &[]).await.unwrap();
    let pid = twin.vmm().pid();
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), USER);
    let folder = place.run.path().join("vms/demo.web");
    let (folder, socket) = (fs::metadata(&folder).unwrap(), fs::metadata(folder.join("qmp.sock")).unwrap());
    assert_eq!((folder.uid(), folder.mode() & 0o777), (USER, 0o700));
    assert_eq!((socket.uid(), socket.mode() & 0o077), (USER, 0));
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    assert!(!Path::new(&format!("/proc/{pid}/root/etc/shadow")).exists());

    // The state goes by a socket in its folder: QEMU takes it, and says that it is none.
    let garbage =
        futures::stream::iter([bytes::Bytes::from_static(b"this is not a machine's state")]).boxed();
    let loaded = twin.vmm().start_load(vec![garbage]).await;
    let error = loaded.err().or(twin.vmm().finish_load().await.err()).unwrap().to_string();
    assert!(error.contains("QEMU's migration is failed"), "{error}");
    twin.discard(LIMIT).await.unwrap();
    assert!(!place.run.path().join("vms/demo.web").exists());
}

#[tokio::test]
async fn a_vm_that_landed_in_its_sandbox_is_saved_from_it_again() {
    let Some(place) = Place::new() else { return };
    let plan = place.plan(true, &[]);
    let folder = Folder::make(&plan.directory, Some(USER)).unwrap();
    let cgroup = Cgroup::make(&plan.cgroup_root, &plan.cgroup_name).unwrap();
    let launch = Launch {
        launcher: &plan.launcher,
        cgroup: &cgroup,
        directory: &plan.directory,
        log: folder.create_own("log").unwrap(),
        sandbox: plan.sandbox.as_ref(),
        descriptors: &[],
        program: &plan.program,
        arguments: &plan.arguments,
    };
    let _child = launch.spawn().unwrap();
    let connected = async {
        loop {
            match QemuVmm::connect(&plan.socket, &plan.directory, &[], Deadlines::default()).await {
                Ok(vmm) => return vmm,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let vmm = tokio::time::timeout(plan.start_limit, connected).await.unwrap();
    vmm.resume().await.unwrap();
    let mut streams = vmm.start_save(true, Budget::default()).await.unwrap();
    let first = streams.remove(0).next().await.unwrap().unwrap();
    assert!(first.starts_with(b"QEVM"), "{first:?}");
    drop(streams);
    cgroup.clear(LIMIT).await.unwrap();
}

#[tokio::test]
async fn no_file_or_device_of_the_node_is_a_disk_of_a_twin() {
    let Some(mut place) = Place::new() else { return };
    let drive = |path: &str| format!("if=none,id=d,format=raw,readonly=on,file={path}");
    let disk = fs::read_dir("/sys/class/block").unwrap().next().unwrap().unwrap().file_name();
    for path in [format!("/dev/{}", disk.display()), "/etc/shadow".to_owned()] {
        place.does_not_start(&["-drive", &drive(&path)], "No such file or directory").await;
    }

    // What the configuration shows is one, if its user may read it.
    let (disks, image) = (place.path("disks"), place.path("disks/image"));
    fs::create_dir(&disks).unwrap();
    fs::set_permissions(&disks, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(&image, [0; 4096]).unwrap();
    place.shown = vec![Shown::read_only(&disks)];
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
    place.does_not_start(&["-drive", &drive(&image)], "Permission denied").await;
    fs::set_permissions(&image, fs::Permissions::from_mode(0o644)).unwrap();
    place.start(true, &["-drive", &drive(&image)]).await.unwrap().discard(LIMIT).await.unwrap();
}

#[tokio::test]
async fn nothing_is_written_and_no_socket_is_made_outside_of_its_folder() {
    let Some(place) = Place::new() else { return };
    let outside = place.path("outside");
    let file = format!("file,id=c,path={outside}");
    place.does_not_start(&["-chardev", &file], "Read-only file system").await;
    place.does_not_start(&["-pidfile", &place.path("pid")], "cannot create PID file").await;
    let monitor = format!("unix:{},server=on,wait=off", place.path("second.sock"));
    place.does_not_start(&["-qmp", &monitor], "second.sock").await;

    let other = place.path("other.sock");
    let _monitor_of_another = UnixListener::bind(&other).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o666)).unwrap();
    let connect = format!("socket,id=c,path={other}");
    place.does_not_start(&["-chardev", &connect], "Failed to connect").await;
}

#[tokio::test]
async fn a_second_monitor_on_tcp_is_heard_by_nobody_and_no_port_of_the_node_is_taken() {
    let Some(place) = Place::new() else { return };
    for (is_confined, is_heard) in [(false, true), (true, false)] {
        let (monitor, forward) = (free_port(), free_port());
        let monitor_on = format!("tcp:127.0.0.1:{monitor},server=on,wait=off");
        let network =
            format!("user,id=n,hostfwd=tcp:127.0.0.1:{forward}-:22,guestfwd=tcp:10.0.2.9:1-cmd:/bin/sh");
        // Without a network of its own to bind in, QEMU may also end: then nothing listens either.
        let started = place.start(is_confined, &["-netdev", &network]).await;
        assert_eq!(TcpStream::connect(("127.0.0.1", forward)).is_ok(), is_heard, "{started:?}");
        if let Ok(twin) = started {
            twin.discard(LIMIT).await.unwrap();
        }
        let started = place.start(is_confined, &["-qmp", &monitor_on]).await;
        assert_eq!(TcpStream::connect(("127.0.0.1", monitor)).is_ok(), is_heard, "{started:?}");
        if let Ok(twin) = started {
            twin.discard(LIMIT).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_qemu_that_was_taken_over_starts_no_program_and_writes_no_file_of_the_node() {
    let Some(place) = Place::new() else { return };
    let outside = |name: &str| place.path(name);
    let inside = place.run.path().join("vms/demo.web");
    for is_confined in [false, true] {
        let attempts: [(&str, Value, String); 3] = [
            (
                "migrate-incoming",
                json!({"uri": format!("exec:touch {}; cat", outside("by-exec"))}),
                outside("by-exec"),
            ),
            (
                "pmemsave",
                json!({"val": 0, "size": 16, "filename": outside("by-monitor")}),
                outside("by-monitor"),
            ),
            (
                "chardev-add",
                json!({"id": "x", "backend": {"type": "file", "data": {"out": outside("by-chardev")}}}),
                outside("by-chardev"),
            ),
        ];
        for (command, arguments, made) in attempts {
            let monitor = inside.join("attack.sock");
            let second = format!("unix:{},server=on,wait=off", monitor.display());
            let twin = place.start(is_confined, &["-qmp", &second]).await.unwrap();
            let answer = QmpClient::connect(&monitor).await.unwrap().raw(command, arguments).await;
            if is_confined {
                // QEMU may have been killed for it; the end of its group is awaited in any case.
                twin.discard(LIMIT).await.unwrap();
                assert!(!Path::new(&made).exists(), "{command}: {answer:?}");
                fs::remove_dir_all(&inside).unwrap_or_default();
            } else {
                let there = async {
                    while !Path::new(&made).exists() {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                };
                let in_time = tokio::time::timeout(LIMIT, there).await;
                assert!(in_time.is_ok(), "{command} shows nothing: {answer:?}");
                twin.discard(LIMIT).await.unwrap();
                fs::remove_file(&made).unwrap();
                fs::remove_dir_all(&inside).unwrap_or_default();
            }
        }
    }
}

#[tokio::test]
async fn a_twin_does_not_leave_its_process_or_its_user() {
    let Some(place) = Place::new() else { return };
    for arguments in [&["-daemonize"][..], &["-run-with", "user=root"], &["-run-with", "chroot=/"]] {
        let started = place.start(true, arguments).await;
        assert!(started.is_err(), "{arguments:?}");
    }
    let twin = Arc::new(place.start(true, &[]).await.unwrap());
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", twin.vmm().pid())).unwrap();
    assert_eq!(children, "");
    Arc::into_inner(twin).unwrap().discard(LIMIT).await.unwrap();
}
