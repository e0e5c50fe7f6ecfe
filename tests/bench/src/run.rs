//! The rounds: two nodes, one VM of each size, moved back and forth by both movers in turns.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use slackwater_api::VMMigration;
use slackwater_node_agent::vmm::budget::DEFAULT_BANDWIDTH;

use super::marks::{Blackout, DestinationMarks, SourceMarks};
use super::measurement::{Measurement, Mover, QemuTimes, ReportedTimes, steps};
use slackwater_lab::cluster::{Cluster, QemuVm, TIMEOUT, has_condition};
use slackwater_lab::witness::Trace;
use slackwater_lab::{LabConfig, Node, NodeConfig};

const NODES: [&str; 2] = ["node-a", "node-b"];
/// The port of QEMU's plain migration, on the link between the nodes.
const PLAIN_PORT: u16 = 4444;
/// Capabilities that are on at both ends of a plain migration.
const PLAIN_ON: [&str; 2] = ["events", "return-path"];
/// And off: the product leaves them on in a QEMU that it has moved.
const PLAIN_OFF: [&str; 3] = ["pause-before-switchover", "switchover-ack", "late-block-activate"];

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The VM. `sizes` replaces its number of devices.
    pub vm: QemuVm,
    /// Numbers of devices.
    pub sizes: Vec<usize>,
    /// How often each mover moves each VM.
    pub rounds: usize,
    /// `downtime-limit`, or `spec.downtimeBudget`, milliseconds.
    pub downtime_limit_ms: u32,
}

/// Two nodes with a VM that both movers can move.
pub struct Bench {
    cluster: Cluster,
    plan: Plan,
    most: usize,
    migrations: u32,
}

/// The direction of a migration.
#[derive(Clone, Copy)]
struct Route {
    from: &'static str,
    to: &'static str,
}

/// The times of one migration.
struct Times {
    kernels: Blackout,
    qemu: QemuTimes,
    total_ms: f64,
    reported: Option<ReportedTimes>,
}

impl Route {
    fn back(self) -> Self {
        Self { from: self.to, to: self.from }
    }
}

/// The order of the movers in a round. It alternates, so that neither mover always has the same direction or
/// always comes first.
fn order(round: usize) -> [Mover; 2] {
    if round.is_multiple_of(2) { [Mover::Product, Mover::Plain] } else { [Mover::Plain, Mover::Product] }
}

impl Bench {
    /// Starts lab and product.
    ///
    /// # Errors
    /// When a part does not come up.
    pub async fn start(plan: Plan) -> anyhow::Result<Self> {
        let most = plan.sizes.iter().copied().max().context("no number of devices was given")?;
        let config = LabConfig::nodes(NODES.map(|name| NodeConfig::new(name, vec!["mtty-1"; most])));
        let cluster = Cluster::start_with(plan.vm.in_nodes(config)?, "").await?;
        Ok(Self { cluster, plan, most, migrations: 0 })
    }

    /// Measures the VM with this number of devices, and passes each measurement to `report`.
    ///
    /// # Errors
    /// When a migration fails, or cannot be measured.
    pub async fn measure(
        &mut self,
        devices: usize,
        mut report: impl FnMut(Measurement),
    ) -> anyhow::Result<()> {
        let mut route = Route { from: NODES[0], to: NODES[1] };
        let vm = QemuVm { devices, ..self.plan.vm.clone() }.with_second_monitor();
        self.cluster.start_qemu(vm, route.from).await?;
        for round in 1..=self.plan.rounds {
            for mover in order(round) {
                let measured = match mover {
                    Mover::Plain => self.plain(route, devices).await,
                    Mover::Product => self.product(route, devices).await,
                };
                let Times { kernels, qemu, total_ms, reported } =
                    measured.with_context(|| format!("{devices} devices, round {round}, {mover:?}"))?;
                let from = route.from.to_owned();
                report(Measurement { mover, devices, round, from, kernels, qemu, total_ms, reported });
                route = route.back();
            }
        }
        self.cluster.kill_vmm(route.from).await?;
        Ok(self.cluster.qemu()?.forget(self.node(route.from)?).await?)
    }

    fn node(&self, name: &str) -> anyhow::Result<&Node> {
        Ok(self.cluster.lab.node(name)?)
    }

    /// What the kernels saw of the VM's devices at both ends.
    async fn traces(
        &self,
        watching: &slackwater_lab::cluster::Watching,
        route: Route,
        devices: usize,
    ) -> anyhow::Result<[Trace; 2]> {
        let (source, destination) = self.cluster.traces(watching).await?;
        let names =
            |node: &str| anyhow::Ok(self.node(node)?.devices().get(..devices).context("too few devices")?);
        Ok([source.of_devices(names(route.from)?)?, destination.of_devices(names(route.to)?)?])
    }

    async fn plain(&self, route: Route, devices: usize) -> anyhow::Result<Times> {
        let (vm, from, to) = (self.cluster.qemu()?, self.node(route.from)?, self.node(route.to)?);
        // Its agent must know the VM, so that it notices from the end of its process that the devices are
        // free.
        self.cluster.until_vm_at(route.from).await?;
        let watching = self.cluster.watch(route.from, route.to).await?;
        let begin = Instant::now();
        vm.await_migration_and_run(to).await?;
        let capability = |names: &[&str], state: bool| -> Vec<Value> {
            names.iter().map(|name| json!({"capability": name, "state": state})).collect()
        };
        let capabilities = [capability(&PLAIN_ON, true), capability(&PLAIN_OFF, false)].concat();
        for node in [from, to] {
            vm.execute(node, "migrate-set-capabilities", json!({ "capabilities": capabilities })).await?;
        }
        let parameters = json!({
            "downtime-limit": self.plan.downtime_limit_ms,
            "max-bandwidth": DEFAULT_BANDWIDTH,
            "avail-switchover-bandwidth": DEFAULT_BANDWIDTH,
        });
        vm.execute(from, "migrate-set-parameters", parameters).await?;
        let uri = format!("tcp:{}:{PLAIN_PORT}", to.link_address().ip());
        vm.execute(to, "migrate-incoming", json!({ "uri": uri })).await?;
        // No polling meanwhile: an emulated processor has no time for it.
        let command = ["slackwater-lab-node", "qmp-migrate", &vm.monitor(), &uri];
        let answer = from.exec_for(&command, b"", TIMEOUT).await?.success()?;
        let qemu = QemuTimes::from_answer(&serde_json::from_str(&answer)?)?;
        let status = vm.execute(to, "query-status", json!({})).await?;
        ensure!(
            status.get("status") == Some(&json!("running")),
            "the destination's QEMU does not run: {status}"
        );
        let total_ms = milliseconds(begin.elapsed());
        let [source, destination] = self.traces(&watching, route, devices).await?;
        let kernels = Blackout::of(&source, &destination)?;
        vm.execute(from, "quit", json!({})).await?;
        vm.forget(from).await?;
        self.cluster.continues_at(route.to, &watching.before).await?;
        vm.publish(to).await?;
        Ok(Times { kernels, qemu, total_ms, reported: None })
    }

    async fn product(&mut self, route: Route, devices: usize) -> anyhow::Result<Times> {
        self.migrations += 1;
        let name = format!("bench-{}", self.migrations);
        self.cluster.until_vm_at(route.from).await?;
        self.cluster.until_free(route.to, i32::try_from(self.most)?).await?;
        let watching = self.cluster.watch(route.from, route.to).await?;
        let (to, limit) = (route.to, self.plan.downtime_limit_ms);
        let begin = Instant::now();
        self.cluster
            .migrate(&name, &format!("target: {{nodeName: {to}}}, downtimeBudget: {limit}ms"))
            .await?;
        let migration = self.cluster.until_ended(&name).await?;
        let total_ms = milliseconds(begin.elapsed());
        let conditions =
            migration.status.as_ref().map(|status| status.conditions.clone()).unwrap_or_default();
        let succeeded = has_condition(&conditions, "Succeeded", "True") == Some(true);
        ensure!(succeeded, "the migration did not succeed: {conditions:#?}");
        let [source, destination] = self.traces(&watching, route, devices).await?;
        let kernels = Blackout::of(&source, &destination)?;
        let qemu = QemuTimes::from_log(&self.cluster.agent_log(route.from).await)?;
        let reported = self.reported(&migration, &source, &destination).await?;
        self.cluster.continues_at(route.to, &watching.before).await?;
        Ok(Times { kernels, qemu, total_ms, reported: Some(reported) })
    }

    async fn reported(
        &self,
        migration: &VMMigration,
        source: &Trace,
        destination: &Trace,
    ) -> anyhow::Result<ReportedTimes> {
        let status = migration.status.as_ref().context("no status")?;
        let timings = status.timings.as_ref().context("the status has no timings")?;
        let events = self.cluster.events(migration).await?;
        let (source, destination) = (SourceMarks::of(source)?, DestinationMarks::of(destination)?);
        Ok(ReportedTimes {
            blackout_ms: duration_ms(&timings.blackout)?,
            total_ms: duration_ms(&timings.total)?,
            steps_ms: steps(&events, &source, &destination)?,
        })
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// A duration of the status, `87.412ms` or `2.013s`, in milliseconds. The API's own parser accepts no
/// fractions.
fn duration_ms(text: &str) -> anyhow::Result<f64> {
    let read = [("ms", 1.0), ("s", 1e3)].iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
        Some(number * factor)
    });
    read.with_context(|| {
        format!("{text:?} is not a duration of the status: expected one like 87.412ms or 2.013s")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mover_has_both_directions_and_comes_first_equally_often() {
        let sequence: Vec<Mover> = (1..=4).flat_map(order).collect();
        let there = sequence.iter().step_by(2).filter(|mover| **mover == Mover::Plain).count();
        assert_eq!(there, 2, "of four migrations in one direction two are plain's: {sequence:?}");
        assert_eq!(order(1), [Mover::Plain, Mover::Product]);
        assert_eq!(order(2), [Mover::Product, Mover::Plain]);
    }

    #[test]
    fn durations_of_the_status_are_read_in_their_units() {
        use slackwater_api::format_duration;

        for ms in [87.412, 2013.0, 0.0, 1000.0, 999.999] {
            let text = format_duration(Duration::from_secs_f64(ms / 1e3));
            assert!((duration_ms(&text).unwrap() - ms).abs() < 1e-3, "{text}");
        }
        assert!(duration_ms("1m5s").is_err());
    }
}
