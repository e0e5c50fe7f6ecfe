//! Taking up a source whose agent was killed, with a VMM that is this test program.

use std::fs;
use std::path::PathBuf;

use slackwater_handover::Record;
use slackwater_handover::policy::PeerToPeer;
use slackwater_proto::limits::vmm_server;
use slackwater_proto::node::{Finished, MigrationRef, Outcome, ReserveRequest, VmState};
use slackwater_proto::server::{bind_unix, serve_unix};
use slackwater_proto::tonic::service::Routes;
use tempfile::TempDir;

use super::super::take_up::unheard;
use super::*;
use crate::attempt::entry::{Ended, Monitor};
use crate::attempt::tests::rig::Authority;
use crate::host::identity::NoIdentity;
use crate::host::twin_users::{DEFAULT_RANGE, TwinUsers};
use crate::host::vm::VmmKind;
use crate::host::vms::VmWatch;
use crate::journal::{Journal, Role};
use crate::service::config::NodeConfig;
use crate::service::inventory::Inventory;
use crate::service::registry::{LocalEnd, Registry};
use crate::vfio::borrow::VmmProcess;
use crate::vmm::confinement::Confinement;
use crate::vmm::contract::Deadlines;
use crate::vmm::stub::Stub;

/// No test takes longer.
pub(in super::super) const LONG: Duration = Duration::from_secs(20);

/// A node with one VM, `demo.counter`.
pub(in super::super) struct Node {
    _folder: TempDir,
    pub(in super::super) directory: PathBuf,
    pub(in super::super) resources: NodeResources,
}

/// Makes a node whose vm.json is as `prepare` leaves it, before its agent starts.
pub(in super::super) fn node(prepare: impl FnOnce(&Path)) -> Node {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    let directory = run_dir.join("vms/demo.counter");
    fs::create_dir_all(&directory).unwrap();
    prepare(&directory.join("vm.json"));
    let config = NodeConfig {
        node: "node-a".to_owned(),
        run_dir: run_dir.clone(),
        cgroup_root: folder.path().join("cgroup"),
        twin_programs: Vec::new(),
        confinement: Confinement::default(),
        twin_start_limit: LONG,
        deadlines: Deadlines::default(),
        migration_bandwidth_bytes_per_second: 1 << 30,
        migration_channels: 0,
    };
    let registry = Arc::new(Registry::default());
    let vms = VmWatch::start(&run_dir).unwrap();
    let resources = NodeResources {
        inventory: Arc::new(Inventory::new(config.clone(), Arc::clone(&registry), vms)),
        config,
        credentials: Authority::new().agent("node-a"),
        registry,
        journal: Arc::new(Journal::open(&folder.path().join("state")).unwrap()),
        twin_users: TwinUsers::new(DEFAULT_RANGE.parse().unwrap()),
        vf_identity: Arc::new(NoIdentity),
    };
    Node { _folder: folder, directory, resources }
}

impl Node {
    /// Serves the VM's VMM, on this socket.
    fn serve(&self, socket: &Path) {
        let listener = bind_unix(socket).unwrap();
        let routes = Routes::new(vmm_server(Stub::running()));
        tokio::spawn(serve_unix(listener, routes, std::future::pending(), Duration::ZERO));
    }

    /// An attempt at SAVING, and this process as the VM's.
    pub(in super::super) fn entry(&self, monitor: Option<&Path>) -> Entry {
        let this = VmmProcess::open(std::process::id()).unwrap();
        let monitor = monitor.map(|socket| Monitor {
            kind: VmmKind::Contract,
            socket: socket.to_owned(),
            devices: Vec::new(),
        });
        let end = EndEntry::Source {
            target_node: "node-b".to_owned(),
            target_address: "127.0.0.1:1".to_owned(),
            cgroup: None,
            marks: Marks::default(),
            monitor,
        };
        let vmm = Some(this.identity().into());
        Entry { vmm, end, ..crate::attempt::entry::tests::entry() }
    }

    /// Writes the journal of the agent before.
    fn journal(&self, entry: &Entry) -> Key {
        let key = Key::new(&entry.migration_id, Role::Source).unwrap();
        self.resources.journal.create(&key, &serde_json::to_vec(entry).unwrap()).unwrap();
        key
    }

    /// Takes the journal up, and waits for the end.
    async fn end(&self, entry: Entry) -> Finished {
        let key = self.journal(&entry);
        let taken_up = async {
            take_up(&self.resources, key, entry.clone()).await.unwrap();
            let Some(LocalEnd::Source(run)) = self.resources.registry.part("3f", 1) else {
                panic!("no source")
            };
            run.ended().await;
            run.log().end().unwrap()
        };
        tokio::time::timeout(LONG, taken_up).await.expect("it should not take that long")
    }
}

pub(in super::super) fn vm_json(socket: &str) -> String {
    format!(
        r#"{{"name": "counter", "namespace": "demo", "vmm": {{"kind": "contract", "socket": "{socket}"}},
            "twin": {{"program": "/bin/vmm", "args": ["{{socket}}"]}}}}"#
    )
}

#[tokio::test]
async fn a_vm_whose_process_lives_is_taken_back_whatever_has_become_of_its_vm_json() {
    type Prepare = fn(&Path);
    let cases: [(&str, Prepare); 5] = [
        ("as it was", |path| fs::write(path, vm_json("vmm.sock")).unwrap()),
        ("removed", |_| {}),
        ("edited: another socket", |path| fs::write(path, vm_json("other.sock")).unwrap()),
        ("edited: no JSON any more", |path| fs::write(path, "{").unwrap()),
        ("unreadable", |path| fs::create_dir(path).unwrap()),
    ];
    for (what, prepare) in cases {
        let node = node(prepare);
        let socket = node.directory.join("vmm.sock");
        node.serve(&socket);
        let finished = node.end(node.entry(Some(&socket))).await;
        assert_eq!(finished.outcome(), Outcome::RolledBack, "{what}: {finished:?}");
        assert_eq!(finished.reason, "AgentRestarted", "{what}: {finished:?}");
        let told = finished.message.contains("until its owner restores it, the VM cannot be migrated");
        let usable = what == "as it was" || what == "edited: another socket";
        assert_eq!(told, !usable, "{what}: {finished:?}");
        assert_eq!(
            node.directory.join("vm.json").is_file(),
            what != "removed" && what != "unreadable",
            "{what}"
        );
    }
}

#[tokio::test]
async fn a_vm_that_is_held_is_reported_without_its_vm_json_and_the_answers_say_what_is_waited_for() {
    let node = node(|_| {});
    // Its process lives, and nothing listens.
    let socket = node.directory.join("vmm.sock");
    let entry = node.entry(Some(&socket));
    let key = node.journal(&entry);
    super::super::take_up::take_up(&node.resources, key, entry);
    let mut changes = node.resources.inventory.changes();
    let reported = async {
        loop {
            changes.next().await;
            let report = node.resources.inventory.describe().await.unwrap();
            let [vm] = report.vms.as_slice() else { panic!("the VM has vanished from {report:?}") };
            if vm.unreachable_reason.contains("lives, and cannot be used yet") {
                return vm.clone();
            }
        }
    };
    let vm = tokio::time::timeout(LONG, reported).await.expect("it should be reported");
    assert_eq!(vm.vm.unwrap().name, "counter");
    assert_eq!((vm.migration_id.as_str(), vm.state), ("3f", VmState::Unreachable.into()));
    let asked = node.resources.registry.usable_part("3f", 1).unwrap_err();
    assert!(asked.message.contains("cannot be used yet"), "{asked:?}");

    node.serve(&socket);
    let taken_up = async {
        loop {
            if let Some(LocalEnd::Source(run)) = node.resources.registry.part("3f", 1) {
                run.ended().await;
                return run.log().end().unwrap();
            }
            changes.next().await;
        }
    };
    let finished = tokio::time::timeout(LONG, taken_up).await.expect("it should be taken up");
    assert_eq!(finished.outcome(), Outcome::RolledBack, "{finished:?}");
}

#[tokio::test]
async fn a_vm_is_lost_only_when_its_process_is_not_the_journalled_one_any_more() {
    let node = node(|path| fs::write(path, vm_json("vmm.sock")).unwrap());
    let socket = node.directory.join("vmm.sock");
    node.serve(&socket);
    let mut entry = node.entry(Some(&socket));
    entry.vmm.as_mut().unwrap().start_ticks -= 1;
    let finished = node.end(entry).await;
    assert_eq!(finished.outcome(), Outcome::Lost, "{finished:?}");
}

#[tokio::test]
async fn the_longest_reason_with_what_is_missing_is_not_longer_than_the_journal_has_room_for() {
    let node = node(|_| {});
    let socket = node.directory.join("vmm.sock");
    node.serve(&socket);
    let longest = Failure::new(slackwater_handover::Reason::TargetFailed, "\"".repeat(MESSAGE_MAX_BYTES));
    let failure = Some(crate::attempt::entry::FailureEntry::from(&longest));
    let entry = Entry { failure, ..node.entry(Some(&socket)) };
    node.end(entry).await;
    let (_, content) = node.resources.journal.read_all().unwrap().pop().unwrap();
    let message = Entry::parse(&content.unwrap()).unwrap().failure.unwrap().message;
    assert!(message.len() <= MESSAGE_MAX_BYTES, "{}", message.len());
    assert!(message.ends_with("the VM cannot be migrated"), "{message}");
}

#[tokio::test]
async fn another_process_that_serves_the_vms_socket_is_not_taken_for_the_vmm() {
    let node = node(|_| {});
    let socket = node.directory.join("vmm.sock");
    node.serve(&socket);
    let stdin = std::process::Stdio::piped();
    let mut vmm = std::process::Command::new("cat").stdin(stdin).spawn().unwrap();
    let mut entry = node.entry(Some(&socket));
    entry.vmm = Some(VmmProcess::open(vmm.id()).unwrap().identity().into());
    let key = node.journal(&entry);
    super::super::take_up::take_up(&node.resources, key, entry);
    let registry = &node.resources.registry;
    let mut changes = registry.changes();
    let held = async {
        loop {
            let why = registry.waits_for("3f").unwrap_or_default();
            if why.contains("is served by process") {
                return;
            }
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(LONG, held).await.expect("it should be held");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let lost = async {
        loop {
            if let Some(LocalEnd::Source(run)) = registry.part("3f", 1) {
                run.ended().await;
                return run.log().end().unwrap();
            }
            // Joining is not told of.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let finished = tokio::time::timeout(LONG, lost).await.expect("it should end");
    assert_eq!(finished.outcome(), Outcome::Lost, "{finished:?}");
}

#[tokio::test]
async fn after_a_restart_destinations_that_may_not_know_that_the_vm_stayed_are_told() {
    let node = node(|_| {});
    let ended = || Entry { ended: Some(Ended::default()), record: Record::Aborted, ..node.entry(None) };
    let is_told = |entry: Entry| unheard(&node.resources, &entry).is_some();
    assert!(is_told(ended()));
    // One that has not ended tells it itself, one that succeeded has nothing to tell, and a destination no one.
    assert!(!is_told(Entry { ended: None, ..ended() }));
    assert!(!is_told(Entry { record: Record::Released, ..ended() }));
    let request = ReserveRequest::default();
    let reserved = entries::destination(
        &MigrationRef::default(),
        &VmRef::default(),
        &request,
        PeerToPeer::Required,
        70_000,
    );
    assert!(!is_told(Entry { record: Record::Discarded, ended: Some(Ended::default()), ..reserved }));
}
