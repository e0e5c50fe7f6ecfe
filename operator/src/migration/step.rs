//! What comes next for a VMMigration: a pure function of its status, so that a restarted operator goes on
//! where the last one stopped.
//!
//! ```text
//!                 refused, cancelled ───────────────────────────────────────────▶ Done
//!  (nothing) ─ Plan ─▶ Requested ─ Reserve ─▶ Held ─ Migrate ─▶ Used ──────────▶ Done
//!      ▲                   │                   │ └─ lost ─▶ Kept ──────────────▶ Done
//!      │            failed │       rolled back │
//!      │                   ▼                   ▼
//!      │     ReleasingNeverStarted   ReleasingAbortedAtSource ─ Release ─▶ Released ─▶ Done
//!      └──────────────────────── Retry, while attempts remain ────────────────┘
//! ```
//! Each state is written to the API server **before** the call that it is about. So `Requested` says that the
//! source has not been asked for anything, and only that makes it true to tell the target `NEVER_STARTED`.

use slackwater_api::{Reservation, VMMigration, VMMigrationStatus};
use slackwater_proto::node::ReleaseReason;
use strum::VariantArray;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Plan it, or refuse it.
    Plan,
    /// Ask the target to reserve.
    Reserve,
    /// It was cancelled or deleted while nothing was under way: nothing has to be reserved any more.
    GiveUp,
    /// Ask the source to migrate, or join the migration that it is busy with.
    Migrate,
    /// Ask the target to give back what it reserved.
    Release(ReleaseReason),
    /// Plan the next attempt, when it is time.
    Retry,
    /// Nothing.
    Done,
}

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray)]
pub enum Wish {
    /// The migration is to be carried out.
    Migrate,
    /// The migration is to be given up: it was cancelled.
    Cancel,
    /// The migration is to be given up, and nothing is to be left of it: it was deleted.
    Delete,
}

impl Wish {
    /// Why a migration is given up, for a sentence.
    pub fn why_given_up(self) -> &'static str {
        match self {
            Self::Delete => "the VMMigration was deleted",
            Self::Cancel | Self::Migrate => "spec.cancel was set to true",
        }
    }
}

/// Decides what comes next.
pub fn next(status: &VMMigrationStatus, wish: Wish) -> Step {
    let ended = status.completion_time.is_some();
    match status.reservation {
        None if ended || wish == Wish::Delete => Step::Done,
        None if wish == Wish::Cancel => Step::GiveUp,
        None => Step::Plan,
        Some(Reservation::Requested) if wish != Wish::Migrate => Step::GiveUp,
        Some(Reservation::Requested) => Step::Reserve,
        Some(Reservation::Held) => Step::Migrate,
        Some(Reservation::ReleasingNeverStarted) => Step::Release(ReleaseReason::NeverStarted),
        Some(Reservation::ReleasingAbortedAtSource) => Step::Release(ReleaseReason::AbortedAtSource),
        Some(Reservation::Released) if ended => Step::Done,
        Some(Reservation::Released) if wish != Wish::Migrate => Step::GiveUp,
        Some(Reservation::Released) => Step::Retry,
        // Version 0.1.0 treated a doubt as an end.
        Some(Reservation::Kept) if !ended => Step::Migrate,
        Some(Reservation::Used | Reservation::Kept) => Step::Done,
    }
}

/// The migration has been accepted, and its VM and the devices at the target still belong to it.
pub fn holds_claim(status: &VMMigrationStatus) -> bool {
    match status.reservation {
        None | Some(Reservation::Used) => false,
        // Another attempt follows.
        Some(Reservation::Released) => status.completion_time.is_none(),
        Some(
            Reservation::Requested
            | Reservation::Held
            | Reservation::ReleasingNeverStarted
            | Reservation::ReleasingAbortedAtSource
            | Reservation::Kept,
        ) => true,
    }
}

/// Takes away what nobody asks for once a migration has ended: there may be many of them.
pub fn forget_details(migration: &mut VMMigration) {
    migration.metadata.annotations = None;
    let Some(status) = &mut migration.status else { return };
    if status.completion_time.is_some() && !holds_claim(status) {
        status.timeline = Vec::new();
        status.devices = Vec::new();
        status.attempts = Vec::new();
        status.timings = None;
        status.estimate = None;
        for condition in &mut status.conditions {
            condition.message = String::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(reservation: Reservation) -> VMMigrationStatus {
        VMMigrationStatus { reservation: Some(reservation), ..Default::default() }
    }

    fn ended(reservation: Option<Reservation>) -> VMMigrationStatus {
        let completion_time =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
        VMMigrationStatus { reservation, completion_time, ..Default::default() }
    }

    #[test]
    fn a_deleted_or_cancelled_migration_is_neither_planned_nor_reserved() {
        assert_eq!(next(&VMMigrationStatus::default(), Wish::Delete), Step::Done);
        assert_eq!(next(&VMMigrationStatus::default(), Wish::Cancel), Step::GiveUp);
        for wish in [Wish::Delete, Wish::Cancel] {
            assert_eq!(next(&with(Reservation::Requested), wish), Step::GiveUp);
            assert_eq!(next(&with(Reservation::Released), wish), Step::GiveUp);
        }
    }

    #[test]
    fn once_the_source_may_have_been_asked_the_target_is_not_told_never_started() {
        for wish in Wish::VARIANTS.iter().copied() {
            assert_eq!(next(&with(Reservation::Held), wish), Step::Migrate);
        }
    }

    #[test]
    fn a_doubt_that_an_older_operator_left_is_taken_up_again() {
        assert_eq!(next(&with(Reservation::Kept), Wish::Migrate), Step::Migrate);
        assert_eq!(next(&ended(Some(Reservation::Kept)), Wish::Migrate), Step::Done);
        assert!(holds_claim(&with(Reservation::Kept)));
    }

    #[test]
    fn between_two_attempts_the_vm_stays_claimed() {
        assert_eq!(next(&with(Reservation::Released), Wish::Migrate), Step::Retry);
        assert!(holds_claim(&with(Reservation::Released)));
        assert_eq!(next(&ended(Some(Reservation::Released)), Wish::Migrate), Step::Done);
        assert!(!holds_claim(&ended(Some(Reservation::Released))));
    }
}
