//! What a VMMigration's status says: a [`Draft`] with a method for each thing that can become known about a
//! migration.
//!
//! `(status, what became known) -> (status, notices)`, without Kubernetes, gRPC or a clock. A notice becomes
//! a Kubernetes event: that it was accepted, how it ended, and what a user did not expect. All between has a
//! condition with a time, and no event. The draft knows its stamp: when the next thing became known, and about which
//! generation of the spec.
//!
//! An agent that the operator joins again repeats all of its events from the start. What the status shows
//! already changes nothing and gives no second notice.
//!
//! | file | what it is about |
//! |---|---|
//! | `prepare` | planning and reserving |
//! | `progress` | what the source's agent reports while the migration runs |
//! | `estimate` | the blackout to come |
//! | `abort` | a cancel or a deletion, and what becomes of it |
//! | `doubt` | what keeps a migration from going on, and what would help |
//! | `resolve` | `spec.resolve` |
//! | `outcome` | how a migration ended |
//! | `release` | giving the target's reservation back |
//! | `attempts` | which attempts have ended, and whether another one follows |
//! | `spec` | changes of the spec after it was accepted |

mod abort;
mod attempts;
mod doubt;
mod estimate;
mod outcome;
mod prepare;
mod progress;
mod release;
mod resolve;
mod spec;
#[cfg(test)]
mod tests;

use slackwater_api::condition::{COMMITTED, IN_DOUBT, RESOLVE_ACCEPTED};
use slackwater_api::{VMMigration, VMMigrationSpec, VMMigrationStatus};

use super::step::Wish;
use crate::conditions::{self, Finding, Stamp, Status};
use crate::notice::Notice;

pub use doubt::Doubtful;
pub use resolve::{ResolveRefusal, end_of};

/// A status under construction.
#[derive(Debug, Clone)]
pub struct Draft {
    /// namespace/name of the VM, for messages.
    pub vm: String,
    /// The status so far.
    pub status: VMMigrationStatus,
    /// What is to be reported to the user, oldest first.
    pub notices: Vec<Notice>,
    /// What its user wants, as far as that is known.
    pub wish: Wish,
    /// The spec as it was when this began.
    spec: VMMigrationSpec,
    /// When the next thing became known.
    stamp: Stamp,
}

/// What the user wants of an object.
pub fn wish_of(migration: &VMMigration) -> Wish {
    let observed = migration.status.as_ref().and_then(|status| status.observed_spec.as_ref());
    if migration.metadata.deletion_timestamp.is_some() {
        Wish::Delete
    } else if migration.spec.cancel || observed.is_some_and(|spec| spec.cancel) {
        // A cancel cannot be taken back, and an API server before 1.25 lets a user try.
        Wish::Cancel
    } else {
        Wish::Migrate
    }
}

impl Draft {
    /// Begins with what an object's status says.
    pub fn new(migration: &VMMigration, stamp: Stamp) -> Self {
        let namespace = migration.metadata.namespace.as_deref().unwrap_or_default();
        Self {
            vm: format!("{namespace}/{}", migration.spec.vm_ref.name),
            status: migration.status.clone().unwrap_or_default(),
            notices: Vec::new(),
            wish: wish_of(migration),
            spec: migration.spec.clone(),
            stamp,
        }
    }

    /// The same draft, for what became known then.
    pub fn at(&mut self, stamp: Stamp) -> &mut Self {
        self.stamp = stamp;
        self
    }

    /// The condition InDoubt is True.
    pub fn is_in_doubt(&self) -> bool {
        self.is(IN_DOUBT, Status::True)
    }

    /// The source is known to have passed its point of no return.
    pub fn is_committed(&self) -> bool {
        self.is(COMMITTED, Status::True)
    }

    /// An administrator's statement has been accepted.
    pub fn is_resolved(&self) -> bool {
        self.is(RESOLVE_ACCEPTED, Status::True)
    }

    /// Sets a condition. `true`: its status has changed.
    fn set(&mut self, type_: &str, status: Status, reason: &str, message: &str) -> bool {
        self.status.observed_generation = self.stamp.generation;
        let finding = Finding::new(status, reason, message);
        conditions::set(&mut self.status.conditions, type_, &finding, self.stamp)
    }

    fn is(&self, type_: &str, status: Status) -> bool {
        conditions::is(&self.status.conditions, type_, status)
    }

    fn has_reason(&self, type_: &str, reason: &str) -> bool {
        conditions::has_reason(&self.status.conditions, type_, reason)
    }

    fn report(&mut self, reason: &'static str, note: String) {
        self.notices.push(Notice { warning: false, reason, note });
    }

    fn warn(&mut self, reason: &'static str, note: String) {
        self.notices.push(Notice { warning: true, reason, note });
    }

    fn source(&self) -> String {
        self.status.source_node.clone().unwrap_or_default()
    }

    fn target(&self) -> String {
        self.status.target_node.clone().unwrap_or_default()
    }

    /// Why the migration is given up, for a sentence.
    fn why_given_up(&self) -> &'static str {
        self.wish.why_given_up()
    }
}
