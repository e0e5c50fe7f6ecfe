//! What the source's agent reports while the migration runs.

use slackwater_api::MigrationPhase;
use slackwater_api::condition::{COMMITTED, STOPPED, SUCCEEDED};
use slackwater_proto::node::Phase;

use super::Draft;
use crate::conditions::Status;
use crate::migration::trace::{Trace, is_shown, phase_name};
use crate::reason;

impl Draft {
    /// The timeline does not show that phase yet. An agent that is joined again repeats those that it shows.
    pub fn is_new(&self, phase: Phase, node: &str) -> bool {
        !is_shown(&self.status.timeline, &phase_name(phase.into()), node)
    }

    /// The migration has come to a phase that was not shown yet. `true`: the status is worth writing now.
    pub fn reach(&mut self, phase: Phase, trace: &Trace) -> bool {
        if self.status.completion_time.is_some() {
            return false;
        }
        self.show_timeline(trace);
        let summary = match phase {
            Phase::Connected | Phase::PreCopy => MigrationPhase::Copying,
            Phase::Pausing | Phase::Quiescing | Phase::Stopping | Phase::Capturing | Phase::Loaded => {
                MigrationPhase::Stopped
            }
            Phase::Committed | Phase::Starting | Phase::Started | Phase::Released => MigrationPhase::Starting,
            Phase::Unspecified | Phase::RollingBack | Phase::RolledBack => return false,
        };
        // A migration that is being given up keeps saying so, unless it is committed all the same.
        if self.status.phase != Some(MigrationPhase::Aborting) || summary == MigrationPhase::Starting {
            self.status.phase = Some(summary);
        }
        match phase {
            Phase::PreCopy => {
                self.in_progress("State is being copied; the guest runs.");
                true
            }
            Phase::Capturing => {
                self.guest_stopped();
                self.in_progress("The guest stands still; the final state is on its way.");
                true
            }
            Phase::Committed => {
                self.source_committed();
                let message = format!("The VM is being started on {}.", self.target());
                self.in_progress(&message);
                true
            }
            _ => false,
        }
    }

    /// An agent that is needed cannot be reached just now; it is tried again.
    pub fn agent_unreachable(&mut self, message: &str) {
        // A doubt has more to say than this.
        if self.is(SUCCEEDED, Status::Unknown) && !self.is_in_doubt() {
            self.set(SUCCEEDED, Status::Unknown, "AgentUnreachable", message);
        }
    }

    pub(super) fn in_progress(&mut self, message: &str) {
        if self.status.phase != Some(MigrationPhase::Aborting) {
            self.set(SUCCEEDED, Status::Unknown, reason::IN_PROGRESS, message);
        }
    }

    pub(super) fn guest_stopped(&mut self) {
        let message = "Every vCPU and every device has been read back as stopped at the source.";
        self.set(STOPPED, Status::True, "SlackWater", message);
    }

    pub(super) fn source_committed(&mut self) {
        let message = format!(
            "{} holds all of the VM, verified; {} has passed its point of no return.",
            self.target(),
            self.source()
        );
        self.set(COMMITTED, Status::True, "PointOfNoReturn", &message);
    }

    /// Shows what the agents have reported so far.
    pub(super) fn show_timeline(&mut self, trace: &Trace) {
        self.status.timeline = trace.timeline(&self.status.timeline);
    }
}
