//! How long a phase before the commit may last. After the commit nothing times out: it is reported as slow.

use std::time::Duration;

use slackwater_handover::source::Phase;

/// STARTED mostly comes within this time after COMMIT. Later than that, the source reports a slow
/// destination.
pub(super) const START_EXPECTED: Duration = Duration::from_secs(10);

/// The limit of a phase of the source. None: `preCommitTimeout` alone bounds it, or nothing does.
///
/// Pre-copy and capture move data, and how much is not known here. The others are a few calls to the VMM and
/// to devices, whose drivers take hundreds of milliseconds at worst (mlx5); their limits leave room for a
/// loaded node.
pub(super) fn of(phase: Phase) -> Option<Duration> {
    match phase {
        Phase::Saving => Some(Duration::from_secs(30)),
        Phase::Connecting => Some(Duration::from_secs(30)),
        Phase::Pausing => Some(Duration::from_secs(20)),
        // A device that hangs is named before: `vfio::worker::HANGS_AFTER`.
        Phase::Quiescing | Phase::Stopping => Some(Duration::from_secs(30)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_phase_from_the_commit_on_is_bounded() {
        for phase in
            [Phase::Committing, Phase::AwaitingStarted, Phase::Releasing, Phase::Settling, Phase::Waking]
        {
            assert_eq!(of(phase), None, "{phase:?}");
        }
    }
}
