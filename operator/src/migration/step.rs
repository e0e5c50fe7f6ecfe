//! What comes next for a VMMigration: a pure function of its status, so that a restarted operator goes on where the last
//! one stopped.
//!
//! ```text
//!                 refused ──────────────────────────────────────────────────▶ Done
//!  (nothing) ─ Plan ─▶ Requested ─ Reserve ─▶ Held ─ Migrate ─▶ Used ───────▶ Done
//!                          │                   │ └─ in doubt, lost ─▶ Kept ─▶ Done
//!                   failed │       rolled back │
//!                          ▼                   ▼
//!            ReleasingNeverStarted   ReleasingAbortedAtSource ─ Release ─▶ Released ─▶ Done
//! ```
//! Each state is written to the API server **before** the call that it is about. So `Requested` says that the source has
//! not been asked for anything, and that is what makes `NEVER_STARTED` a true word to the target.

use slackwater_api::{Reservation, VMMigrationStatus};
use slackwater_proto::node::ReleaseReason;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Plan it, or refuse it.
    Plan,
    /// Ask the target to reserve.
    Reserve,
    /// It was deleted before the source was asked: nothing has to be reserved any more.
    GiveUp,
    /// Ask the source to migrate, or join the migration that it is busy with.
    Migrate,
    /// Ask the target to give back what it reserved.
    Release(ReleaseReason),
    /// Nothing.
    Done,
}

/// Decides what comes next. `deleting`: somebody has deleted the object.
pub fn next(status: &VMMigrationStatus, deleting: bool) -> Step {
    match status.reservation {
        None if deleting || status.completion_time.is_some() => Step::Done,
        None => Step::Plan,
        Some(Reservation::Requested) if deleting => Step::GiveUp,
        Some(Reservation::Requested) => Step::Reserve,
        Some(Reservation::Held) => Step::Migrate,
        Some(Reservation::ReleasingNeverStarted) => Step::Release(ReleaseReason::NeverStarted),
        Some(Reservation::ReleasingAbortedAtSource) => Step::Release(ReleaseReason::AbortedAtSource),
        Some(Reservation::Released | Reservation::Used | Reservation::Kept) => Step::Done,
    }
}

/// The migration has been accepted, and its VM and the devices at the target are still spoken for.
pub fn holds_claim(status: &VMMigrationStatus) -> bool {
    match status.reservation {
        None | Some(Reservation::Released | Reservation::Used) => false,
        Some(
            Reservation::Requested
            | Reservation::Held
            | Reservation::ReleasingNeverStarted
            | Reservation::ReleasingAbortedAtSource
            | Reservation::Kept,
        ) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(reservation: Reservation) -> VMMigrationStatus {
        VMMigrationStatus { reservation: Some(reservation), ..Default::default() }
    }

    #[test]
    fn a_deleted_migration_is_never_planned_nor_reserved_for() {
        assert_eq!(next(&VMMigrationStatus::default(), true), Step::Done);
        assert_eq!(next(&with(Reservation::Requested), true), Step::GiveUp);
    }

    #[test]
    fn after_the_source_may_have_been_asked_the_target_never_hears_never_started() {
        for deleting in [false, true] {
            assert_eq!(next(&with(Reservation::Held), deleting), Step::Migrate);
        }
    }

    #[test]
    fn what_is_in_doubt_keeps_its_vm_from_being_migrated_again() {
        assert_eq!(next(&with(Reservation::Kept), false), Step::Done);
        assert!(holds_claim(&with(Reservation::Kept)));
    }
}
