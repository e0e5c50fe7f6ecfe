//! Slackwater installed on the lab as its users install it: the chart by helm, the operator's program with
//! the rights of the account from the chart, an agent in every node, and a VM that counts.
//!
//! A test then does what a user does: it applies objects with `kubectl` and reads their status.

mod account;
mod agents;
mod interference;
mod judge;
mod operator;
mod qemu;
mod vm;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::runtime::conditions::is_deleted;
use kube::runtime::wait::{Condition, await_condition};
use kube::{Client, ResourceExt};
use slackwater_api::{AssignedVM, MigrationNode, VMMigration};
use slackwater_proto::channel::connect;
use slackwater_proto::limits::node_client;
use slackwater_proto::node::node_agent_client::NodeAgentClient;
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::transport::Channel;
use tokio::time::timeout;

pub use account::{DeviceAccount, Span};
pub use interference::DamagedFile;
pub use judge::{Verdict, Watching};
pub use qemu::{Accelerator, DeviceAccess, Guest, QEMU_PROGRAM, QemuVm};
pub use vm::{LabVm, VMM_PROGRAM};

use crate::config::LabConfig;
use crate::host::Relay;
use crate::lab::Lab;
use crate::node::NodeConfig;
use crate::pki::{Issued, Pki};
use slackwater_reference_vmm::guest::Report;

/// The namespace of the VMs.
pub const NAMESPACE: &str = "demo";
/// The namespace that the chart is installed in.
pub const SYSTEM: &str = "slackwater-system";
/// The account that the chart makes for the operator.
pub const ACCOUNT: &str = "slackwater-operator";
/// How long the product may take to report a state. Generous: two emulated nodes may share one processor.
pub const TIMEOUT: Duration = Duration::from_secs(90);

/// The product, installed.
pub struct Cluster {
    /// The cluster's client, with the administrator's rights.
    pub client: Client,
    /// Issues the certificates.
    pub pki: Pki,
    operator: Option<operator::Supervised>,
    operator_faults: String,
    kubeconfig: PathBuf,
    /// The operator's connections to the agents, by node.
    relays: BTreeMap<String, Relay>,
    /// The QEMU VM under test. `None`: the VM under test runs in the reference VMM.
    qemu: Option<QemuVm>,
    /// The lab below.
    pub lab: Lab,
}

impl Cluster {
    /// Starts the lab with these nodes, installs the chart, and starts the operator and the agents.
    ///
    /// # Errors
    /// When a component does not come up.
    pub async fn start(nodes: impl IntoIterator<Item = NodeConfig>) -> anyhow::Result<Self> {
        Self::start_with(LabConfig::nodes(nodes), "").await
    }

    /// The same, with faults that are set in the operator's environment (its feature `faults`).
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub async fn start_with(config: LabConfig, operator_faults: &str) -> anyhow::Result<Self> {
        let lab = Lab::start(config.with_control_plane()).await?;
        let plane = lab.control_plane()?;
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../charts/slackwater");
        plane.helm_install("slackwater", &chart, SYSTEM, &[]).await?;
        plane.kubectl(&["create", "namespace", NAMESPACE]).await?;
        let kubeconfig = plane.service_account_kubeconfig(SYSTEM, ACCOUNT).await?;
        let client = plane.client().await?;
        let pki = Pki::new("slackwater-lab")?;
        pki.operator()?.write(lab.folder(), "operator")?;
        pki.write_ca(lab.folder())?;
        let operator_faults = operator_faults.to_owned();
        let mut relays = BTreeMap::new();
        for node in lab.nodes() {
            relays.insert(node.name().to_owned(), Relay::to(node.agent_address()?).await?);
        }
        let mut cluster =
            Self { client, pki, operator: None, operator_faults, kubeconfig, relays, qemu: None, lab };
        for node in cluster.lab.nodes() {
            cluster.start_agent(node.name()).await?;
        }
        cluster.start_operator().await?;
        cluster.name_nodes().await?;
        Ok(cluster)
    }

    fn relay(&self, node: &str) -> anyhow::Result<&Relay> {
        self.relays.get(node).with_context(|| format!("there is no node {node}"))
    }

    /// Creates the MigrationNodes, and waits until the operator has reached all of them.
    async fn name_nodes(&self) -> anyhow::Result<()> {
        let mut manifest = String::new();
        for node in self.lab.nodes() {
            writeln!(
                manifest,
                "---\napiVersion: slackwater.dev/v1alpha1\nkind: MigrationNode\nmetadata: {{name: {}}}\n\
                 spec: {{address: '{}', peerAddress: '{}'}}",
                node.name(),
                self.relay(node.name())?.address(),
                node.link_address()
            )?;
        }
        self.apply("nodes", &manifest).await?;
        for node in self.lab.nodes() {
            self.until::<MigrationNode>(Api::all(self.client.clone()), node.name(), "Ready", |node| {
                has_condition(&node.status.as_ref()?.conditions, "Ready", "True")
            })
            .await?;
        }
        Ok(())
    }

    /// Applies a manifest with `kubectl`.
    ///
    /// # Errors
    /// When kubectl fails, with its message.
    pub async fn apply(&self, name: &str, manifest: &str) -> anyhow::Result<String> {
        let path = self.lab.folder().join(format!("{name}.yaml"));
        std::fs::write(&path, manifest)?;
        Ok(self.lab.control_plane()?.kubectl(&["apply", "-f", &path.to_string_lossy()]).await?)
    }

    /// Runs `kubectl` with these arguments.
    ///
    /// # Errors
    /// When it fails, with its message.
    pub async fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        Ok(self.lab.control_plane()?.kubectl(arguments).await?)
    }

    /// Applies a VMMigration of the VM; `fields` are further fields of its spec, in YAML's flow style.
    ///
    /// # Errors
    /// When kubectl fails.
    pub async fn migrate(&self, name: &str, fields: &str) -> anyhow::Result<()> {
        let manifest = format!(
            "apiVersion: slackwater.dev/v1alpha1\nkind: VMMigration\n\
             metadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
             spec: {{vmRef: {{kind: AssignedVM, name: {}}}, {fields}}}\n",
            self.vm_name()
        );
        self.apply(name, &manifest).await.map(|_| ())
    }

    /// The VMMigrations.
    #[must_use]
    pub fn migrations(&self) -> Api<VMMigration> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Waits until a VMMigration has ended, with any result.
    ///
    /// # Errors
    /// When it does not end in time, with its status and the operator's log.
    pub async fn until_ended(&self, name: &str) -> anyhow::Result<VMMigration> {
        self.until(self.migrations(), name, "an end", |migration: &VMMigration| {
            let conditions = &migration.status.as_ref()?.conditions;
            let ended = |condition: &&_| {
                let condition: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition = condition;
                (condition.type_ == "Succeeded" && condition.status != "Unknown")
                    || (condition.type_ == "Accepted" && condition.status == "False")
            };
            Some(conditions.iter().any(|condition| ended(&condition)))
        })
        .await
    }

    /// Waits until a condition on an object holds.
    ///
    /// # Errors
    /// When it does not hold in time, with the object and the operator's log.
    pub async fn until<K>(
        &self,
        api: Api<K>,
        name: &str,
        wanted: &str,
        is: impl Fn(&K) -> Option<bool> + Send + 'static,
    ) -> anyhow::Result<K>
    where
        K: kube::Resource
            + Clone
            + std::fmt::Debug
            + Send
            + serde::de::DeserializeOwned
            + serde::Serialize
            + 'static,
    {
        match timeout(TIMEOUT, await_condition(api.clone(), name, Wanted(is))).await {
            Ok(found) => found?.with_context(|| format!("{name} is gone")),
            Err(_) => {
                let now = serde_json::to_string_pretty(&api.get_opt(name).await?)?;
                let operator = self.operator_log();
                bail!("{name} did not come to {wanted}; it is\n{now}\nand the operator said\n{operator}")
            }
        }
    }

    /// Waits until the VM is reported at a node, and can be migrated.
    ///
    /// # Errors
    /// When it is not.
    pub async fn until_vm_at(&self, node: &str) -> anyhow::Result<AssignedVM> {
        let at = node.to_owned();
        let api = Api::namespaced(self.client.clone(), NAMESPACE);
        self.until(api, self.vm_name(), &format!("be migratable at {node}"), move |vm: &AssignedVM| {
            let status = vm.status.as_ref()?;
            let there = status.node_name.as_deref() == Some(&at) && status.migration.is_none();
            Some(there && has_condition(&status.conditions, "Migratable", "True")?)
        })
        .await
    }

    /// Waits until a node reports this number of free devices.
    ///
    /// # Errors
    /// When it does not.
    pub async fn until_free(&self, node: &str, devices: i32) -> anyhow::Result<MigrationNode> {
        let api = Api::all(self.client.clone());
        self.until(api, node, &format!("have {devices} free devices"), move |node: &MigrationNode| {
            Some(node.status.as_ref()?.free_device_count? == devices)
        })
        .await
    }

    /// Deletes a VMMigration and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go.
    pub async fn delete(&self, name: &str) -> anyhow::Result<()> {
        let migration = self.migrations().get(name).await?;
        let uid = migration.uid().context("the API server gave it no UID")?;
        self.migrations().delete(name, &DeleteParams::default()).await?;
        timeout(TIMEOUT, await_condition(self.migrations(), name, is_deleted(&uid)))
            .await
            .with_context(|| format!("{name} is still there"))??;
        Ok(())
    }

    /// A client of a node's agent with these credentials.
    ///
    /// # Errors
    /// When the agent refuses the connection.
    pub async fn agent_client(
        &self,
        node: &str,
        issued: &Issued,
    ) -> anyhow::Result<NodeAgentClient<Channel>> {
        let address = self.lab.node(node)?.agent_address()?.to_string();
        let channel = connect(&self.credentials(issued)?, &address, node).await?;
        Ok(node_client(channel))
    }

    /// Credentials from an issued certificate, read from files as a program does.
    ///
    /// # Errors
    /// When they are invalid.
    pub fn credentials(&self, issued: &Issued) -> anyhow::Result<Credentials> {
        let folder = tempfile::tempdir_in(self.lab.folder())?;
        let (certificate, key) = issued.write(folder.path(), "tls")?;
        Ok(Credentials::read(&certificate, &key, &self.lab.folder().join("ca.crt"))?)
    }

    /// Starts a QEMU VM at a node. It becomes the VM under test.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_qemu(&mut self, vm: QemuVm, node: &str) -> anyhow::Result<()> {
        for node in self.lab.nodes() {
            vm.make_output_folder(node).await?;
        }
        vm.start(self.lab.node(node)?).await?;
        self.qemu = Some(vm);
        Ok(())
    }

    /// The QEMU VM under test.
    ///
    /// # Errors
    /// When none was started.
    pub fn qemu(&self) -> anyhow::Result<&QemuVm> {
        self.qemu.as_ref().context("no QEMU VM was started")
    }

    /// The current report of the guest of the VM at a node.
    ///
    /// # Errors
    /// When no VMM runs there.
    pub async fn guest(&self, node: &str) -> anyhow::Result<Report> {
        let node = self.lab.node(node)?;
        match &self.qemu {
            None => vm::guest(node).await,
            Some(vm) => vm.guest(node).await,
        }
    }

    /// The VM's name.
    #[must_use]
    pub fn vm_name(&self) -> &str {
        self.qemu.as_ref().map_or("counter", |vm| &vm.name)
    }

    /// The program of the VM's VMM.
    fn vmm(&self) -> &'static str {
        if self.qemu.is_some() { "qemu-system-x86_64" } else { vm::VMM }
    }

    /// Fails if the API server refused a request of the operator, whose rights come from the chart.
    /// Returns the number of its requests.
    ///
    /// # Errors
    /// Names the refused requests.
    pub fn nothing_was_forbidden(&self) -> anyhow::Result<usize> {
        let account = format!("system:serviceaccount:{SYSTEM}:{ACCOUNT}");
        let requests = self.lab.control_plane()?.audit()?;
        let own: Vec<_> = requests.iter().filter(|request| request.user == account).collect();
        let forbidden: Vec<_> = own.iter().filter(|request| request.status == 403).collect();
        if own.is_empty() || !forbidden.is_empty() {
            bail!("of {} requests of the operator these were refused: {forbidden:#?}", own.len());
        }
        Ok(own.len())
    }

    /// The reasons of the events about an object.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn event_reasons(&self, about: &str) -> anyhow::Result<Vec<String>> {
        let events: Api<k8s_openapi::api::core::v1::Event> = Api::namespaced(self.client.clone(), NAMESPACE);
        let list = events.list(&ListParams::default()).await?;
        let about =
            |event: &k8s_openapi::api::core::v1::Event| event.involved_object.name.as_deref() == Some(about);
        Ok(list.items.into_iter().filter(about).filter_map(|event| event.reason).collect())
    }

    /// Changes a VMMigration's spec with a merge patch, as `kubectl patch` does.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn patch_spec(&self, name: &str, spec: serde_json::Value) -> anyhow::Result<VMMigration> {
        let patch = serde_json::json!({ "spec": spec });
        Ok(self.migrations().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await?)
    }
}

/// A condition has this status: `True`, or with its reason, `False/TargetIsSource`.
#[must_use]
pub fn has_condition(
    conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition],
    type_: &str,
    wanted: &str,
) -> Option<bool> {
    let condition = conditions.iter().find(|condition| condition.type_ == type_)?;
    let (status, reason) =
        wanted.split_once('/').map_or((wanted, None), |(status, reason)| (status, Some(reason)));
    Some(condition.status == status && reason.is_none_or(|reason| condition.reason == reason))
}

struct Wanted<F>(F);

impl<K, F: Fn(&K) -> Option<bool>> Condition<K> for Wanted<F> {
    fn matches_object(&self, object: Option<&K>) -> bool {
        object.and_then(&self.0).unwrap_or(false)
    }
}
