//! Watching over QEMU while it copies a VM that runs: what it is told of the budget and of the wire, and when it is told to stop trying.
//! What to do is decided in convergence.rs and throughput.rs.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, info};

use super::super::VmmError;
use super::super::budget::{Budget, Copying};
use super::convergence::{Convergence, Sample, Verdict};
use super::qmp::commands::{MigrateSetParameters, QueryMigrate};
use super::qmp::{MigrationStatus, QmpError};
use super::throughput::{Counted, Throughput};
use super::{QemuVmm, of_qmp};

/// How often it is looked at whether QEMU's copying comes to an end.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl QemuVmm {
    /// The blackout that QEMU aims for, and what it may assume of the wire for that.
    pub(super) async fn limit(&self, call: &'static str, budget: Budget) -> Result<(), VmmError> {
        let parameters = MigrateSetParameters {
            max_bandwidth: Some(budget.bandwidth_bytes_per_second),
            avail_switchover_bandwidth: self.switchover_bandwidth(&Throughput::new(&budget)),
            ..downtime_limit(budget.downtime)
        };
        self.qmp.execute(parameters).await.map(drop).map_err(|error| of_qmp(call, error))
    }

    /// None where QEMU knows of no such parameter, and goes by what it measures at its own socket.
    fn switchover_bandwidth(&self, wire: &Throughput) -> Option<u64> {
        self.qmp.version().qemu.at_least(8, 2).then_some(wire.bytes_per_second())
    }

    /// Has QEMU reckon with what the wire has turned out to carry.
    async fn reckon_with(&self, wire: &Throughput) -> Result<(), QmpError> {
        let Some(bandwidth) = self.switchover_bandwidth(wire) else { return Ok(()) };
        debug!(pid = self.server.pid(), bandwidth, "the wire carries so many bytes per second");
        let parameters = MigrateSetParameters {
            avail_switchover_bandwidth: Some(bandwidth),
            ..MigrateSetParameters::default()
        };
        self.qmp.execute(parameters).await.map(drop)
    }

    /// How far the copying is; None when there is nothing to go by.
    async fn look(&self, copy: &Copying, began: Instant) -> Option<Sample> {
        let info = match self.qmp.execute(QueryMigrate).await {
            Ok(info) => info,
            Err(error) => {
                debug!(%error, "QEMU does not tell how far it is");
                return None;
            }
        };
        let mut device_bytes: u64 = 0;
        for device in &copy.devices {
            match device.estimate_bytes().await {
                Ok(bytes) => device_bytes = device_bytes.saturating_add(bytes),
                Err(error) => debug!(%error, "a device does not tell how much state it has"),
            }
        }
        Sample::of(&info, copy.budget, began.elapsed(), device_bytes)
    }

    /// Waits until QEMU has stopped the VM, or is not to any more.
    pub(super) async fn copy_until_it_stands(&self, copy: Copying) -> Result<(), VmmError> {
        let call = "migrate";
        let stands = self.until(call, |status| *status == MigrationStatus::PreSwitchover);
        tokio::pin!(stands);
        let mut course = Convergence::new(copy.budget);
        let mut wire = Throughput::new(&copy.budget);
        let began = Instant::now();
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let look = async {
                looks.tick().await;
                self.look(&copy, began).await
            };
            let sample = tokio::select! {
                biased;
                stands = &mut stands => return stands.map(drop),
                sample = look => sample,
            };
            let Some(sample) = sample else { continue };
            let counted = Counted {
                elapsed: sample.elapsed,
                bytes: copy.flow.bytes(),
                waited: copy.flow.waited(),
                first_pass: sample.in_first_pass(),
            };
            if wire.step(counted) {
                self.reckon_with(&wire).await.map_err(|error| of_qmp(call, error))?;
            }
            let step = course.step(sample, wire.bytes_per_second());
            if let Some(estimate) = step.tell {
                // That nobody listens does not matter to QEMU.
                let _ = copy.tell.send(estimate);
            }
            match step.verdict {
                Verdict::GoOn => {}
                Verdict::Raise(limit) => {
                    info!(
                        pid = self.server.pid(),
                        ?limit,
                        "QEMU does not keep to the budget, and may take longer"
                    );
                    let raised = self.qmp.execute(downtime_limit(limit)).await;
                    raised.map_err(|error| of_qmp(call, error))?;
                }
                Verdict::GiveUp(exceeded) => return Err(VmmError::BudgetExceeded(exceeded)),
            }
        }
    }
}

fn downtime_limit(limit: Duration) -> MigrateSetParameters {
    let downtime_limit_ms = u64::try_from(limit.as_millis()).ok();
    MigrateSetParameters { downtime_limit_ms, ..MigrateSetParameters::default() }
}
