//! Judges a migration by the kernels' traces, by the guest, and by what the product reports.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, ensure};
use slackwater_api::VMMigration;
use slackwater_proto::node::{
    DevicePair, MigrateRequest, MigrationEvent, MigrationFeatures, PeerToPeer as WirePolicy, VmRef,
};

use super::{Cluster, NAMESPACE, TIMEOUT, account, has_condition};
use crate::witness::{self, PeerToPeer, State, Trace, Waking, Watch};
use slackwater_reference_vmm::guest::Report;

/// How often the guest is read.
const GUEST_POLL: Duration = Duration::from_millis(100);

/// Two watched nodes, and the guest's report from before the migration.
#[derive(Debug)]
pub struct Watching {
    source: (String, Watch),
    target: (String, Watch),
    /// The guest before the migration.
    pub before: Report,
}

/// The result in figures.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// From the source's last run to the destination's first, nanoseconds, at least.
    pub apart_at_least_ns: i64,
    /// How uncertain the relation of the two nodes' clocks is, nanoseconds.
    pub clock_error_ns: i64,
    /// Arcs into STOP or STOP_COPY that were checked (I2).
    pub stops: usize,
    /// Reads of final data that were checked (I3).
    pub reads: usize,
    /// Arcs out of STOP and into RUNNING that were checked (I4).
    pub wakings: usize,
    /// State changes that the agents report as the kernels saw them.
    pub agreed: usize,
    /// The guest after the migration.
    pub after: Report,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |ns: i64| ns as f64 / 1e6;
        writeln!(
            f,
            "  I1 one runner            source's last run to destination's first: at least {:.2} ms \
             (clocks known to {:.2} ms)",
            ms(self.apart_at_least_ns),
            ms(self.clock_error_ns)
        )?;
        writeln!(f, "  I2 quiesce together      {} stops, each after every device was quiesced", self.stops)?;
        writeln!(
            f,
            "  I3 capture at slack water {} reads of final data, each after all stood still",
            self.reads
        )?;
        writeln!(f, "  I4 wake together         {} wakings, each after all were ready", self.wakings)?;
        write!(f, "  agents' account          {} state changes, as the kernels saw them", self.agreed)
    }
}

impl Cluster {
    /// Starts to watch both ends.
    ///
    /// # Errors
    /// When a node cannot be reached.
    pub async fn watch(&self, source: &str, target: &str) -> anyhow::Result<Watching> {
        let (a, b) = (self.lab.node(source)?, self.lab.node(target)?);
        if let Some(vm) = &self.qemu {
            vm.delete_guest_output(b).await?;
        }
        Ok(Watching {
            before: self.guest(source).await?,
            source: (source.to_owned(), witness::watch(a).await?),
            target: (target.to_owned(), witness::watch(b).await?),
        })
    }

    /// The events of a migration as reported by its source's agent.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn events(&self, migration: &VMMigration) -> anyhow::Result<Vec<MigrationEvent>> {
        let status = migration.status.as_ref().context("no status")?;
        let source = status.source_node.as_deref().context("no source")?;
        let mut client = self.agent_client(source, &self.pki.operator()?).await?;
        let pair = |device: &slackwater_api::DeviceMigration| DevicePair {
            source: device.source.clone(),
            target: device.target.clone(),
            features: Some(MigrationFeatures::default()),
            ..DevicePair::default()
        };
        let request = MigrateRequest {
            migration: Some(self.reference(migration).await?),
            vm: Some(VmRef { namespace: NAMESPACE.to_owned(), name: migration.spec.vm_ref.name.clone() }),
            target_node: status.target_node.clone().context("no target")?,
            target_address: "joins-what-has-begun:1".to_owned(),
            devices: status.devices.iter().map(pair).collect(),
            peer_to_peer: WirePolicy::Required.into(),
            pre_commit_timeout_ms: 1,
            ..MigrateRequest::default()
        };
        let mut stream = client.migrate(request).await?.into_inner();
        let mut events = Vec::new();
        while let Some(response) = stream.message().await? {
            events.extend(response.event);
        }
        Ok(events)
    }

    /// The traces of the VM's devices at both ends.
    async fn testimonies(
        &self,
        watching: &Watching,
        migration: &VMMigration,
    ) -> anyhow::Result<(Trace, Trace)> {
        let devices = &migration.status.as_ref().context("no status")?.devices;
        let (a, b) = (self.lab.node(&watching.source.0)?, self.lab.node(&watching.target.0)?);
        let sources: Vec<&str> = devices.iter().map(|device| device.source.as_str()).collect();
        let targets: Vec<&str> = devices.iter().map(|device| device.target.as_str()).collect();
        let source = watching.source.1.testimony(a).await?.of_devices(&sources)?;
        let target = watching.target.1.testimony(b).await?.of_devices(&targets)?;
        Ok((source, target))
    }

    /// The kernels' traces of all devices at both ends, untouched ones included.
    ///
    /// # Errors
    /// When a node cannot be reached, or anything is missing from its record.
    pub async fn traces(&self, watching: &Watching) -> anyhow::Result<(Trace, Trace)> {
        let (a, b) = (self.lab.node(&watching.source.0)?, self.lab.node(&watching.target.0)?);
        let (mut source, mut target) =
            (watching.source.1.testimony(a).await?, watching.target.1.testimony(b).await?);
        for (node, trace) in [(a, &mut source), (b, &mut target)] {
            for device in node.devices() {
                trace.devices.entry(device.clone()).or_default();
            }
        }
        Ok((source, target))
    }

    /// Judges a migration whose status reports success.
    ///
    /// # Errors
    /// With the invariant, the event or the count that is wrong.
    pub async fn judge_success(
        &self,
        watching: &Watching,
        migration: &VMMigration,
        peer_to_peer: PeerToPeer,
    ) -> anyhow::Result<Verdict> {
        let after = self.continues_at(&watching.target.0, &watching.before).await?;
        let (source, target) = self.testimonies(watching, migration).await?;
        let separation = witness::one_runner(&source, &target)?;
        let stops = witness::quiesced_together(&source, peer_to_peer)?;
        let reads = witness::captured_at_slack_water(&source)?;
        let wakings = witness::woke_together(&target, Waking::AfterLoad, peer_to_peer)?;
        let agreed = self.agents_agree(migration, [&source, &target]).await?;
        let clock_error_ns = source.clock.error_ns() + target.clock.error_ns();
        let apart_at_least_ns = separation.at_least_ns;
        Ok(Verdict { apart_at_least_ns, clock_error_ns, stops, reads, wakings, agreed, after })
    }

    /// Compares the agents' reports with the kernels' traces. Where the agents drive the devices, change by
    /// change.
    async fn agents_agree(&self, migration: &VMMigration, traces: [&Trace; 2]) -> anyhow::Result<usize> {
        let reported = account::read(&self.events(migration).await?)?;
        let mut agreed = 0;
        for trace in traces {
            agreed += match &self.qemu {
                None => account::agrees(&reported, trace)?,
                Some(_) => account::in_order(&reported, trace)?,
            };
        }
        ensure!(agreed > 0, "the agents reported no state change");
        Ok(agreed)
    }

    /// Judges a migration whose status reports a rollback: the VM runs at the source, every device is in
    /// RUNNING, and nothing ever ran at the destination.
    ///
    /// # Errors
    /// With the invariant, the event or the count that is wrong.
    pub async fn judge_rollback(
        &self,
        watching: &Watching,
        migration: &VMMigration,
    ) -> anyhow::Result<Report> {
        let after = self.continues_at(&watching.source.0, &watching.before).await?;
        let (source, target) = self.testimonies(watching, migration).await?;
        let conditions = migration.status.as_ref().map(|status| status.conditions.as_slice());
        // A migration that was aborted while the guest ran has stopped nothing.
        if has_condition(conditions.unwrap_or_default(), "Stopped", "True") == Some(true) {
            witness::quiesced_together(&source, PeerToPeer::Required)?;
            witness::captured_at_slack_water(&source)?;
            witness::woke_together(&source, Waking::AfterRollback, PeerToPeer::Required)?;
        }
        witness::never_ran(&target)?;
        for device in source.devices.keys() {
            let end = source.final_state(device);
            ensure!(end == Some(State::Running), "{device} is in {end:?} at the source, not in RUNNING");
        }
        Ok(after)
    }

    /// Checks that the guest continues to count at a node from where it was, without an error, and that no
    /// other node keeps a VMM of it. An abandoned twin may take a moment to end; whether it ever ran is
    /// judged by the kernels' traces.
    ///
    /// # Errors
    /// When it does not count, found an error, or another VMM remains.
    pub async fn continues_at(&self, node: &str, before: &Report) -> anyhow::Result<Report> {
        let deadline = tokio::time::Instant::now() + TIMEOUT;
        let first = self.guest(node).await?;
        ensure!(
            first.count >= before.count,
            "the guest has gone back from {} to {}",
            before.count,
            first.count
        );
        let mut last = first.clone();
        while last.count <= first.count || last.count <= before.count {
            ensure!(tokio::time::Instant::now() < deadline, "the guest does not count beyond {}", last.count);
            tokio::time::sleep(GUEST_POLL).await;
            last = self.guest(node).await?;
        }
        ensure!(last.errors == before.errors, "the guest found errors: {last:?}");
        for other in self.lab.nodes().iter().filter(|other| other.name() != node) {
            while self.guest(other.name()).await.is_ok() {
                let now = tokio::time::Instant::now();
                ensure!(now < deadline, "a VMM remains on {}", other.name());
                tokio::time::sleep(GUEST_POLL).await;
            }
        }
        Ok(last)
    }
}
