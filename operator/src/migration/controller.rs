//! Which VMMigrations need attention: one task for each at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kube::ResourceExt;
use slackwater_api::{Reservation, VMMigration};
use tokio::task::JoinSet;

use super::context::Context;
use super::drive::drive;
use super::status::Draft;
use super::step::{Step, next};
use super::tracked::has_finalizer;
use crate::conditions::Stamp;

/// Brings every VMMigration as far as it goes. Ends when the watch does. Dropping the future leaves the
/// migrations to the agents: the next operator joins them.
pub async fn run(context: Context) {
    let mut migrations = context.migrations.clone();
    if !migrations.ready().await {
        return;
    }
    // Before anything is planned: what an earlier operator has accepted keeps its VM and devices.
    context.claims.restore(migrations.all().iter().map(Arc::as_ref));

    let mut tasks = JoinSet::new();
    // UIDs with a task, and the version of the object for which the last task of each was started. A task's
    // own writes come back through the watch: its end is no reason to start another before something has
    // changed.
    let mut busy: BTreeSet<String> = BTreeSet::new();
    let mut started: BTreeMap<String, Option<String>> = BTreeMap::new();
    loop {
        let objects = migrations.all();
        started.retain(|uid, _| objects.iter().any(|object| object.uid().as_deref() == Some(uid)));
        for object in objects {
            let Some(uid) = object.uid() else { continue };
            let version = object.resource_version();
            if busy.contains(&uid) || started.get(&uid) == Some(&version) || !needs_attention(&object) {
                continue;
            }
            busy.insert(uid.clone());
            started.insert(uid.clone(), version);
            let context = context.clone();
            tasks.spawn(async move {
                drive(context, object).await;
                uid
            });
        }
        tokio::select! {
            alive = migrations.changed() => if !alive { return },
            Some(ended) = tasks.join_next() => match ended {
                Ok(uid) => {
                    busy.remove(&uid);
                }
                Err(error) => tracing::error!(%error, "the task of a migration has failed"),
            },
        }
    }
}

fn needs_attention(migration: &VMMigration) -> bool {
    if migration.metadata.deletion_timestamp.is_some() {
        return has_finalizer(migration);
    }
    let stamp = Stamp { generation: None, now: jiff::Timestamp::UNIX_EPOCH };
    let mut draft = Draft::new(migration, stamp);
    // An earlier operator has not told the agents that it knows the end.
    let not_acknowledged = has_finalizer(migration) && draft.status.reservation != Some(Reservation::Kept);
    next(&draft.status, draft.wish) != Step::Done
        || not_acknowledged
        || draft.note_spec(&migration.spec)
        || draft.unjudged_resolve(&migration.spec).is_some()
}
