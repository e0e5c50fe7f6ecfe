//! What a twin that was taken over would try. Each attack is tried twice: as a twin without a sandbox, where it
//! must succeed, or the test would show nothing; and in the sandbox, where it must reach nothing.
//!
//! The launcher and the attackers are this test program itself: see [`act`].

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Parser;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

use super::program::shown_for;
use super::{Node, Sandbox, Shown};
use crate::process::exec::{TWIN_EXEC, TwinExec};

/// A user that nothing else on a machine has.
const USER: u32 = 1_900_004_321;
const ANOTHER: u32 = USER + 1;

/// Arguments of this program that make it play the part which follows.
const PLAY: [&str; 4] = ["--exact", "process::sandbox::attacks::act", "--nocapture", "--"];

/// Not a test of its own: the part that a child of another test plays, after the first `--` of its command
/// line.
#[test]
fn act() {
    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        twin: TwinExec,
    }
    let arguments: Vec<String> = std::env::args().skip_while(|argument| argument != "--").collect();
    let [_, first, rest @ ..] = arguments.as_slice() else { return };
    if first.starts_with("--sandbox") {
        let mut command = arguments.clone();
        command[0] = TWIN_EXEC.to_owned();
        if let Err(error) = Arguments::parse_from(command).twin.run() {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            println!("\nTRIED launcher: {error}: {source:?}");
        }
        std::process::exit(127);
    }
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    let told = attack(first, &rest).unwrap_or_else(|error| format!("failed: {error}"));
    println!("\nTRIED {told}");
}

/// `done` and what it gave, or the error.
fn attack(what: &str, on: &[&str]) -> std::io::Result<String> {
    let path = on.first().copied().unwrap_or_default();
    let number = || path.parse::<i32>().unwrap();
    let process = || Pid::from_raw(number()).unwrap();
    let mut given = String::new();
    match what {
        "read" => drop(fs::File::open(path)?.read(&mut [0; 1])?),
        "open" => drop(fs::File::open(path)?),
        "write" => fs::write(path, "attacked")?,
        "make-folder" => fs::create_dir(path)?,
        "list" => {
            for entry in fs::read_dir(path)? {
                given.push_str(&format!(" {}", entry?.file_name().display()));
            }
        }
        "connect-tcp" => drop(TcpStream::connect(path)?),
        "connect-unix" => drop(UnixStream::connect(path)?),
        "connect-abstract" => drop(UnixStream::connect_addr(&SocketAddr::from_abstract_name(path)?)?),
        "family" => drop(rustix::net::socket(
            rustix::net::AddressFamily::from_raw(number().try_into().unwrap()),
            rustix::net::SocketType::DGRAM,
            None,
        )?),
        "signal" => kill_process(process(), Signal::CONT)?,
        "take-descriptor" => {
            let pidfd = rustix::process::pidfd_open(process(), rustix::process::PidfdFlags::empty())?;
            drop(rustix::process::pidfd_getfd(&pidfd, 0, rustix::process::PidfdGetfdFlags::empty())?);
        }
        "read-memory" => drop(fs::File::open(format!("/proc/{path}/mem"))?),
        "set-user" => rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(number() as u32))?,
        "mount" => rustix::mount::mount("tmpfs", path, "tmpfs", rustix::mount::MountFlags::empty(), c"")?,
        "own-network" => {
            #[expect(deprecated, reason = "no FILES")]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)?;
        }
        "make-device" => rustix::fs::mknodat(
            rustix::fs::CWD,
            path,
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::RUSR,
            rustix::fs::makedev(1, 11),
        )?,
        "spawn" => {
            let status = Command::new(path).stdout(Stdio::null()).status()?;
            given = format!(" {status}");
        }
        "link" => std::os::unix::fs::symlink(on[1], path)?,
        "host-name" => drop(rustix::system::sethostname(b"attacked")?),
        "rights" => {
            let status = fs::read_to_string("/proc/self/status")?;
            for wanted in
                ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Groups"]
            {
                let line =
                    status.lines().find(|line| line.split(':').next() == Some(wanted)).unwrap_or_default();
                given.push_str(&format!(" {}", line.replace([' ', '\t'], "")));
            }
        }
        "limits" => {
            use rustix::process::{Resource, getrlimit};
            for limit in [Resource::Memlock, Resource::Core, Resource::Nofile, Resource::Nproc] {
                given.push_str(&format!(" {:?}", getrlimit(limit).maximum.unwrap_or(u64::MAX)));
            }
        }
        "environment" => {
            let mut names: Vec<_> = std::env::vars().map(|(name, _)| name).collect();
            names.sort();
            given = format!(" {}", names.join(" "));
        }
        "in-a-covered-root" => {
            #[expect(deprecated, reason = "no FILES")]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS)?;
            use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            mount("tmpfs", ".", "tmpfs", MountFlags::empty(), c"")?;
            let here = std::env::current_dir()?;
            rustix::process::chdir(&here)?;
            super::root::cover_root().map_err(std::io::Error::other)?;
            rustix::process::chdir("/")?;
            return attack(path, &on[1..]);
        }
        other => panic!("no such attack: {other}"),
    }
    Ok(format!("done{given}"))
}

/// A place for a twin, beside what it must not reach.
struct Place {
    dir: TempDir,
    sandbox: Sandbox,
}

impl Place {
    /// None where no sandbox can be made: there these tests cannot be run.
    fn new() -> Option<Self> {
        if !geteuid().is_root() {
            eprintln!("not run: only root makes a sandbox");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let directory = dir.path().join("vms/demo.counter");
        fs::create_dir_all(&directory).unwrap();
        chown(&directory, Some(USER), Some(USER)).unwrap();
        let (shown, links) = shown_for(&std::env::current_exe().unwrap()).unwrap();
        let sandbox = Sandbox {
            user: USER,
            directory,
            shown,
            links,
            devices: vec![Node { path: "/dev/vfio/devices/vfio7".into(), major: 1, minor: 5 }],
            host_network: false,
            locked_memory_bytes: 4 << 20,
        };
        let place = Self { dir, sandbox };
        match place.confined("read", &["/dev/null"]).as_str() {
            "done" => Some(place),
            told if told.contains("os error 1)") => {
                eprintln!("not run: this machine lets root make no sandbox: {told}");
                None
            }
            told => panic!("{told}"),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// In the sandbox.
    fn confined(&self, what: &str, on: &[&str]) -> String {
        let this = std::env::current_exe().unwrap();
        let json = serde_json::to_string(&self.sandbox).unwrap();
        let mut command = Command::new(&this);
        command
            .args(PLAY)
            .arg(format!("--sandbox={json}"))
            .arg("--")
            .arg(&this)
            .args(PLAY)
            .arg(what)
            .args(on);
        tried(command)
    }

    /// As a twin would be without a sandbox: as the agent's user.
    fn free(&self, what: &str, on: &[&str]) -> String {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(PLAY).arg(what).args(on).current_dir(&self.sandbox.directory);
        tried(command)
    }

    /// Whether a program succeeds, in the sandbox or without it.
    fn run(&self, is_confined: bool, program: &[&str]) -> bool {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]);
        if is_confined {
            let json = serde_json::to_string(&self.sandbox).unwrap();
            command = Command::new(std::env::current_exe().unwrap());
            command.args(PLAY).arg(format!("--sandbox={json}")).arg("--").args(program);
        }
        command.stdin(Stdio::null()).output().unwrap().status.success()
    }

    /// The attack succeeds without the sandbox, and not in it.
    fn reaches_nothing(&self, what: &str, on: &[&str]) -> String {
        let free = self.free(what, on);
        assert!(free.starts_with("done"), "{what} {on:?} shows nothing: without a sandbox, {free}");
        let confined = self.confined(what, on);
        assert!(confined.starts_with("failed: "), "{what} {on:?}: {confined}");
        confined
    }
}

fn tried(mut command: Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = text.lines().find_map(|line| line.strip_prefix("TRIED "));
    told.map(str::to_owned).unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn no_file_of_the_node_is_read_or_written_besides_those_that_are_shown() {
    let Some(mut place) = Place::new() else { return };
    for file in ["/etc/shadow", "/etc/passwd", "/proc/1/status", "/sys/kernel/uevent_seqnum"] {
        place.reaches_nothing("read", &[file]);
    }
    let (mine, others) = (place.path("vms/demo.counter/file"), place.path("vms/demo.other"));
    fs::create_dir(&others).unwrap();
    fs::write(others.join("vm.json"), "{}").unwrap();
    place.reaches_nothing("read", &[others.join("vm.json").to_str().unwrap()]);
    place.reaches_nothing("write", &[others.join("vm.json").to_str().unwrap()]);
    place.reaches_nothing("write", &[place.path("new").to_str().unwrap()]);
    place.reaches_nothing("list", &[others.to_str().unwrap()]);
    place.reaches_nothing("make-folder", &[place.path("folder").to_str().unwrap()]);
    place.reaches_nothing("write", &["/dev/shm/slackwater-attacked"]);
    fs::remove_file("/dev/shm/slackwater-attacked").unwrap();
    assert_eq!(place.confined("write", &[mine.to_str().unwrap()]), "done");
    assert_eq!(fs::read_to_string(&mine).unwrap(), "attacked", "its folder is its own");

    // What the configuration shows is seen, for reading or also for writing, as the user may.
    let (disks, firmware) = (place.path("disks"), place.path("firmware"));
    for folder in [&disks, &firmware] {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("file"), "x").unwrap();
        chown(folder.join("file"), Some(USER), None).unwrap();
    }
    fs::write(disks.join("another's"), "x").unwrap();
    fs::set_permissions(disks.join("another's"), fs::Permissions::from_mode(0o600)).unwrap();
    place.sandbox.shown.push(Shown::read_only(&firmware));
    place.sandbox.shown.push(Shown { path: disks.clone(), writable: true });
    let on = |folder: &Path, name: &str| folder.join(name).to_str().unwrap().to_owned();
    assert_eq!(place.confined("read", &[&on(&firmware, "file")]), "done");
    place.reaches_nothing("write", &[&on(&firmware, "file")]);
    assert_eq!(place.confined("write", &[&on(&disks, "file")]), "done");
    place.reaches_nothing("read", &[&on(&disks, "another's")]);
    for program in ["/usr/attacked", "/attacked"] {
        assert!(place.confined("write", &[program]).starts_with("failed: "));
        assert!(!Path::new(program).exists());
    }
}

#[test]
fn a_link_in_its_own_folder_leads_nowhere() {
    let Some(place) = Place::new() else { return };
    let link = place.path("vms/demo.counter/link");
    let by_proc = format!("/proc/{}/root/etc/shadow", std::process::id());
    for target in ["/etc/shadow", "../../../../../../../../../../etc/shadow", &by_proc] {
        assert_eq!(place.confined("link", &[link.to_str().unwrap(), target]), "done");
        place.reaches_nothing("read", &[link.to_str().unwrap()]);
        fs::remove_file(&link).unwrap();
    }
}

#[test]
fn its_dev_holds_its_own_devices_and_no_device_is_found_elsewhere() {
    let Some(mut place) = Place::new() else { return };
    assert_eq!(place.confined("read", &["/dev/vfio/devices/vfio7"]), "done");
    let listed = |path: &str| {
        let told = place.confined("list", &[path]);
        let mut names: Vec<String> = told.split(' ').skip(1).map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(listed("/dev"), ["full", "null", "random", "urandom", "vfio", "zero"]);
    assert_eq!(listed("/dev/vfio/devices"), ["vfio7"]);
    let disk = fs::read_dir("/sys/class/block").unwrap().next().unwrap().unwrap().file_name();
    place.reaches_nothing("read", &[&format!("/dev/{}", disk.display())]);
    place.reaches_nothing("open", &["/dev/kmsg"]);

    // A device that another process has made in a folder of its own is none there.
    let node = place.path("vms/demo.counter/zero");
    let made = rustix::fs::makedev(1, 5);
    let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::from_raw_mode(0o666));
    rustix::fs::mknodat(rustix::fs::CWD, &node, kind, mode, made).unwrap();
    chown(&node, Some(USER), Some(USER)).unwrap();
    place.reaches_nothing("read", &[node.to_str().unwrap()]);
    let shown = place.path("shown");
    fs::create_dir(&shown).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, shown.join("zero"), kind, mode, made).unwrap();
    chown(shown.join("zero"), Some(USER), Some(USER)).unwrap();
    place.sandbox.shown.push(Shown { path: shown.clone(), writable: true });
    place.reaches_nothing("read", &[shown.join("zero").to_str().unwrap()]);
    place.reaches_nothing("make-device", &[place.path("vms/demo.counter/made").to_str().unwrap()]);
}

#[test]
fn no_other_process_is_seen_signalled_or_looked_into() {
    let Some(place) = Place::new() else { return };
    let agent = std::process::id().to_string();
    let mut victim = Command::new("sleep").arg("1000").uid(ANOTHER).spawn().unwrap();
    for process in [agent, victim.id().to_string()] {
        for what in ["signal", "take-descriptor", "read-memory"] {
            place.reaches_nothing(what, &[&process]);
        }
        let free = place.free("list", &["/proc"]);
        assert!(free.contains(&format!(" {process}")), "{free}");
        let confined = place.confined("list", &["/proc"]);
        let seen: Vec<&str> = confined.split(' ').skip(1).collect();
        assert!(seen.contains(&"self") && !seen.contains(&process.as_str()), "{confined}");
        assert!(!seen.contains(&"sys") && !seen.contains(&"kcore"), "{confined}");
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
}

#[test]
fn no_network_and_no_socket_of_another_is_reached() {
    let Some(mut place) = Place::new() else { return };
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap().to_string();
    place.reaches_nothing("connect-tcp", &[&address]);
    let socket = place.path("vms/demo.other.sock");
    let _monitor = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    place.reaches_nothing("connect-unix", &[socket.to_str().unwrap()]);
    let name = format!("slackwater-attack-{}", std::process::id());
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    place.reaches_nothing("connect-abstract", &[&name]);
    // AF_NETLINK, AF_PACKET.
    for family in ["16", "17"] {
        place.reaches_nothing("family", &[family]);
    }
    place.reaches_nothing("own-network", &[]);

    place.sandbox.host_network = true;
    assert_eq!(
        place.confined("connect-tcp", &[&address]),
        "done",
        "if the configuration gives it the node's"
    );
    place.reaches_nothing("connect-unix", &[socket.to_str().unwrap()]);
    place.reaches_nothing("family", &["17"]);
}

#[test]
fn it_gets_no_right_back() {
    let Some(place) = Place::new() else { return };
    place.reaches_nothing("set-user", &["0"]);
    place.reaches_nothing("mount", &[place.sandbox.directory.to_str().unwrap()]);
    for flag in ["--user", "--net", "--mount"] {
        // It becomes another program; a new process it may not make.
        let attack = ["/usr/bin/unshare", flag, "/bin/true"];
        assert!(place.run(false, &attack), "{flag} shows nothing");
        assert!(!place.run(true, &attack), "{flag}");
    }
    let told = place.reaches_nothing("spawn", &["/bin/true"]);
    assert!(told.contains("os error 1)"), "{told}");
    assert!(place.confined("host-name", &[]).starts_with("failed: "));
    let none = "0000000000000000";
    assert_eq!(
        place.confined("rights", &[]),
        format!(
            "done CapInh:{none} CapPrm:{none} CapEff:{none} CapBnd:{none} CapAmb:{none} NoNewPrivs:1 Seccomp:2 Groups:"
        )
    );
    assert_eq!(place.confined("limits", &[]), format!("done {} 0 16384 4096", 4 << 20));
    assert_eq!(place.confined("environment", &[]), "done HOME PATH TMPDIR");
}

#[test]
fn a_root_that_cannot_be_exchanged_is_covered_as_in_an_initramfs() {
    let Some(place) = Place::new() else { return };
    let covered = |what: &str, on: &[&str]| place.free("in-a-covered-root", &[&[what], on].concat());
    assert_eq!(covered("list", &["/"]), "done", "it is empty");
    for path in ["/etc/passwd", "../../../../../../etc/passwd", "/proc/self/root/etc/passwd"] {
        let told = covered("read", &[path]);
        assert!(told.contains("os error 2)"), "{path}: {told}");
    }
}
