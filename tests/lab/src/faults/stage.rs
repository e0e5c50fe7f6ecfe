//! Two nodes with two devices each and a VM on one of them, ready for the next cell after any end of the last
//! one.

use std::time::Duration;

use anyhow::Context;
use kube::api::{Patch, PatchParams};

use super::matrix::{Cell, VmmKind};
use super::report::Outcome;
use super::scene::{DEVICES, Ends};
use super::{questions, scene};
use crate::cluster::{Cluster, LabVm, QemuVm};
use crate::config::LabConfig;
use crate::node::NodeConfig;

const NODES: [&str; 2] = ["node-a", "node-b"];
/// Slow enough for the kernel's trace of a cell that takes a minute, and fast enough to see the guest count
/// within a second.
const PACE: Duration = Duration::from_millis(40);

fn qemu() -> QemuVm {
    QemuVm::counter(DEVICES).with_migration_events()
}

/// The product on two nodes, with a VM.
pub struct Stage {
    /// The product.
    pub cluster: Cluster,
    /// Where the VM runs. `None`: nowhere.
    home: Option<&'static str>,
    vmm: VmmKind,
    /// Migrations so far: each has a name of its own.
    played: u32,
}

impl Stage {
    /// Starts the product on two nodes.
    ///
    /// # Errors
    /// When a part does not come up.
    pub async fn set(vmm: VmmKind) -> anyhow::Result<Self> {
        let mut config = LabConfig::nodes(NODES.map(|name| NodeConfig::new(name, ["mtty-1"; DEVICES])));
        if vmm == VmmKind::Qemu {
            config = qemu().in_nodes(config)?;
        }
        let cluster = Cluster::start_with(config, "").await?;
        Ok(Self { cluster, home: None, vmm, played: 0 })
    }

    /// Ensures that a VM runs on one node and can move to the other: the current one, or a new one. A device
    /// that hangs is free only when its call has returned.
    ///
    /// # Errors
    /// When none can be started.
    pub async fn ready(&mut self) -> anyhow::Result<Ends> {
        let source = match self.home {
            Some(home) => home,
            None => self.start_vm().await?,
        };
        let destination = if source == NODES[0] { NODES[1] } else { NODES[0] };
        self.cluster.until_free(destination, i32::try_from(DEVICES)?).await?;
        Ok(Ends { source, destination })
    }

    /// A new name for a migration.
    pub fn next_name(&mut self, what: &str) -> String {
        self.played += 1;
        format!("{what}-{}", self.played)
    }

    /// Sets where the VM is now.
    pub fn vm_is_at(&mut self, home: Option<&'static str>) {
        self.home = home;
    }

    async fn start_vm(&mut self) -> anyhow::Result<&'static str> {
        for node in NODES {
            self.remove_remains(node).await?;
        }
        for node in NODES {
            self.cluster.until_free(node, i32::try_from(DEVICES)?).await?;
        }
        let home = NODES[0];
        match self.vmm {
            VmmKind::Contract => {
                LabVm::counter(DEVICES).paced(PACE).start(self.cluster.lab.node(home)?).await?;
            }
            VmmKind::Qemu => self.cluster.start_qemu(qemu(), home).await?,
        }
        self.cluster.until_vm_at(home).await?;
        self.home = Some(home);
        Ok(home)
    }

    /// Removes the processes and the directory of a lost VM, as an administrator would.
    async fn remove_remains(&self, node: &str) -> anyhow::Result<()> {
        for pid in self.cluster.vmms(node).await? {
            self.cluster.lab.node(node)?.kill(pid).await?;
            self.cluster.lab.node(node)?.wait(pid, Duration::from_secs(10)).await?;
        }
        let remove = "rm -rf /run/slackwater/vms/*; for group in /sys/fs/cgroup/slackwater/*/; do \
                      [ ! -d \"$group\" ] || rmdir \"$group\"; done";
        self.cluster.lab.node(node)?.shell(remove).await?;
        Ok(())
    }

    /// Starts again with everything but the nodes and the control plane, after an unexpected end.
    ///
    /// # Errors
    /// When a part does not come up.
    pub async fn rebuild(&mut self) -> anyhow::Result<()> {
        self.home = None;
        self.cluster.lab.control_plane()?.thaw_api_server()?;
        self.cluster.kill_operator().await;
        for node in NODES {
            self.cluster.reconnect(node).await?;
            self.cluster.set_faults(node, "").await?;
            self.cluster.kill_agent(node).await?;
            self.remove_remains(node).await?;
            self.cluster.delete_state(node).await?;
        }
        for node in NODES {
            self.cluster.restart_agent(node).await?;
        }
        self.forget_migrations().await?;
        self.cluster.start_operator().await?;
        Ok(())
    }

    /// Removes every VMMigration, ignoring its finalizers.
    async fn forget_migrations(&self) -> anyhow::Result<()> {
        let api = self.cluster.migrations();
        for migration in api.list(&kube::api::ListParams::default()).await? {
            let name = migration.metadata.name.context("a VMMigration without a name")?;
            let none = serde_json::json!({"metadata": {"finalizers": null}});
            api.patch(&name, &PatchParams::default(), &Patch::Merge(none)).await?;
            api.delete(&name, &kube::api::DeleteParams::default()).await?;
        }
        Ok(())
    }

    /// Plays one cell, asks the three questions, and prepares the next.
    pub async fn play(&mut self, cell: &Cell) -> Outcome {
        let begin = std::time::Instant::now();
        let mut outcome = match self.try_play(cell).await {
            Ok(outcome) => outcome,
            Err(error) => Outcome::without_end(*cell, format!("{error:#}")),
        };
        if !outcome.ok() {
            outcome.evidence = self.evidence(begin.elapsed()).await;
            if let Err(error) = self.rebuild().await {
                outcome.problems.push(format!("and the stage could not be rebuilt: {error:#}"));
            }
        }
        outcome.took = begin.elapsed();
        outcome
    }

    async fn try_play(&mut self, cell: &Cell) -> anyhow::Result<Outcome> {
        let ends = self.ready().await.context("before it began")?;
        let name = self.next_name(&format!("{}-{}", cell.phase.name(), cell.fault.name()));
        let played = scene::play(&mut self.cluster, cell, self.vmm, ends, &name).await?;
        let mut outcome = questions::ask(&self.cluster, cell, ends, &played).await?;
        self.home = outcome.home;
        if let Err(error) = self.cluster.delete(&name).await {
            outcome.problems.push(format!("the VMMigration could not be deleted: {error:#}"));
        }
        Ok(outcome)
    }

    /// The recent logs of all components, to find the cause.
    pub async fn evidence(&self, lately: Duration) -> String {
        let mut text = String::new();
        let lines = 120 + usize::try_from(lately.as_secs()).unwrap_or(0);
        let mut add = |who: &str, log: &str| {
            let all: Vec<&str> = log.lines().collect();
            let last = all.get(all.len().saturating_sub(lines)..).unwrap_or_default();
            text.push_str(&format!("---- {who}\n{}\n", last.join("\n")));
        };
        for node in NODES {
            add(node, &self.cluster.agent_log(node).await);
        }
        add("operator", &self.cluster.operator_log());
        text
    }
}
