//! Which VMMigrations need attention: one task for each at a time.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use kube::ResourceExt;
use slackwater_api::{Reservation, VMMigration};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::agenda::{Agenda, Item, Need};
use super::context::Context;
use super::drive::drive;
use super::status::Draft;
use super::step::{Step, next};
use super::tracked::has_finalizer;
use crate::backoff::Pauses;
use crate::cluster::{ObjectKey, Seen};
use crate::conditions::Stamp;

/// How many new migrations are planned at a time. Those that are under way already do not count.
const PLANNED_AT_A_TIME: usize = 16;
/// Before a migration is taken up again whose task has panicked.
const PANIC_PAUSES: Pauses = Pauses::new(Duration::from_secs(1), Duration::from_secs(300));

/// Brings every VMMigration as far as it goes. Ends when the watch does. Dropping the future leaves the
/// migrations to the agents: the next operator joins them.
pub async fn run(context: Context) {
    context.migrations.ready().await;
    // Before anything is planned: what an earlier operator has accepted keeps its VM and devices.
    context.claims.restore(context.migrations.all().iter().map(Arc::as_ref));

    let mut changes = context.migrations.changes();
    let mut agenda = Agenda::default();
    let turns = Arc::new(Semaphore::new(PLANNED_AT_A_TIME));
    let mut tasks = JoinSet::new();
    loop {
        let look = |agenda: &mut Agenda, key: &ObjectKey| match context.migrations.see(key) {
            Seen::Gone => {
                release_claim(&context, agenda.replaced(key, None));
                agenda.look(key, None);
                None
            }
            Seen::Unreadable { .. } => None,
            Seen::There(object) => {
                release_claim(&context, agenda.replaced(key, object.metadata.uid.as_deref()));
                agenda.look(key, item(&object)).then_some(object)
            }
        };
        tokio::select! {
            changed = changes.next() => {
                let Some(changed) = changed else { return };
                for key in changed {
                    if let Some(object) = look(&mut agenda, &key) {
                        tasks.spawn(task(context.clone(), object, None));
                    }
                }
            }
            Some(ended) = tasks.join_next() => match ended {
                Ok(Ended { key, uid }) => {
                    agenda.ended(&uid);
                    if let Some(object) = look(&mut agenda, &key) {
                        tasks.spawn(task(context.clone(), object, None));
                    }
                }
                Err(error) => tracing::error!(%error, "the task of a migration was ended"),
            },
            Ok(turn) = Arc::clone(&turns).acquire_owned(), if agenda.is_waited_for() => {
                let next = agenda.next_turn();
                if let Some(object) = next.and_then(|key| context.migrations.get(&key)) {
                    tasks.spawn(task(context.clone(), object, Some(turn)));
                }
            }
        }
    }
}

/// Without an object nobody could find out what locks the VM. What the agents hold, they report.
fn release_claim(context: &Context, gone: Option<&str>) {
    if let Some(uid) = gone {
        context.claims.release(uid);
    }
}

/// The task of a migration is over.
struct Ended {
    key: ObjectKey,
    uid: String,
}

/// Brings a migration as far as it goes, and takes it up again if that panics.
async fn task(context: Context, object: Arc<VMMigration>, mut turn: Option<OwnedSemaphorePermit>) -> Ended {
    let (key, uid) = (ObjectKey::of(object.as_ref()), object.uid().unwrap_or_default());
    let drive = || drive(context.clone(), Arc::clone(&object), turn.take());
    again_after_panics(&key.to_string(), PANIC_PAUSES, drive).await;
    Ended { key, uid }
}

/// Runs what `begin` returns to its end: again after a pause, as often as it panics.
async fn again_after_panics<T, F: Future<Output = T>>(
    migration: &str,
    pauses: Pauses,
    mut begin: impl FnMut() -> F,
) -> T {
    let mut backoff = pauses.begin();
    loop {
        // All that it leaves behind is in the API server, at the agents, and in the claims, which it takes and
        // gives up as a whole.
        match AssertUnwindSafe(async { begin().await }).catch_unwind().await {
            Ok(value) => return value,
            Err(panic) => {
                let pause = backoff.next_pause();
                tracing::error!(
                    migration,
                    panic = words(panic.as_ref()),
                    pause_s = pause.as_secs_f64(),
                    "the task of a migration has panicked, which is a fault of the operator; it is taken up again"
                );
                tokio::time::sleep(pause).await;
            }
        }
    }
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn item(migration: &VMMigration) -> Option<Item> {
    let created = migration.metadata.creation_timestamp.as_ref().map(|created| created.0.as_second());
    Some(Item {
        uid: migration.uid()?,
        version: migration.resource_version(),
        created: created.unwrap_or_default(),
        need: need(migration),
    })
}

fn need(migration: &VMMigration) -> Need {
    if migration.metadata.deletion_timestamp.is_some() {
        return if has_finalizer(migration) { Need::Task } else { Need::Nothing };
    }
    let stamp = Stamp { generation: None, now: jiff::Timestamp::UNIX_EPOCH };
    let mut draft = Draft::new(migration, stamp);
    match next(&draft.status, draft.wish) {
        Step::Done => {}
        Step::Plan => return Need::Turn,
        _ => return Need::Task,
    }
    // An earlier operator has not told the agents that it knows the end.
    let not_acknowledged = has_finalizer(migration) && draft.status.reservation != Some(Reservation::Kept);
    let attention = not_acknowledged
        || draft.note_spec(&migration.spec)
        || draft.unjudged_resolve(&migration.spec).is_some();
    if attention { Need::Task } else { Need::Nothing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_begun_again_after_a_pause_that_grows() {
        let pauses = Pauses::new(Duration::from_millis(10), Duration::from_millis(100));
        let started = tokio::time::Instant::now();
        let mut begun = 0;
        let value = again_after_panics("demo/m", pauses, || {
            begun += 1;
            let number = begun;
            async move {
                assert!(number > 2, "panic {number}");
                number
            }
        });
        assert_eq!(value.await, 3);
        assert!(started.elapsed() >= Duration::from_millis(30));
    }
}
