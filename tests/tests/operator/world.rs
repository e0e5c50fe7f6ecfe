//! A real API server with the chart installed by a real helm, the operator's program with the rights of the
//! account from the chart, and two fake agents.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use futures::TryStreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::conditions::is_deleted;
use kube::runtime::wait::{Condition, await_condition};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt};
use slackwater_api::{
    AssignedVM, MigrationNode, MigrationNodeSpec, PeerToPeer, Target, VMMigration, VMMigrationSpec, VmKind,
    VmReference,
};
pub(crate) use slackwater_lab::cluster::has_condition as condition;
use slackwater_lab::host::workspace_program;
use slackwater_lab::{Lab, LabConfig, Pki};
use tokio::process::{Child, Command};

use crate::fake_agent::{FakeAgent, device, vm};

pub(crate) const NAMESPACE: &str = "demo";
const SYSTEM: &str = "slackwater-system";
const ACCOUNT: &str = "slackwater-operator";
/// How long the operator may take to report a state. Generous: two CPUs may be busy.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct World {
    pub(crate) client: Client,
    /// The VM demo/counter runs here, on a1 and a2.
    pub(crate) a: FakeAgent,
    /// Has b1 and b2 free.
    pub(crate) b: FakeAgent,
    operator: Child,
    kubeconfig: PathBuf,
    pub(crate) lab: Lab,
}

impl World {
    pub(crate) async fn start() -> Self {
        let lab = Lab::start(LabConfig::default().with_control_plane()).await.unwrap();
        let plane = lab.control_plane().unwrap();
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/slackwater");
        plane.helm_install("slackwater", &chart, SYSTEM, &[]).await.unwrap();
        plane.kubectl(&["create", "namespace", NAMESPACE]).await.unwrap();
        let kubeconfig = plane.service_account_kubeconfig(SYSTEM, ACCOUNT).await.unwrap();
        let client = plane.client().await.unwrap();

        let pki = Pki::new("operator-test").unwrap();
        let (certificate, key) = pki.operator().unwrap().write(lab.folder(), "operator").unwrap();
        let ca = pki.write_ca(lab.folder()).unwrap();
        assert!(certificate.exists() && key.exists() && ca.exists());
        let a = FakeAgent::start(&pki, lab.folder(), "node-a");
        let b = FakeAgent::start(&pki, lab.folder(), "node-b");
        a.describe(|node| {
            node.vms = vec![vm(NAMESPACE, "counter", &["a1", "a2"])];
            node.devices = ["a1", "a2"].map(|name| device(name, "mtty-1", "VM demo/counter")).to_vec();
        });
        b.describe(|node| node.devices = ["b1", "b2"].map(|name| device(name, "mtty-1", "")).to_vec());

        let operator = start_operator(lab.folder(), &kubeconfig, "operator");
        let world = Self { client, a, b, operator, kubeconfig, lab };
        for agent in [&world.a, &world.b] {
            let spec = MigrationNodeSpec {
                address: agent.address.clone(),
                peer_address: None,
                accept_epoch_up_to: None,
            };
            let node = MigrationNode::new(&agent.node, spec);
            Api::all(world.client.clone()).create(&PostParams::default(), &node).await.unwrap();
        }
        for node in ["node-a", "node-b"] {
            world
                .node(node, "be Ready", |node| condition(&node.status.as_ref()?.conditions, "Ready", "True"))
                .await;
        }
        world
            .vm("counter", "be Migratable", |vm| {
                condition(&vm.status.as_ref()?.conditions, "Migratable", "True")
            })
            .await;
        world
    }

    pub(crate) fn folder(&self) -> &Path {
        self.lab.folder()
    }

    /// Kills the operator like a crash, and starts another.
    pub(crate) async fn crash_and_restart_operator(&mut self) {
        self.kill_operator().await;
        self.operator = start_operator(self.lab.folder(), &self.kubeconfig, "operator");
    }

    /// Another operator, with the same rights, that logs to `<name>.log`.
    pub(crate) fn start_another_operator(&self, name: &str) -> Child {
        start_operator(self.lab.folder(), &self.kubeconfig, name)
    }

    /// Kills the operator like a crash.
    pub(crate) async fn kill_operator(&mut self) {
        // An operator that has ended already cannot be killed.
        self.operator.kill().await.ok();
    }

    /// Stops the operator with SIGTERM, and returns when it has ended.
    pub(crate) async fn stop_operator(&mut self) {
        let pid = rustix::process::Pid::from_raw(self.operator.id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = tokio::time::timeout(TIMEOUT, self.operator.wait()).await.unwrap().unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// Returns, with its exit code, when the operator has ended by itself.
    pub(crate) async fn operator_ended(&mut self) -> Option<i32> {
        let ended = tokio::time::timeout(TIMEOUT, self.operator.wait()).await;
        ended.unwrap_or_else(|_| panic!("the operator goes on\n{}", self.log())).unwrap().code()
    }

    pub(crate) fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), SYSTEM)
    }

    pub(crate) fn migrations(&self) -> Api<VMMigration> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Creates a VMMigration of demo/counter.
    pub(crate) async fn migrate(&self, name: &str, change: impl FnOnce(&mut VMMigrationSpec)) -> VMMigration {
        let mut spec = VMMigrationSpec {
            vm_ref: VmReference { kind: VmKind::AssignedVM, name: "counter".into() },
            target: Some(Target { node_name: "node-b".into() }),
            peer_to_peer: PeerToPeer::Required,
            pre_commit_timeout: "5m".into(),
            downtime_budget: "300ms".into(),
            on_budget_exceeded: Default::default(),
            attempts: 1,
            cancel: false,
            ttl_seconds_after_finished: None,
            resolve: None,
        };
        change(&mut spec);
        self.migrations().create(&PostParams::default(), &VMMigration::new(name, spec)).await.unwrap()
    }

    /// Changes a spec as `kubectl patch` does.
    pub(crate) async fn patch(&self, name: &str, spec: serde_json::Value) {
        let patch = Patch::Merge(serde_json::json!({ "spec": spec }));
        self.migrations().patch(name, &PatchParams::default(), &patch).await.unwrap();
    }

    pub(crate) async fn delete(&self, name: &str) {
        self.migrations().delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub(crate) async fn until_gone(&self, object: &VMMigration) {
        let uid = object.uid().unwrap();
        let gone = is_deleted(&uid);
        let name = object.name_any();
        let gone = tokio::time::timeout(TIMEOUT, await_condition(self.migrations(), &name, gone)).await;
        if gone.is_err() {
            panic!("{name} is still there\n{}", self.log());
        }
    }

    /// Waits until a condition on a VMMigration holds.
    pub(crate) async fn until(
        &self,
        name: &str,
        wanted: &str,
        is: impl Fn(&VMMigration) -> Option<bool> + Send + 'static,
    ) -> VMMigration {
        self.wait(self.migrations(), name, wanted, is).await
    }

    pub(crate) async fn node(
        &self,
        name: &str,
        wanted: &str,
        is: impl Fn(&MigrationNode) -> Option<bool> + Send + 'static,
    ) -> MigrationNode {
        self.wait(Api::all(self.client.clone()), name, wanted, is).await
    }

    pub(crate) async fn vm(
        &self,
        name: &str,
        wanted: &str,
        is: impl Fn(&AssignedVM) -> Option<bool> + Send + 'static,
    ) -> AssignedVM {
        self.wait(Api::namespaced(self.client.clone(), NAMESPACE), name, wanted, is).await
    }

    async fn wait<K>(
        &self,
        api: Api<K>,
        name: &str,
        wanted: &str,
        is: impl Fn(&K) -> Option<bool> + Send + 'static,
    ) -> K
    where
        K: kube::Resource
            + Clone
            + std::fmt::Debug
            + Send
            + serde::de::DeserializeOwned
            + serde::Serialize
            + 'static,
    {
        let met = Wanted(is);
        match tokio::time::timeout(TIMEOUT, await_condition(api.clone(), name, met)).await {
            Ok(object) => object.unwrap().unwrap(),
            Err(_) => {
                let now = api.get_opt(name).await.unwrap();
                let now = serde_json::to_string_pretty(&now).unwrap();
                panic!("{name} did not come to {wanted}; it is\n{now}\nand the operator said\n{}", self.log())
            }
        }
    }

    /// Waits until the events in `namespace` about an object have the `wanted` reasons, and returns their
    /// notes, oldest first.
    ///
    /// An event is posted after the status that it reports, so a test that has seen the status must wait for
    /// it.
    pub(crate) async fn until_events(&self, namespace: &str, about: &str, wanted: &[&str]) -> Vec<String> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let mut seen = BTreeMap::new();
        let posted = async {
            let mut changes = pin!(watcher(events, watcher::Config::default()).applied_objects());
            while let Some(event) = changes.try_next().await.unwrap() {
                if event.regarding.as_ref().and_then(|to| to.name.as_deref()) != Some(about) {
                    continue;
                }
                let time = event.event_time.as_ref().map(|time| time.0);
                let content =
                    (event.reason.clone().unwrap_or_default(), event.note.clone().unwrap_or_default());
                seen.insert((time, event.name_any()), content);
                if seen.values().map(|(reason, _)| reason.as_str()).eq(wanted.iter().copied()) {
                    return;
                }
            }
        };
        if tokio::time::timeout(TIMEOUT, posted).await.is_err() {
            panic!(
                "expected the events {wanted:?} about {about}, found: {seen:#?}\nthe operator said\n{}",
                self.log()
            )
        }
        seen.into_values().map(|(_, note)| note).collect()
    }

    pub(crate) fn log(&self) -> String {
        self.log_of("operator")
    }

    pub(crate) fn log_of(&self, name: &str) -> String {
        std::fs::read_to_string(self.lab.folder().join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Waits until an operator has logged this text.
    pub(crate) async fn wait_for_log(&self, name: &str, text: &str) {
        let mut polls = tokio::time::interval(Duration::from_millis(100));
        let logged = async {
            while !self.log_of(name).contains(text) {
                polls.tick().await;
            }
        };
        let logged = tokio::time::timeout(TIMEOUT, logged).await;
        assert!(logged.is_ok(), "{name} did not log {text:?}:\n{}", self.log_of(name));
    }

    /// Reasons and notes of the events about an object, unordered.
    pub(crate) async fn events(&self, about: &str) -> Vec<(String, String)> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), NAMESPACE);
        let events = events.list(&ListParams::default()).await.unwrap();
        let is_about =
            |event: &Event| event.regarding.as_ref().and_then(|to| to.name.as_deref()) == Some(about);
        let content = |event: Event| (event.reason.unwrap_or_default(), event.note.unwrap_or_default());
        events.items.into_iter().filter(is_about).map(content).collect()
    }

    pub(crate) async fn lease(
        &self,
        wanted: &str,
        is: impl Fn(&Lease) -> Option<bool> + Send + 'static,
    ) -> Lease {
        self.wait(self.leases(), "slackwater-operator", wanted, is).await
    }

    /// The rights from the chart were sufficient for every request of the operator.
    pub(crate) fn assert_nothing_was_forbidden(&self) {
        let account = format!("system:serviceaccount:{SYSTEM}:{ACCOUNT}");
        let requests = self.lab.control_plane().unwrap().audit().unwrap();
        let own: Vec<_> = requests.into_iter().filter(|request| request.user == account).collect();
        assert!(!own.is_empty(), "the operator asked the API server for nothing");
        let forbidden: Vec<_> = own.iter().filter(|request| request.status == 403).collect();
        assert!(forbidden.is_empty(), "{forbidden:#?}");
    }
}

struct Wanted<F>(F);

impl<K, F: Fn(&K) -> Option<bool>> Condition<K> for Wanted<F> {
    fn matches_object(&self, object: Option<&K>) -> bool {
        object.and_then(&self.0).unwrap_or(false)
    }
}

/// A condition of a VMMigration.
pub(crate) fn is(
    type_: &'static str,
    wanted: &'static str,
) -> impl Fn(&VMMigration) -> Option<bool> + Send + 'static {
    move |migration| condition(&migration.status.as_ref()?.conditions, type_, wanted)
}

pub(crate) fn message(migration: &VMMigration, type_: &str) -> String {
    let conditions = &migration.status.as_ref().unwrap().conditions;
    conditions.iter().find(|condition| condition.type_ == type_).unwrap().message.clone()
}

/// How long another operator waits for the Lease of a killed one: as short as whole seconds allow.
const LEASE: [&str; 6] = ["--lease-duration", "3s", "--lease-renew-deadline", "2s", "--lease-retry", "250ms"];

/// How long a source may be silent: as short as a few rounds of asking take.
pub(crate) const SOURCE_PATIENCE: Duration = Duration::from_secs(3);

/// Starts an operator that logs to `<name>.log`.
pub(crate) fn start_operator(folder: &Path, kubeconfig: &Path, name: &str) -> Child {
    let log = folder.join(format!("{name}.log"));
    let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
    Command::new(workspace_program("slackwater-operator").unwrap())
        .arg("run")
        .arg("--tls-cert")
        .arg(folder.join("operator.crt"))
        .arg("--tls-key")
        .arg(folder.join("operator.key"))
        .arg("--tls-ca")
        .arg(folder.join("ca.crt"))
        .args(LEASE)
        .args(["--source-patience", &format!("{}s", SOURCE_PATIENCE.as_secs())])
        .env("KUBECONFIG", kubeconfig)
        .env("NO_COLOR", "1")
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}
