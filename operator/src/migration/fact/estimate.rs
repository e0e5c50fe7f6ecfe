//! Facts about the blackout to come: what the source's VMM expects of it, and what is allowed.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use slackwater_api::{BlackoutEstimate, MigrationPhase, format_duration};
use slackwater_proto::node::Estimate;

use super::Draft;
use super::events::in_progress;
use crate::conditions::Stamp;

/// The VMM has told what it expects, at `unix_ns`. `true`: the status has been changed. What is told again by an agent that is joined
/// again changes nothing.
pub fn estimated(draft: &mut Draft, estimate: &Estimate, unix_ns: i64, stamp: Stamp) -> bool {
    // A status keeps microseconds.
    let time = Timestamp::from_microsecond(unix_ns.div_euclid(1000)).unwrap_or(Timestamp::UNIX_EPOCH);
    let known = draft.status.estimate.as_ref();
    if draft.status.completion_time.is_some() || known.is_some_and(|known| known.time.0 >= time) {
        return false;
    }
    let text = |nanoseconds| format_duration(Duration::from_nanos(nanoseconds));
    let downtime = text(estimate.downtime_ns);
    let allowed = (estimate.allowed_ns > 0).then(|| text(estimate.allowed_ns));
    let raised =
        allowed.clone().filter(|_| known.and_then(|known| known.allowed.as_ref()) != allowed.as_ref());
    draft.status.estimate =
        Some(BlackoutEstimate { downtime: downtime.clone(), allowed, time: MicroTime(time) });
    if let Some(allowed) = raised {
        let budget = draft.status.observed_spec.as_ref().map(|spec| spec.downtime_budget.as_str());
        let message = format!(
            "The guest is expected to stand still for {downtime}, and spec.downtimeBudget is {}. Since spec.onBudgetExceeded is \
             Proceed, up to {allowed} is allowed now.",
            budget.unwrap_or_default()
        );
        if draft.status.phase == Some(MigrationPhase::Copying) {
            in_progress(draft, &format!("State is being copied; the guest runs. {message}"), stamp);
        }
        draft.tell(true, "BudgetExceeded", message);
    }
    true
}
