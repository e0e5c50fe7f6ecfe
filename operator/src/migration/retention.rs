//! Deleting VMMigrations that have ended, `spec.ttlSecondsAfterFinished` after that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use slackwater_api::{Reservation, VMMigration};

use super::context::Context;
use super::tracked::has_finalizer;
use crate::cluster::ObjectKey;

/// The longest pause before the times are looked at again: the clock may be set.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Before a deletion that failed is tried again.
const RETRY_PAUSE: SignedDuration = SignedDuration::from_secs(10);

/// Deletes each VMMigration when it is time. Ends when the watch does.
pub async fn run(context: Context) {
    let mut changes = context.migrations.changes();
    let mut due = Due::default();
    loop {
        let now = Timestamp::now();
        while let Some(key) = due.take(now) {
            let Some(object) = context.migrations.get(&key) else { continue };
            // It may have been changed since.
            if deletion_time(&object).is_none_or(|time| time > now) {
                continue;
            }
            match context.cluster.delete_migration(&object).await {
                Ok(()) => {
                    tracing::info!(migration = %key, "deleted: spec.ttlSecondsAfterFinished has passed");
                }
                Err(error) => {
                    tracing::warn!(migration = %key, %error, "a VMMigration could not be deleted; trying again");
                    due.set(&key, now.checked_add(RETRY_PAUSE).ok());
                }
            }
        }
        tokio::select! {
            changed = changes.next() => match changed {
                Some(changed) => for key in changed {
                    due.set(&key, context.migrations.get(&key).and_then(|object| deletion_time(&object)));
                },
                None => return,
            },
            () = tokio::time::sleep(due.pause(Timestamp::now())) => {}
        }
    }
}

/// When it is to be deleted. Not before both agents know that its end stands in the status, and not while
/// anything is kept for it.
fn deletion_time(migration: &VMMigration) -> Option<Timestamp> {
    let status = migration.status.as_ref()?;
    let settled = status.reservation != Some(Reservation::Kept)
        && !has_finalizer(migration)
        && migration.metadata.deletion_timestamp.is_none();
    let ttl = migration.spec.ttl_seconds_after_finished.filter(|_| settled)?;
    let ended = status.completion_time.as_ref()?.0;
    ended.checked_add(SignedDuration::from_secs(ttl.into())).ok()
}

/// What is to be done when.
#[derive(Debug, Default)]
struct Due {
    times: BTreeMap<ObjectKey, Timestamp>,
    order: BTreeSet<(Timestamp, ObjectKey)>,
}

impl Due {
    fn set(&mut self, key: &ObjectKey, time: Option<Timestamp>) {
        let before = match time {
            Some(time) => self.times.insert(key.clone(), time),
            None => self.times.remove(key),
        };
        if let Some(before) = before {
            self.order.remove(&(before, key.clone()));
        }
        self.order.extend(time.map(|time| (time, key.clone())));
    }

    /// The first whose time has come; it is not due any more.
    fn take(&mut self, now: Timestamp) -> Option<ObjectKey> {
        let (_, key) = self.order.first().filter(|(time, _)| *time <= now)?.clone();
        self.set(&key, None);
        Some(key)
    }

    fn pause(&self, now: Timestamp) -> Duration {
        let next = self.order.first().map(|(time, _)| time.duration_since(now));
        let next = next.map(|next| Duration::try_from(next).unwrap_or_default());
        next.map_or(LONGEST_PAUSE, |next| next.min(LONGEST_PAUSE))
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use slackwater_api::{MIGRATION_FINALIZER, VMMigrationSpec, VMMigrationStatus};

    use super::*;

    fn second(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn ended(ttl: Option<i32>, change: impl FnOnce(&mut VMMigration)) -> VMMigration {
        let spec = VMMigrationSpec { ttl_seconds_after_finished: ttl, ..VMMigrationSpec::new("counter") };
        let mut object = VMMigration::new("m", spec);
        object.status = Some(VMMigrationStatus {
            completion_time: Some(Time(second(100))),
            reservation: Some(Reservation::Used),
            ..Default::default()
        });
        change(&mut object);
        object
    }

    #[test]
    fn what_has_ended_is_deleted_after_its_time_and_nothing_else_ever() {
        assert_eq!(deletion_time(&ended(Some(60), |_| {})), Some(second(160)));
        assert_eq!(deletion_time(&ended(Some(0), |_| {})), Some(second(100)));
        assert_eq!(deletion_time(&ended(None, |_| {})), None);
        let status = |change: fn(&mut VMMigrationStatus)| {
            ended(Some(60), |object| change(object.status.as_mut().unwrap()))
        };
        assert_eq!(deletion_time(&status(|status| status.completion_time = None)), None);
        // An administrator has to look at it.
        assert_eq!(deletion_time(&status(|status| status.reservation = Some(Reservation::Kept))), None);
        let open =
            ended(Some(60), |object| object.metadata.finalizers = Some(vec![MIGRATION_FINALIZER.into()]));
        assert_eq!(deletion_time(&open), None);
        let deleting = ended(Some(60), |object| object.metadata.deletion_timestamp = Some(Time(second(120))));
        assert_eq!(deletion_time(&deleting), None);
    }

    #[test]
    fn the_earliest_comes_first_and_a_new_time_replaces_the_old_one() {
        let key = |name: &str| ObjectKey { namespace: "demo".into(), name: name.into() };
        let mut due = Due::default();
        assert_eq!(due.pause(second(0)), LONGEST_PAUSE);
        due.set(&key("a"), Some(second(30)));
        due.set(&key("b"), Some(second(20)));
        due.set(&key("c"), Some(second(10)));
        due.set(&key("c"), None);
        assert_eq!((due.take(second(19)), due.pause(second(15))), (None, Duration::from_secs(5)));
        due.set(&key("a"), Some(second(5)));
        assert_eq!(due.take(second(25)), Some(key("a")));
        assert_eq!(due.take(second(25)), Some(key("b")));
        assert_eq!(due.take(second(99)), None);
    }
}
