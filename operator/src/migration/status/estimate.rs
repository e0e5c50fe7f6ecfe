//! The blackout to come: what the source's VMM expects, and what is allowed.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use slackwater_api::{BlackoutEstimate, MigrationPhase, format_duration};
use slackwater_proto::node::Estimate;

use super::Draft;

impl Draft {
    /// The VMM has reported what it expects, at `unix_ns`. `true`: the status has changed. An estimate that
    /// an agent repeats after it was joined again changes nothing.
    pub fn update_estimate(&mut self, estimate: &Estimate, unix_ns: i64) -> bool {
        // A status keeps microseconds.
        let time = Timestamp::from_microsecond(unix_ns.div_euclid(1000)).unwrap_or(Timestamp::UNIX_EPOCH);
        let known = self.status.estimate.as_ref();
        if self.status.completion_time.is_some() || known.is_some_and(|known| known.time.0 >= time) {
            return false;
        }
        let text = |nanoseconds| format_duration(Duration::from_nanos(nanoseconds));
        let downtime = text(estimate.downtime_ns);
        let allowed = (estimate.allowed_ns > 0).then(|| text(estimate.allowed_ns));
        let known_allowed = known.and_then(|known| known.allowed.as_ref());
        let raised = allowed.clone().filter(|_| known_allowed != allowed.as_ref());
        let time = MicroTime(time);
        self.status.estimate = Some(BlackoutEstimate { downtime: downtime.clone(), allowed, time });
        if let Some(allowed) = raised {
            let budget = self.status.observed_spec.as_ref().map(|spec| spec.downtime_budget.as_str());
            let message = format!(
                "The guest is expected to stand still for {downtime}, and spec.downtimeBudget is {}. Since \
                 spec.onBudgetExceeded is Proceed, up to {allowed} is allowed now.",
                budget.unwrap_or_default()
            );
            if self.status.phase == Some(MigrationPhase::Copying) {
                self.in_progress(&format!("State is being copied; the guest runs. {message}"));
            }
            self.warn("BudgetExceeded", message);
        }
        true
    }
}
