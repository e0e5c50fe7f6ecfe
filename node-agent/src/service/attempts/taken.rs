//! What the beginning of an attempt holds until it has come through, also if its caller goes away.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex as Lock;
use tokio::sync::Mutex;

use crate::service::registry::Registry;

/// A VM and devices that were taken for a migration that has not begun yet: dropping this gives them back.
#[must_use = "what was taken is given back at once"]
pub(super) struct Taken {
    registry: Arc<Registry>,
    migration_id: Option<String>,
}

impl Taken {
    /// What the registry has taken for this migration.
    pub(super) fn new(registry: Arc<Registry>, migration_id: &str) -> Self {
        Self { registry, migration_id: Some(migration_id.to_owned()) }
    }

    /// The migration has begun: it gives them back when it has ended.
    pub(super) fn keep(mut self) {
        self.migration_id = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(id) = &self.migration_id {
            self.registry.give_back(id);
        }
    }
}

/// A lock for each migration that is being begun.
#[derive(Debug, Default)]
pub(super) struct Turns(Lock<HashMap<String, Arc<Mutex<()>>>>);

impl Turns {
    /// The lock of this migration. Those that nobody uses are dropped.
    pub(super) fn of(&self, migration_id: &str) -> Arc<Mutex<()>> {
        let mut turns = self.0.lock();
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(migration_id.to_owned()).or_default())
    }
}

#[cfg(test)]
mod tests {
    use slackwater_proto::node::VmRef;

    use super::*;

    #[test]
    fn a_beginning_that_is_dropped_gives_back_what_it_took_and_one_that_came_through_keeps_it() {
        let registry = Arc::new(Registry::default());
        let vm = VmRef { namespace: "demo".to_owned(), name: "one".to_owned() };
        registry.take("m", &vm, ["a"]).unwrap();
        drop(Taken::new(Arc::clone(&registry), "m"));
        assert_eq!(registry.holder_of_device("a"), None);
        registry.take("m", &vm, ["a"]).unwrap();
        Taken::new(Arc::clone(&registry), "m").keep();
        assert_eq!(registry.holder_of_device("a").as_deref(), Some("m"));
    }

    #[test]
    fn one_migration_is_begun_at_a_time_and_another_one_does_not_wait() {
        let turns = Turns::default();
        let begun = turns.of("m").try_lock_owned().unwrap();
        assert!(turns.of("m").try_lock_owned().is_err());
        assert!(turns.of("n").try_lock_owned().is_ok());
        drop(begun);
        assert!(turns.of("m").try_lock_owned().is_ok());
    }
}
