//! Plays one cell: the migration is halted at its phase, the fault is injected, the migration continues, and
//! the fault is undone.

use std::time::Duration;

use anyhow::Context;
use kube::{Api, ResourceExt};
use slackwater_api::{MigrationNode, VMMigration};

use super::matrix::{Cell, Expected, Fault, Phase, Side, VmmKind};
use crate::cluster::{Cluster, DamagedFile, TIMEOUT, Watching, has_condition};

/// Devices of each node, and of the VM.
pub const DEVICES: usize = 2;
/// How long a device hangs, and how long the API server does not answer.
const A_WHILE: Duration = Duration::from_secs(30);

/// The two ends of the next migration.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Where the VM runs.
    pub source: &'static str,
    /// Where it is to go.
    pub destination: &'static str,
}

impl Ends {
    /// The node at one end.
    #[must_use]
    pub fn at(self, side: Side) -> &'static str {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }
}

/// A migration that has ended.
#[derive(Debug)]
pub struct Played {
    /// As it ended.
    pub migration: VMMigration,
    /// As it was when its end, or the doubt about it, was first seen.
    pub decided: VMMigration,
    /// Both nodes' witnesses, and the guest before.
    pub watching: Watching,
    /// The files of a journal that could not be read for a while.
    pub damaged: Vec<DamagedFile>,
}

/// Plays a cell. When this returns, the fault has been undone, also after an error.
///
/// # Errors
/// When the phase is not reached, or the migration does not end.
pub async fn play(
    cluster: &mut Cluster,
    cell: &Cell,
    vmm: VmmKind,
    ends: Ends,
    name: &str,
) -> anyhow::Result<Played> {
    let mut scene = Scene { cluster, cell, vmm, ends, name, damaged: Vec::new() };
    let played = scene.play().await;
    scene.undo().await.context("the fault could not be undone")?;
    played
}

struct Scene<'a> {
    cluster: &'a mut Cluster,
    cell: &'a Cell,
    vmm: VmmKind,
    ends: Ends,
    name: &'a str,
    damaged: Vec<DamagedFile>,
}

impl Scene<'_> {
    async fn play(&mut self) -> anyhow::Result<Played> {
        let watching = self.cluster.watch(self.ends.source, self.ends.destination).await?;
        let halted = self.prepare().await?;
        // A device that hangs for good while the guest runs: nobody waits five minutes for that.
        let in_time = match (self.cell.fault, self.cell.phase) {
            (Fault::DeviceHangsForGood, Phase::Save) => ", preCommitTimeout: 40s",
            _ => "",
        };
        let spec = format!("target: {{nodeName: {}}}{in_time}", self.ends.destination);
        self.cluster.migrate(self.name, &spec).await?;
        if let Some((node, words)) = halted {
            let at_phase = self.cluster.until_agent_says(node, &words, TIMEOUT).await;
            if at_phase.is_err() {
                let now = self
                    .cluster
                    .migrations()
                    .get_opt(self.name)
                    .await?
                    .and_then(|migration| migration.status);
                at_phase.with_context(|| format!("the phase was not reached; the status is {now:#?}"))?;
            }
        }
        self.inject().await?;
        let decided = self.until_decided().await?;
        self.end_fault().await?;
        let migration = self.cluster.until_ended(self.name).await?;
        let damaged = std::mem::take(&mut self.damaged);
        Ok(Played { migration, decided, watching, damaged })
    }

    /// Sets the agents' faults. Returns the node at which the migration will halt, and what its agent logs
    /// then.
    async fn prepare(&mut self) -> anyhow::Result<Option<(&'static str, String)>> {
        let (side, phase) = self.cell.phase.halt();
        match (self.cell.fault, self.cell.phase.device_call(self.vmm)) {
            (Fault::DeviceError | Fault::DeviceHang | Fault::DeviceHangsForGood, Some((side, call))) => {
                let node = self.ends.at(side);
                // The second device fails; the first works.
                let device = self.cluster.lab.node(node)?.devices().last().context("no device")?;
                let fault = match self.cell.fault {
                    Fault::DeviceError => format!("device.error={call}@{device}\n"),
                    Fault::DeviceHangsForGood => format!("device.hang={call}:forever@{device}\n"),
                    _ => format!("device.hang={call}:{}@{device}\n", A_WHILE.as_secs()),
                };
                self.cluster.set_faults(node, &fault).await?;
                Ok(None)
            }
            (Fault::JournalFull(side), _) if self.cell.phase == Phase::Reserve => {
                self.cluster.fill_state_disk(self.ends.at(side)).await?;
                Ok(None)
            }
            _ => {
                let node = self.ends.at(side);
                let halt = format!("{phase} {}", self.name);
                self.cluster.set_faults(node, &format!("halt.{}={halt}\n", side.name())).await?;
                Ok(Some((node, format!("halted at {halt}"))))
            }
        }
    }

    /// Lets the migration continue.
    async fn go_on(&self) -> anyhow::Result<()> {
        for node in [self.ends.source, self.ends.destination] {
            self.cluster.set_faults(node, "").await?;
        }
        Ok(())
    }

    async fn inject(&mut self) -> anyhow::Result<()> {
        let Ends { source, destination } = self.ends;
        match self.cell.fault {
            Fault::AgentKilled(side) => {
                let node = self.ends.at(side);
                self.cluster.kill_agent(node).await?;
                if (side, self.cell.phase) == (Side::Source, Phase::Reserve) {
                    // It must be back before the operator's next request to it.
                    self.until_ready(node, "False").await?;
                    self.cluster.restart_agent(node).await?;
                    self.until_ready(node, "True").await?;
                    return self.go_on().await;
                }
                self.go_on().await?;
                self.cluster.restart_agent(node).await
            }
            Fault::OperatorKilled => {
                self.cluster.kill_operator().await;
                self.go_on().await?;
                self.cluster.start_operator().await
            }
            Fault::SourceVmmKilled => {
                self.cluster.kill_vmm(source).await?;
                self.go_on().await
            }
            Fault::TwinKilled => {
                self.cluster.kill_vmm(destination).await?;
                self.go_on().await
            }
            Fault::LinkCutAndRestored => {
                self.cluster.isolate(destination).await?;
                self.go_on().await
            }
            Fault::LinkCutForGood => {
                self.cluster.lab.cut_link(destination).await?;
                self.go_on().await
            }
            Fault::JournalFull(side) => {
                if self.cell.phase != Phase::Reserve {
                    self.cluster.fill_state_disk(self.ends.at(side)).await?;
                }
                self.go_on().await
            }
            Fault::JournalCorrupted(side) => {
                let node = self.ends.at(side);
                let uid = self.cluster.migrations().get(self.name).await?.uid().context("no UID")?;
                self.cluster.kill_agent(node).await?;
                self.go_on().await?;
                self.damaged = self.cluster.damage_journal(node, &uid).await?;
                self.cluster.restart_agent(node).await
            }
            // Set before the migration began.
            Fault::DeviceError | Fault::DeviceHang | Fault::DeviceHangsForGood => Ok(()),
            Fault::ApiServerAway => {
                self.cluster.lab.control_plane()?.freeze_api_server()?;
                self.go_on().await?;
                tokio::time::sleep(A_WHILE).await;
                self.cluster.lab.control_plane()?.thaw_api_server()?;
                Ok(())
            }
        }
    }

    async fn until_ready(&self, node: &str, status: &'static str) -> anyhow::Result<MigrationNode> {
        let api = Api::all(self.cluster.client.clone());
        self.cluster
            .until(api, node, &format!("Ready={status}"), move |node: &MigrationNode| {
                has_condition(&node.status.as_ref()?.conditions, "Ready", status)
            })
            .await
    }

    /// Waits until it has ended or is in doubt. Where a journal was damaged, the doubt must name the file.
    async fn until_decided(&mut self) -> anyhow::Result<VMMigration> {
        let api = self.cluster.migrations();
        let names_a_file = matches!(self.cell.fault, Fault::JournalCorrupted(_));
        // A slow target is in doubt before the device is named.
        let names_a_device = self.cell.fault == Fault::DeviceHangsForGood;
        self.cluster
            .until(api, self.name, "an end, or doubt", move |migration: &VMMigration| {
                let conditions = &migration.status.as_ref()?.conditions;
                let named = |message: &str| message.contains(".source") || message.contains(".destination");
                let doubt = conditions.iter().any(|condition| {
                    let in_doubt = condition.type_ == "InDoubt" && condition.status == "True";
                    in_doubt
                        && (!names_a_file || named(&condition.message))
                        && (!names_a_device || condition.reason == "DeviceHangs")
                });
                let ended = ["True", "False"]
                    .iter()
                    .any(|status| has_condition(conditions, "Succeeded", status) == Some(true));
                Some(doubt || ended)
            })
            .await
    }

    /// Ends a fault that keeps the migration in doubt.
    async fn end_fault(&mut self) -> anyhow::Result<()> {
        match self.cell.fault {
            Fault::LinkCutAndRestored => self.cluster.reconnect(self.ends.destination).await,
            Fault::DeviceHangsForGood => self.go_on().await,
            Fault::JournalFull(side) => self.cluster.empty_state_disk(self.ends.at(side)).await,
            Fault::JournalCorrupted(side) => {
                let node = self.ends.at(side);
                self.cluster.kill_agent(node).await?;
                self.cluster.restore_journal(node, &self.damaged).await?;
                self.cluster.restart_agent(node).await
            }
            _ => Ok(()),
        }
    }

    /// Removes what is left of the fault.
    async fn undo(&mut self) -> anyhow::Result<()> {
        self.cluster.lab.control_plane()?.thaw_api_server()?;
        self.go_on().await?;
        match self.cell.fault {
            Fault::LinkCutAndRestored | Fault::LinkCutForGood => {
                self.cluster.reconnect(self.ends.destination).await?;
            }
            Fault::JournalFull(side) => self.cluster.empty_state_disk(self.ends.at(side)).await?,
            _ => {}
        }
        if !self.cluster.has_operator() {
            self.cluster.start_operator().await?;
        }
        Ok(())
    }
}

impl Cell {
    /// Whether the migration must have been in doubt.
    #[must_use]
    pub fn must_be_in_doubt(&self) -> bool {
        matches!(self.expected, Expected::InDoubtUntil(..))
    }
}
