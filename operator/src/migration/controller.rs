//! Which VMMigrations need attention: one task for each at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::ResourceExt;
use slackwater_api::VMMigration;
use tokio::task::JoinSet;

use super::claims::Claims;
use super::fact::{self, Draft};
use super::run::{Run, has_finalizer};
use super::step::{Step, next};
use crate::cluster::{Cluster, Observed};
use crate::conditions::Stamp;
use crate::fleet::Fleet;
use crate::plan::Checks;

/// What a migration needs around it.
#[derive(Clone)]
pub struct Surroundings {
    /// The API server.
    pub cluster: Cluster,
    /// All VMMigrations.
    pub migrations: Observed<VMMigration>,
    /// All agents.
    pub fleet: Arc<Fleet>,
    /// What is spoken for.
    pub claims: Arc<Claims>,
    /// The planner's checks.
    pub checks: Checks,
}

/// Brings every VMMigration as far as it goes. Ends when the watch does. Dropping the future leaves the migrations to the
/// agents: the next operator joins them.
pub async fn run(surroundings: Surroundings) {
    let mut migrations = surroundings.migrations.clone();
    if !migrations.ready().await {
        return;
    }
    // Before anything is planned: what an earlier operator has accepted is spoken for.
    surroundings.claims.restore(migrations.all().iter().map(Arc::as_ref));

    let mut tasks = JoinSet::new();
    // UIDs with a task, and the version of the object for which the last task of each was started. A task's own writes come
    // back through the watch: its end is no reason to start another before something has changed.
    let mut busy: BTreeMap<String, ()> = BTreeMap::new();
    let mut started: BTreeMap<String, Option<String>> = BTreeMap::new();
    loop {
        let objects = migrations.all();
        started.retain(|uid, _| objects.iter().any(|object| object.uid().as_deref() == Some(uid)));
        for object in objects {
            let Some(uid) = object.uid() else { continue };
            let version = object.resource_version();
            if busy.contains_key(&uid) || started.get(&uid) == Some(&version) || !needs_attention(&object) {
                continue;
            }
            busy.insert(uid.clone(), ());
            started.insert(uid.clone(), version);
            let run = Run::new(surroundings.clone(), object);
            tasks.spawn(async move {
                run.bring_to_its_end().await;
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
    let mut draft = Draft::new(migration);
    let stamp = Stamp { generation: None, now: jiff::Timestamp::UNIX_EPOCH };
    next(&draft.status, draft.wish) != Step::Done
        || fact::spec_changed(&mut draft, &migration.spec, stamp)
        || fact::unjudged(&draft, &migration.spec).is_some()
}
