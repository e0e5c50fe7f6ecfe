//! One VMMigration as its task follows it: what the watch says about it, its status under construction, and
//! writing the status and the finalizer.
//!
//! What must survive a crash is written before it is acted upon, and that write is repeated until the API
//! server takes it. Progress is written when that works.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use slackwater_api::{
    ACCEPTED_AS_ANNOTATION, MIGRATION_FINALIZER, VMMigration, VMMigrationSpec, VMMigrationStatus,
};

use super::context::Context;
use super::request::Accepted;
use super::status::{Draft, wish_of};
use super::step::Wish;
use crate::backoff::{Backoff, Pauses};
use crate::cluster::{Follower, ObjectKey, Seen, WriteError};
use crate::conditions::Stamp;

/// Before a call to the API server or to an agent is repeated.
pub(super) const RETRY_PAUSES: Pauses = Pauses::new(Duration::from_millis(500), Duration::from_secs(10));
/// The shortest pause, even where an agent has something new to say: an agent that comes and goes must not be
/// asked in a tight loop.
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);

/// A VMMigration, and what its task has found out about it.
pub(super) struct TrackedMigration {
    context: Context,
    pub(super) uid: String,
    key: ObjectKey,
    /// As it was seen last.
    object: Arc<VMMigration>,
    changes: Follower<VMMigration>,
    /// The object is not there any more, finalizer or not.
    gone: bool,
    draft: Draft,
    /// The object has, or may have, our finalizer.
    finalizer: bool,
    /// The UID of the object of which this one is a copy.
    original: Option<String>,
    /// The status in the API server, as far as this task has written it.
    written: VMMigrationStatus,
}

impl TrackedMigration {
    pub(super) fn new(context: Context, object: Arc<VMMigration>) -> Self {
        let draft = Draft::new(&object, stamp_of(&object));
        let key = ObjectKey::of(object.as_ref());
        Self {
            changes: context.migrations.follow(&key),
            key,
            context,
            uid: object.uid().unwrap_or_default(),
            written: draft.status.clone(),
            draft,
            finalizer: has_finalizer(&object),
            original: None,
            object,
            gone: false,
        }
    }

    /// Begins with what the API server has now: the watch can be behind what an earlier task, or an earlier
    /// operator, has written. `false`: the object is gone.
    pub(super) async fn read_again(&mut self) -> bool {
        let mut backoff = RETRY_PAUSES.begin();
        loop {
            match self.context.cluster.migration(&self.object).await {
                Ok(object) => {
                    self.draft = Draft::new(&object, stamp_of(&object));
                    self.written = self.draft.status.clone();
                    self.finalizer = has_finalizer(&object);
                    self.original = object.annotations().get(ACCEPTED_AS_ANNOTATION).cloned();
                    self.original.take_if(|uid| *uid == self.uid);
                    self.object = Arc::new(object);
                    return true;
                }
                Err(WriteError::Gone) => return false,
                Err(error) => {
                    tracing::warn!(
                        migration = self.name(),
                        %error,
                        "a VMMigration could not be read; trying again"
                    );
                    self.rest(&mut backoff).await;
                }
            }
        }
    }

    /// Takes over what the watch says about the object.
    pub(super) fn look(&mut self) {
        match self.context.migrations.see(&self.key) {
            Seen::There(seen) if seen.uid().as_deref() == Some(&self.uid) => self.object = seen,
            // What this task knows about it is right, and it will be written.
            Seen::Unreadable { uid } if uid.as_deref() == Some(&self.uid) => {}
            Seen::There(_) | Seen::Unreadable { .. } | Seen::Gone => {
                self.gone = true;
                // As the controller does, and after anything that this task may have claimed since.
                self.context.claims.release(&self.uid);
            }
        }
        let wish = if self.gone { Wish::Delete } else { wish_of(&self.object) };
        // A cancel cannot be taken back.
        if !(self.draft.wish == Wish::Cancel && wish == Wish::Migrate) {
            self.draft.wish = wish;
        }
    }

    /// Returns when the object has changed since the last call. To be followed by [`look`](Self::look).
    pub(super) async fn changed(&mut self) {
        self.changes.changed().await;
    }

    pub(super) fn spec(&self) -> &VMMigrationSpec {
        &self.object.spec
    }

    pub(super) fn object_name(&self) -> String {
        self.object.name_any()
    }

    pub(super) fn namespace(&self) -> String {
        self.object.namespace().unwrap_or_default()
    }

    /// namespace/name, for the log.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.namespace(), self.object_name())
    }

    /// A user has removed the finalizer of a migration that is in doubt, and takes it from here.
    pub(super) fn is_forgotten(&self) -> bool {
        self.gone && self.draft.is_in_doubt()
    }

    /// The object is not there any more: its finalizer was removed by hand, or it never had one.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.gone || self.object.metadata.deletion_timestamp.is_some()
    }

    /// The status so far.
    pub(super) fn draft(&self) -> &Draft {
        &self.draft
    }

    /// The status, for what becomes known now.
    pub(super) fn draft_now(&mut self) -> &mut Draft {
        self.draft.at(stamp_of(&self.object))
    }

    /// What the agents are asked, by the status. `None`: the status is not that of an accepted migration.
    pub(super) fn accepted(&self) -> Option<Accepted> {
        Accepted::read(&self.namespace(), &self.uid, &self.draft.status)
    }

    /// The API server has the whole status.
    pub(super) fn is_written(&self) -> bool {
        self.draft.status == self.written
    }

    /// The status says "accepted" and not what: something else has written to it.
    pub(super) async fn give_up_unreadable(&mut self) {
        self.draft_now().status_unreadable();
        self.write().await;
    }

    /// Waits until it is time to try again, or until the agents have something new to say.
    pub(super) async fn rest(&self, backoff: &mut Backoff) {
        let mut changes = self.context.fleet.changes();
        tokio::select! {
            () = tokio::time::sleep(backoff.next_pause()) => {}
            () = async { tokio::join!(changes.next(), tokio::time::sleep(SHORTEST_PAUSE)); } => {}
        }
    }

    /// Writes what has become known, again and again until the API server takes it.
    pub(super) async fn write(&mut self) {
        let mut backoff = RETRY_PAUSES.begin();
        while !self.try_write().await {
            self.rest(&mut backoff).await;
        }
    }

    /// Writes what has become known, if that works now; otherwise a later write takes it along.
    pub(super) async fn write_progress(&mut self) {
        self.try_write().await;
    }

    async fn try_write(&mut self) -> bool {
        if !self.gone && !self.is_written() {
            match self.context.cluster.write_migration_status(&self.object, &self.draft.status).await {
                Ok(()) => self.written = self.draft.status.clone(),
                Err(WriteError::Gone) => self.gone = true,
                Err(error) => {
                    tracing::warn!(
                        migration = self.name(),
                        %error,
                        "the status of a VMMigration could not be written"
                    );
                    return false;
                }
            }
        }
        for notice in std::mem::take(&mut self.draft.notices) {
            tracing::info!(migration = self.name(), reason = notice.reason, "{}", notice.note);
            if !self.gone {
                self.context.cluster.report(self.object.as_ref(), "Migrate", &notice).await;
            }
        }
        true
    }

    /// Refuses the object if it is a copy of another one. `true`: the status has changed.
    pub(super) fn refuse_copy(&mut self) -> bool {
        match self.original.take() {
            Some(original) if self.draft.status.completion_time.is_none() => {
                self.draft_now().refuse_copy(&original);
                true
            }
            _ => false,
        }
    }

    /// Puts our finalizer on the object, or takes it away. `false`: the object is gone.
    pub(super) async fn write_finalizer(&mut self, present: bool) -> bool {
        let mut backoff = RETRY_PAUSES.begin();
        while !self.gone {
            if present == self.finalizer {
                return true;
            }
            let written = match present {
                true => self.context.cluster.add_finalizer(&self.object).await,
                false => self.context.cluster.remove_finalizer(&self.object).await,
            };
            match written {
                Ok(()) => self.finalizer = present,
                Err(WriteError::Gone) => self.gone = true,
                Err(error) => {
                    tracing::warn!(
                        migration = self.name(),
                        %error,
                        "the finalizer could not be written; trying again"
                    );
                    self.rest(&mut backoff).await;
                }
            }
        }
        false
    }
}

fn stamp_of(object: &VMMigration) -> Stamp {
    Stamp { generation: object.metadata.generation, now: Timestamp::now() }
}

/// The object has our finalizer.
pub(super) fn has_finalizer(migration: &VMMigration) -> bool {
    migration.finalizers().iter().any(|finalizer| finalizer == MIGRATION_FINALIZER)
}
