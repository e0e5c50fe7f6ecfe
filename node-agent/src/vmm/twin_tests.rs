//! The launcher and the twins of these tests are this test program itself: see [`act`].

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use slackwater_proto::limits::vmm_server;
use slackwater_proto::server::{bind_unix, serve_unix};
use slackwater_proto::tonic::service::Routes;
use tempfile::TempDir;
use tokio::process::Command;

use super::*;
use crate::host::vm::VmmKind;
use crate::process::exec::TwinExec;
use crate::vmm::Vmm as _;
use crate::vmm::contract::ContractVmm;
use crate::vmm::stub::Stub;

/// Not a test of its own: the part that a child of another test plays, after the first `--` of its command
/// line.
#[tokio::test]
async fn act() {
    #[derive(clap::Parser)]
    struct Arguments {
        #[command(flatten)]
        twin: TwinExec,
    }
    let arguments: Vec<String> = std::env::args().skip_while(|argument| argument != "--").collect();
    let [_, first, rest @ ..] = arguments.as_slice() else { return };
    match (first.as_str(), rest) {
        ("--cgroup", _) => {
            let mut command = arguments.clone();
            command[0] = TWIN_EXEC.to_owned();
            let error = Arguments::parse_from(command).twin.run().unwrap_err();
            eprintln!("{error}: {}", std::error::Error::source(&error).unwrap());
            std::process::exit(127);
        }
        ("die", _) => {
            for line in 1..=20 {
                eprintln!("complaint {line}");
            }
            std::process::exit(3);
        }
        ("idle", _) => std::future::pending().await,
        ("serve", [socket]) => serve(Path::new(socket), Stub::incoming()).await,
        ("serve-running", [socket]) => serve(Path::new(socket), Stub::running()).await,
        ("serve-with-child", [socket]) => {
            let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
            serve(Path::new(socket), Stub::incoming()).await;
            child.wait().unwrap();
        }
        ("agent", [run, cgroup_root, cgroup_name]) => {
            let run = Path::new(run);
            let _twin =
                start(plan(run, cgroup_root.into(), cgroup_name, &["serve", "{socket}"])).await.unwrap();
            fs::write(run.join("started"), "").unwrap();
            std::future::pending().await
        }
        other => panic!("{other:?}"),
    }
}

async fn serve(socket: &Path, stub: Stub) {
    let listener = bind_unix(socket).unwrap();
    println!("serving");
    let routes = Routes::new(vmm_server(stub));
    serve_unix(listener, routes, std::future::pending(), Duration::ZERO).await.unwrap();
}

/// Arguments of this program that make it play the part which follows.
const PLAY: [&str; 4] = ["--exact", "vmm::twin::tests::act", "--nocapture", "--"];

/// A twin that plays `part`.
fn plan(run: &Path, cgroup_root: PathBuf, cgroup_name: &str, part: &[&str]) -> TwinPlan {
    let directory = run.join("vms/demo.counter");
    let socket = directory.join("vmm.sock");
    let this = std::env::current_exe().unwrap();
    let arguments =
        PLAY.iter().chain(part).map(|argument| argument.replace("{socket}", socket.to_str().unwrap()));
    TwinPlan {
        launcher: std::iter::once(this.clone().into()).chain(PLAY.map(OsString::from)).collect(),
        cgroup_root,
        cgroup_name: cgroup_name.to_owned(),
        directory,
        vmm: VmmEntry { kind: VmmKind::Contract, socket: socket.clone(), devices: Vec::new() },
        program: this,
        arguments: arguments.collect(),
        descriptors: Vec::new(),
        device_names: Vec::new(),
        sandbox: None,
        socket,
        start_limit: Duration::from_secs(20),
        deadlines: Deadlines::default(),
    }
}

/// A place for one twin, with what the test needs to see that nothing is left of it.
struct Place {
    run: TempDir,
    plan: TwinPlan,
}

impl Place {
    /// `None` on a machine where no cgroup v2 can be written: there these tests cannot be run.
    fn new(part: &[&str]) -> Option<Self> {
        static COUNTED: AtomicUsize = AtomicUsize::new(0);
        let name = format!("test.{}-{}", std::process::id(), COUNTED.fetch_add(1, Ordering::Relaxed));
        let cgroup_root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .map(PathBuf::from)
            .into_iter()
            .find(|root| Cgroup::make(root, &name).is_ok_and(|group| fs::remove_dir(group.path()).is_ok()));
        let Some(cgroup_root) = cgroup_root else {
            eprintln!("not run: there is no cgroup v2 that this user may write");
            return None;
        };
        let run = tempfile::tempdir().unwrap();
        let plan = plan(run.path(), cgroup_root, &name, part);
        Some(Self { run, plan })
    }

    fn cgroup(&self) -> PathBuf {
        self.plan.cgroup_root.join("slackwater").join(&self.plan.cgroup_name)
    }

    fn assert_nothing_left(&self) {
        assert!(!self.cgroup().exists(), "the cgroup is left");
        assert!(!self.plan.directory.exists(), "the directory is left");
    }

    /// What the start is refused with, with the paths of this test shortened.
    async fn refusal(&self) -> String {
        let error = start(self.plan.clone()).await.unwrap_err().to_string();
        let error = error.replace(&self.plan.program.display().to_string(), "PROGRAM");
        let error = error.replace(&self.cgroup().display().to_string(), "CGROUP");
        error.replace(&self.run.path().display().to_string(), "RUN")
    }
}

/// The pipes of a process whose /proc/PID/fdinfo is wanted.
fn pipes(pid: &str, wanted: fn(&str) -> bool) -> BTreeSet<PathBuf> {
    let pipe = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let link =
            fs::read_link(entry.path()).ok().filter(|link| link.to_string_lossy().starts_with("pipe:"))?;
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().display())).ok()?;
        wanted(&info).then_some(link)
    };
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(pipe).collect()
}

/// Opened by this process, and not inherited from the starter of the tests: with O_CLOEXEC, as Rust opens
/// files.
fn is_own(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
    u32::from_str_radix(flags, 8).unwrap() & 0o2_000_000 != 0
}

impl Drop for Place {
    /// A test that failed leaves nothing running.
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup().join("cgroup.kill"), "1");
    }
}

const LIMIT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_twin_shares_no_session_cgroup_or_descriptor_with_the_agent_and_is_discarded_completely() {
    let Some(place) = Place::new(&["serve-with-child", "{socket}"]) else { return };
    let twin = start(place.plan.clone()).await.unwrap();
    assert_eq!(twin.description().run_state, RunState::Incoming);

    let pid = twin.vmm().pid();
    let process = rustix::process::Pid::from_raw(pid.try_into().unwrap());
    assert_eq!(rustix::process::getsid(process).unwrap(), process.unwrap(), "it leads its own session");
    let group = Cgroup::of_process(&place.plan.cgroup_root, pid).unwrap().unwrap();
    assert_eq!(group.path(), place.cgroup());
    assert_eq!(group.processes().unwrap().len(), 2, "its child is in the cgroup, too");
    let open = |fd: &str| fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
    let log = place.plan.directory.join(LOG_FILE);
    assert_eq!([open("0"), open("1"), open("2")], [PathBuf::from("/dev/null"), log.clone(), log.clone()]);
    assert_eq!(
        pipes(&pid.to_string(), |_| true).intersection(&pipes("self", is_own)).count(),
        0,
        "a pipe between them"
    );
    assert!(fs::read_to_string(&log).unwrap().contains("serving"));

    let vmm = Arc::clone(twin.vmm());
    twin.discard(LIMIT).await.unwrap();
    tokio::time::timeout(LIMIT, vmm.exited()).await.unwrap();
    place.assert_nothing_left();
}

#[tokio::test]
async fn a_twin_that_is_kept_becomes_a_vm_and_can_be_ended_completely() {
    let Some(place) = Place::new(&["serve", "{socket}"]) else { return };
    let twin = start(place.plan.clone()).await.unwrap();
    let vmm = Arc::clone(twin.vmm());
    vms::publish(&place.plan.directory, "{}").unwrap();
    assert_eq!(fs::read_to_string(place.plan.directory.join("vm.json")).unwrap(), "{}");
    vmm.describe().await.unwrap();

    assert_eq!(place.refusal().await, "RUN/vms/demo.counter holds a VM already: it has a vm.json");
    fs::write(place.plan.directory.join("disk.img"), "precious").unwrap();

    // The stub answers Quit and does not exit: it is killed.
    let mut deadlines = place.plan.deadlines;
    deadlines.quit = Duration::from_millis(200);
    let again = ContractVmm::connect(&place.plan.socket, deadlines).await.unwrap();
    let cgroup = Cgroup::of_process(&place.plan.cgroup_root, again.pid()).unwrap();
    end(&again, cgroup.as_ref(), &place.plan.directory, &place.plan.socket, LIMIT).await.unwrap();
    tokio::time::timeout(LIMIT, vmm.exited()).await.unwrap();
    assert!(!place.cgroup().exists());
    let left: Vec<_> =
        fs::read_dir(&place.plan.directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["disk.img"], "what others have put there stays");
}

#[tokio::test]
async fn a_twin_that_dies_at_its_start_is_reported_with_the_end_of_its_log_and_leaves_nothing() {
    let Some(place) = Place::new(&["die"]) else { return };
    let told = place.refusal().await;
    let expected: Vec<String> = (13..=20).map(|line| format!("complaint {line}")).collect();
    assert_eq!(
        told,
        format!(
            "the twin PROGRAM ended before it answered: exit status: 3; its log ends in:\n{}",
            expected.join("\n")
        )
    );
    place.assert_nothing_left();
}

#[tokio::test]
async fn a_twin_that_cannot_be_executed_is_reported_by_the_launcher() {
    let Some(mut place) = Place::new(&[]) else { return };
    place.plan.program = "/nowhere/vmm".into();
    let told = place.refusal().await;
    assert!(
        told.starts_with("the twin PROGRAM ended before it answered: exit status: 127; its log ends in:\n"),
        "{told}"
    );
    assert!(told.ends_with("cannot execute PROGRAM: No such file or directory (os error 2)"), "{told}");
    place.assert_nothing_left();
}

#[tokio::test]
async fn a_twin_that_does_not_answer_is_killed_at_the_deadline() {
    let Some(mut place) = Place::new(&["idle"]) else { return };
    place.plan.start_limit = Duration::from_millis(300);
    let told = place.refusal().await;
    let expected = "the twin PROGRAM did not answer within 300 ms: the VMM cannot be reached: cannot connect to \
        the socket \
        RUN/vms/demo.counter/vmm.sock: it does not exist; its log ends in:\n";
    assert!(told.starts_with(expected), "{told}");
    place.assert_nothing_left();
}

#[tokio::test]
async fn a_vmm_that_already_runs_a_vm_is_not_a_twin() {
    let Some(place) = Place::new(&["serve-running", "{socket}"]) else { return };
    let told = place.refusal().await;
    assert_eq!(
        told,
        "RUN/vms/demo.counter/vmm.sock is served by something else than the twin: its VM is Running, and must be \
         Incoming"
    );
    place.assert_nothing_left();
}

#[tokio::test]
async fn the_socket_of_another_process_is_not_mistaken_for_the_twins() {
    let Some(mut place) = Place::new(&["idle"]) else { return };
    place.plan.socket = place.run.path().join("other.sock");
    let socket = place.plan.socket.clone();
    // This runs when the start begins to wait: what is there before is taken away as a leftover.
    tokio::spawn(async move { serve(&socket, Stub::incoming()).await });
    let told = place.refusal().await;
    assert_eq!(
        told,
        format!(
            "RUN/other.sock is served by something else than the twin: process {} is not in CGROUP",
            std::process::id()
        )
    );
    place.assert_nothing_left();
}

#[tokio::test]
async fn a_cgroup_with_processes_is_neither_taken_over_nor_cleared() {
    let Some(place) = Place::new(&["serve", "{socket}"]) else { return };
    let twin = start(place.plan.clone()).await.unwrap();
    let told = place.refusal().await;
    assert_eq!(
        told,
        format!("no cgroup for the twin: the cgroup CGROUP is in use by process {}", twin.vmm().pid())
    );
    twin.vmm().describe().await.unwrap();
    twin.discard(LIMIT).await.unwrap();
    place.assert_nothing_left();
}

#[tokio::test]
async fn a_twin_goes_on_when_the_agent_that_started_it_is_killed() {
    let Some(place) = Place::new(&[]) else { return };
    let changes = FileEvents::watch(place.run.path()).unwrap();
    let mut agent = Command::new(&place.plan.program)
        .args(PLAY)
        .arg("agent")
        .args([place.run.path(), &place.plan.cgroup_root, Path::new(&place.plan.cgroup_name)])
        .kill_on_drop(true)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = async {
        while !place.run.path().join("started").exists() {
            changes.next().await;
        }
    };
    tokio::time::timeout(place.plan.start_limit, started).await.unwrap();
    agent.kill().await.unwrap();

    let vmm = ContractVmm::connect(&place.plan.socket, Deadlines::default()).await.unwrap();
    assert_eq!(vmm.describe().await.unwrap().run_state, RunState::Incoming);
    let group = Cgroup::of_process(&place.plan.cgroup_root, vmm.pid()).unwrap().unwrap();
    group.clear(LIMIT).await.unwrap();
    tokio::time::timeout(LIMIT, vmm.exited()).await.unwrap();
}

#[tokio::test]
async fn nothing_outside_the_folder_is_unlinked_whatever_the_socket_names_and_wherever_links_lead() {
    let Some(mut place) = Place::new(&["die"]) else { return };
    let outside = place.run.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("shadow"), "precious").unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(outside.join("other.sock")).unwrap();

    for name in ["shadow", "other.sock"] {
        place.plan.socket = outside.join(name);
        start(place.plan.clone()).await.unwrap_err();
        assert!(outside.join(name).exists(), "{name} is gone after a start");
        clear(&place.plan, LIMIT).await.unwrap();
        assert!(outside.join(name).exists(), "{name} is gone after a clearing");
    }
    // A folder in it is a link to another place.
    fs::create_dir_all(&place.plan.directory).unwrap();
    std::os::unix::fs::symlink(&outside, place.plan.directory.join("sub")).unwrap();
    place.plan.socket = place.plan.directory.join("sub/other.sock");
    start(place.plan.clone()).await.unwrap_err();
    assert!(outside.join("other.sock").exists(), "the start has followed a link");
    // The folder itself is one.
    fs::remove_dir_all(&place.plan.directory).unwrap();
    fs::write(outside.join(LOG_FILE), "another's").unwrap();
    std::os::unix::fs::symlink(&outside, &place.plan.directory).unwrap();
    place.plan.socket = place.plan.directory.join("other.sock");
    start(place.plan.clone()).await.unwrap_err();
    assert!(outside.join("other.sock").exists(), "the folder is a link, and was used");
    assert_eq!(fs::read_to_string(outside.join(LOG_FILE)).unwrap(), "another's");
}

#[tokio::test]
async fn a_link_in_place_of_the_log_is_neither_written_nor_quoted() {
    let Some(place) = Place::new(&["die"]) else { return };
    let secret = place.run.path().join("secret");
    fs::write(&secret, "the secret\n").unwrap();
    fs::create_dir_all(&place.plan.directory).unwrap();
    std::os::unix::fs::symlink(&secret, place.plan.log()).unwrap();
    assert_eq!(place.plan.last_words(), "; its log is empty", "it quotes another file");
    let told = place.refusal().await;
    assert!(told.contains("complaint 20"), "{told}");
    assert_eq!(fs::read_to_string(&secret).unwrap(), "the secret\n", "the twin has written to it");
}
