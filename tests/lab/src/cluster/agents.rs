//! The agents in the nodes: starting and killing them, their logs and their answers.

use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, ResourceExt};
use slackwater_api::VMMigration;
use slackwater_proto::node::{DescribeRequest, JournalState, MigrationRef, NodeDescription, ResolveRequest};

use super::qemu::{GUEST_OUTPUT, make_output_folder};
use super::{Cluster, QEMU_PROGRAM, SYSTEM, TIMEOUT, VMM_PROGRAM};
use crate::pki::Issued;

/// The agent's program, its cgroup and its log.
pub(super) const AGENT: &str = "slackwater-node-agent";
/// A small file system in RAM, so that a test can fill it.
pub(super) const STATE_DISK: &str = "/var/lib/slackwater";
/// Where the agent keeps its journal: a folder on that disk.
pub(super) const STATE_DIR: &str = "/var/lib/slackwater/state";

/// The Lease of the leading operator.
const LEASE: &str = "slackwater-operator";

const STATE_DISK_SIZE: &str = "16m";
const TLS: &str = "/etc/slackwater";
const FAULTS: &str = "/run/slackwater-faults";

impl Cluster {
    /// Starts the agent in a node, with a certificate of its own.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_agent(&self, name: &str) -> anyhow::Result<()> {
        let node = self.lab.node(name)?;
        let Issued { certificate_pem, key_pem } = self.pki.agent(name)?;
        for (file, content) in
            [("tls.crt", &*certificate_pem), ("tls.key", &*key_pem), ("ca.crt", self.pki.ca_pem())]
        {
            node.put(&format!("{TLS}/{file}"), 0o600, content.as_bytes()).await?;
        }
        node.shell(&format!(
            "{} && mkdir -p {STATE_DISK} && mount -t tmpfs -o size={STATE_DISK_SIZE} state {STATE_DISK} && \
             mkdir -m 700 {STATE_DIR}",
            make_output_folder()
        ))
        .await?;
        self.restart_agent(name).await
    }

    /// Starts the agent of a node again, as its supervisor does after it has ended.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart_agent(&self, name: &str) -> anyhow::Result<()> {
        self.restart_agent_with(name, &[]).await
    }

    /// The same, with further arguments, such as `--migration-bandwidth`.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart_agent_with(&self, name: &str, more: &[&str]) -> anyhow::Result<()> {
        let node = self.lab.node(name)?;
        let arguments = format!(
            "/bin/{AGENT} serve --node-name {name} --listen 0.0.0.0:7443 --run-dir /run/slackwater \
             --state-dir {STATE_DIR} --tls-cert {TLS}/tls.crt --tls-key {TLS}/tls.key --tls-ca {TLS}/ca.crt \
             --twin-program {VMM_PROGRAM} --twin-program {QEMU_PROGRAM} \
             --twin-path {GUEST_OUTPUT} --twin-network host"
        );
        let arguments: Vec<&str> = arguments.split_whitespace().chain(more.iter().copied()).collect();
        node.spawn(AGENT, &arguments, &[("SLACKWATER_FAULTS_FILE", FAULTS), ("RUST_BACKTRACE", "1")]).await?;
        node.wait_line(AGENT, "serving", TIMEOUT).await?;
        Ok(())
    }

    /// Kills the agent of a node with every process in its cgroup (SIGKILL), as a supervisor does.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn kill_agent(&self, node: &str) -> anyhow::Result<()> {
        Ok(self.lab.node(node)?.kill_group(AGENT).await?)
    }

    /// Sets the agent's faults, one `name=value` per line; an empty text clears them. The agent needs its
    /// feature `faults`.
    ///
    /// # Errors
    /// When the node cannot be reached.
    pub async fn set_faults(&self, node: &str, faults: &str) -> anyhow::Result<()> {
        // Atomically: the agent reads the file at any time.
        let node = self.lab.node(node)?;
        node.put(&format!("{FAULTS}.new"), 0o600, faults.as_bytes()).await?;
        node.shell(&format!("mv {FAULTS}.new {FAULTS}")).await?;
        Ok(())
    }

    /// Waits until the agent of a node has logged a line with `words` since its last start.
    ///
    /// # Errors
    /// When it does not log it in time, or ends before.
    pub async fn until_agent_says(&self, node: &str, words: &str, limit: Duration) -> anyhow::Result<String> {
        Ok(self.lab.node(node)?.wait_line(AGENT, words, limit).await?)
    }

    /// The log of a node's agents.
    pub async fn agent_log(&self, node: &str) -> String {
        match self.lab.node(node) {
            Ok(node) => node.get_text(&format!("/var/log/{AGENT}.log")).await.unwrap_or_default(),
            Err(error) => error.to_string(),
        }
    }

    /// The description of a node by its agent.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn describe(&self, node: &str) -> anyhow::Result<NodeDescription> {
        let mut client = self.agent_client(node, &self.pki.operator()?).await?;
        Ok(client.describe(DescribeRequest {}).await?.into_inner().node.unwrap_or_default())
    }

    /// The epoch of the leading operator. An agent refuses a call with a lower one; a higher one would lock
    /// that operator out.
    ///
    /// # Errors
    /// When there is no Lease.
    pub async fn operator_epoch(&self) -> anyhow::Result<u64> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), SYSTEM);
        let spec = leases.get(LEASE).await?.spec.unwrap_or_default();
        Ok(u64::try_from(spec.lease_transitions.unwrap_or_default())? + 1)
    }

    /// The reference to the last attempt of a migration, with the epoch of the current leader. Not to be
    /// kept: another operator may lead later.
    ///
    /// # Errors
    /// When it has no UID, or there is no Lease.
    pub async fn reference(&self, migration: &VMMigration) -> anyhow::Result<MigrationRef> {
        let attempt = migration.status.as_ref().and_then(|status| status.attempt).unwrap_or(1);
        Ok(MigrationRef {
            id: migration.uid().context("no UID")?,
            attempt: u32::try_from(attempt)?,
            operator_epoch: self.operator_epoch().await?,
        })
    }

    /// The journal of a node's agent for the last attempt of a migration.
    ///
    /// # Errors
    /// When the agent does not answer, or refuses.
    pub async fn journal_state(&self, node: &str, migration: &VMMigration) -> anyhow::Result<JournalState> {
        let mut client = self.agent_client(node, &self.pki.operator()?).await?;
        let request = ResolveRequest { migration: Some(self.reference(migration).await?), peer: None };
        Ok(client.resolve(request).await?.into_inner().own.unwrap_or_default())
    }
}
