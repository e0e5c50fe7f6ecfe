//! Supervising QEMU while it copies a running VM: its limits by the budget and the wire, and giving the
//! migration up. convergence.rs and throughput.rs decide.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::{debug, info};

use super::super::VmmError;
use super::super::budget::{Budget, BudgetExceeded, Copying};
use super::convergence::{Convergence, Sample, Verdict};
use super::owner::Stops;
use super::qmp::commands::{MigrateSetParameters, QueryMigrate};
use super::qmp::{MigrationStatus, QmpError};
use super::throughput::{Counted, Throughput};
use super::{QemuVmm, from_qmp};

/// Interval of the samples of QEMU's copying.
const SAMPLE_EVERY: Duration = Duration::from_millis(500);
/// How long a sample waits for a device's estimate of its state.
const ESTIMATE_LIMIT: Duration = Duration::from_secs(1);

impl QemuVmm {
    /// Sets the blackout that QEMU aims for, and the bandwidth that it may assume for that.
    pub(super) async fn limit(&self, call: &'static str, budget: Budget) -> Result<(), VmmError> {
        let parameters = MigrateSetParameters {
            max_bandwidth: Some(budget.bandwidth_bytes_per_second),
            avail_switchover_bandwidth: self.switchover_bandwidth(&Throughput::new(&budget)),
            ..downtime_limit(budget.downtime)
        };
        self.qmp.execute(parameters).await.map(drop).map_err(|error| from_qmp(call, error))
    }

    /// None if QEMU has no such parameter: it uses the bandwidth that it measures at its own socket.
    fn switchover_bandwidth(&self, wire: &Throughput) -> Option<u64> {
        self.qmp.version().qemu.at_least(8, 2).then_some(wire.bytes_per_second())
    }

    /// Sets the bandwidth that QEMU assumes to the measured one.
    async fn set_bandwidth(&self, wire: &Throughput) -> Result<(), QmpError> {
        let Some(bandwidth) = self.switchover_bandwidth(wire) else { return Ok(()) };
        debug!(pid = self.server.pid(), bandwidth, "the wire carries this many bytes per second");
        let parameters = MigrateSetParameters {
            avail_switchover_bandwidth: Some(bandwidth),
            ..MigrateSetParameters::default()
        };
        self.qmp.execute(parameters).await.map(drop)
    }

    /// A sample of the copying; None if QEMU does not answer.
    async fn sample(&self, copy: &Copying, began: Instant) -> Option<Sample> {
        let info = match self.qmp.execute(QueryMigrate).await {
            Ok(info) => info,
            Err(error) => {
                debug!(%error, "QEMU does not report its progress");
                return None;
            }
        };
        let (mut device_bytes, mut unknown) = (0_u64, 0_u64);
        for device in &copy.devices {
            match timeout(ESTIMATE_LIMIT, device.estimate_bytes()).await {
                Ok(Ok(Some(bytes))) => device_bytes = device_bytes.saturating_add(bytes),
                Ok(Ok(None)) => unknown += 1,
                Ok(Err(error)) => debug!(%error, "a device does not report the size of its state"),
                Err(_) => {
                    debug!(device = device.name(), "a device does not report the size of its state in time")
                }
            }
        }
        Sample::from_info(&info, copy.budget, began.elapsed(), device_bytes, unknown)
    }

    /// Waits until QEMU has stopped the VM, or the migration must be given up.
    pub(super) async fn copy_until_stopped(&self, copy: Copying) -> Result<(), VmmError> {
        let call = "migrate";
        let mut events = self.since_save.lock().take().unwrap_or_else(|| self.qmp.events());
        let mut stops = Stops::default();
        let stopped = self.until(call, |status| *status == MigrationStatus::PreSwitchover);
        tokio::pin!(stopped);
        let mut course = Convergence::new(copy.budget);
        let mut wire = Throughput::new(&copy.budget);
        let began = Instant::now();
        let mut ticks = interval(SAMPLE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let next_sample = async {
                ticks.tick().await;
                (self.sample(&copy, began).await, self.status(call).await)
            };
            tokio::pin!(next_sample);
            let (sample, status) = loop {
                tokio::select! {
                    biased;
                    stopped = &mut stopped => {
                        // The events that came before this answer.
                        while let Some(notice) = events.next_that_came() {
                            stops.hear(&notice);
                        }
                        return stopped.and_then(|_| stayed(stops));
                    }
                    Some(notice) = events.next() => {
                        stops.hear(&notice);
                        stayed(stops)?;
                    }
                    answers = &mut next_sample => break answers,
                }
            };
            // QEMU may be too busy to answer, or the events may have been missed.
            if let Ok(status) = status {
                stops.seen(&status);
                stayed(stops)?;
            }
            let Some(sample) = sample else { continue };
            let counted = Counted {
                elapsed: sample.elapsed,
                bytes: copy.flow.bytes(),
                waited: copy.flow.waited(),
                first_pass: sample.in_first_pass(),
            };
            if wire.step(counted) {
                self.set_bandwidth(&wire).await.map_err(|error| from_qmp(call, error))?;
            }
            let step = course.step(sample, wire.bytes_per_second());
            if let Some(estimate) = step.report {
                // It fails if the receiver has gone, which does not matter here.
                let _ = copy.estimates.send(estimate);
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
                    raised.map_err(|error| from_qmp(call, error))?;
                }
                Verdict::GiveUp(exceeded) => {
                    let without_size = without_size(&copy).await;
                    return Err(VmmError::BudgetExceeded(BudgetExceeded { without_size, ..exceeded }));
                }
            }
        }
    }
}

/// The devices whose drivers do not say how large their state is.
async fn without_size(copy: &Copying) -> Vec<String> {
    let mut names = Vec::new();
    for device in &copy.devices {
        if let Ok(Ok(None)) = timeout(ESTIMATE_LIMIT, device.estimate_bytes()).await {
            names.push(device.name().to_owned());
        }
    }
    names
}

/// Nobody but QEMU has stopped the VM.
fn stayed(stops: Stops) -> Result<(), VmmError> {
    stops.by_others().map_or(Ok(()), |state| Err(VmmError::VmStopped { state }))
}

fn downtime_limit(limit: Duration) -> MigrateSetParameters {
    let downtime_limit_ms = u64::try_from(limit.as_millis()).ok();
    MigrateSetParameters { downtime_limit_ms, ..MigrateSetParameters::default() }
}
