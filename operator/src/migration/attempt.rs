//! What this task knows about one attempt of a migration. When another attempt begins, it is replaced as a
//! whole.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use slackwater_handover::resolver::Decision;
use tokio::time::Instant;

use super::inquiry::Inquiry;
use super::trace::Trace;

/// What is known about one attempt, beyond what its status says.
#[derive(Default)]
pub(super) struct Attempt {
    /// Asking both ends, as long as the attempt does not go on by itself.
    pub(super) inquiry: Inquiry,
    /// The events that the source's agent has reported.
    pub(super) trace: Trace,
    /// This task has reserved, so it knows that the source was never asked.
    pub(super) source_never_asked: bool,
    /// The source has said that the attempt cannot be given up any more.
    pub(super) abort_too_late: bool,
    /// The source has given the attempt up, and only has to report how it ended.
    pub(super) given_up: bool,
    /// When the one that follows begins, by this process's clock, and the time in the status that this stands for.
    pub(super) next: Option<(Option<Time>, Instant)>,
    /// What an administrator has decided. It is acted upon when the API server has it.
    pub(super) decided: Option<Decision>,
}
