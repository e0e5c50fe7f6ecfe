//! How long an agent may take for what. Nothing that the operator asks an agent is waited for without end.

use std::time::Duration;

/// How long a twin may take to start, where its agent says nothing, or less.
const SHORTEST_TWIN_START: Duration = Duration::from_secs(30);
/// However long an agent says that a twin may take to start. `--twin-start-seconds` has the same limit.
const LONGEST_TWIN_START: Duration = Duration::from_secs(1800);

/// The limits of one operator.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// From the connection to the first report. No plan is made before every agent has reported or failed
    /// once, so this bounds how long one agent holds up the whole cluster.
    pub(super) first_report: Duration,
    /// After a report the agent is not listened to for this long: whatever it sends meanwhile, the newest
    /// counts.
    pub(super) report_pause: Duration,
    /// What Reserve may take besides the start of the twin: a preflight, and devices that go through the
    /// kernel.
    pub(super) reserve_margin: Duration,
    /// Until the attempt has begun: devices have been borrowed and looked at.
    pub(super) migrate: Duration,
    /// Until both ends are connected; the agents' own limits for that add up to less. After the first event
    /// HTTP/2's keep-alive shows that the agent is there.
    pub(super) first_event: Duration,
    /// What is in flight is awaited, and devices that do not come back by themselves are reset.
    pub(super) abort: Duration,
    /// A VMM is ended and devices are reset.
    pub(super) release: Duration,
    /// An agent answers this from its journal.
    pub(super) resolve: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            first_report: Duration::from_secs(10),
            report_pause: Duration::from_millis(250),
            reserve_margin: Duration::from_secs(90),
            migrate: Duration::from_secs(60),
            first_event: Duration::from_secs(120),
            abort: Duration::from_secs(120),
            release: Duration::from_secs(60),
            resolve: Duration::from_secs(5),
        }
    }
}

impl Limits {
    /// How long Reserve may take at an agent that lets a twin take so long to start.
    pub(super) fn reserve(&self, twin_start: Option<Duration>) -> Duration {
        twin_start.unwrap_or_default().clamp(SHORTEST_TWIN_START, LONGEST_TWIN_START) + self.reserve_margin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserve_may_take_as_long_as_the_agent_lets_a_twin_take_and_a_margin_within_bounds() {
        let limit =
            |seconds: Option<u64>| Limits::default().reserve(seconds.map(Duration::from_secs)).as_secs();
        assert_eq!(limit(None), 120);
        assert_eq!(limit(Some(1)), 120);
        assert_eq!(limit(Some(300)), 390);
        assert_eq!(limit(Some(u64::MAX / 1000)), 1890);
    }
}
