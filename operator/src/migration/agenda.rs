//! Which migrations have a task, and which wait for one: pure, so that it costs what has changed, and not what
//! there is.

use std::collections::BTreeMap;

use crate::cluster::ObjectKey;

/// What a migration needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing.
    Nothing,
    /// A task, at once: agents may hold something for it, or a user waits for it to be given up.
    Task,
    /// A task, when those that are older have begun.
    Turn,
}

/// A migration as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) uid: String,
    /// The version of the object.
    pub(super) version: Option<String>,
    /// When it was created, in seconds.
    pub(super) created: i64,
    pub(super) need: Need,
}

/// All migrations that have, had or want a task.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    /// By UID.
    begun: BTreeMap<String, Begun>,
    /// The UID under each name.
    uids: BTreeMap<ObjectKey, String>,
    /// Those that wait for their turn, the oldest first, and when each was created.
    waiting: BTreeMap<(i64, ObjectKey), Item>,
    created: BTreeMap<ObjectKey, i64>,
}

/// A migration that has a task, or had one.
#[derive(Debug)]
struct Begun {
    busy: bool,
    /// The version of the object for which the last task was started. A task's own writes come back through
    /// the watch: its end is no reason to start another before something has changed.
    version: Option<String>,
    /// Its object is gone.
    gone: bool,
}

impl Agenda {
    /// The migration that is gone if the object of that name is this now.
    pub(super) fn replaced(&self, key: &ObjectKey, uid: Option<&str>) -> Option<&str> {
        self.uids.get(key).map(String::as_str).filter(|known| Some(*known) != uid)
    }

    /// Takes in what an object is now; `None`: it is gone. `true`: it is to have a task now.
    pub(super) fn look(&mut self, key: &ObjectKey, seen: Option<Item>) -> bool {
        if let Some(created) = self.created.remove(key) {
            self.waiting.remove(&(created, key.clone()));
        }
        let uid = seen.as_ref().map(|item| &item.uid);
        if let Some(old) = self.uids.get(key).filter(|old| Some(*old) != uid).cloned() {
            self.uids.remove(key);
            match self.begun.get_mut(&old) {
                Some(begun) if begun.busy => begun.gone = true,
                _ => drop(self.begun.remove(&old)),
            }
        }
        let Some(item) = seen else { return false };
        self.uids.insert(key.clone(), item.uid.clone());
        let known = self.begun.get(&item.uid);
        if known.is_some_and(|begun| begun.busy || begun.version == item.version) {
            return false;
        }
        match item.need {
            Need::Nothing => return false,
            Need::Task => self.begin(item),
            Need::Turn => {
                self.created.insert(key.clone(), item.created);
                self.waiting.insert((item.created, key.clone()), item);
                return false;
            }
        }
        true
    }

    /// The oldest of those that wait has its turn.
    pub(super) fn next_turn(&mut self) -> Option<ObjectKey> {
        let ((_, key), item) = self.waiting.pop_first()?;
        self.created.remove(&key);
        self.begin(item);
        Some(key)
    }

    /// Somebody waits for a turn.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The task of a migration has ended. To be followed by a look at its object.
    pub(super) fn ended(&mut self, uid: &str) {
        if let Some(begun) = self.begun.get_mut(uid) {
            begun.busy = false;
            if begun.gone {
                self.begun.remove(uid);
            }
        }
    }

    fn begin(&mut self, item: Item) {
        self.begun.insert(item.uid, Begun { busy: true, version: item.version, gone: false });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey { namespace: "demo".into(), name: name.into() }
    }

    fn item(uid: &str, version: u32, created: i64, need: Need) -> Option<Item> {
        Some(Item { uid: uid.into(), version: Some(version.to_string()), created, need })
    }

    fn turns(agenda: &mut Agenda) -> Vec<String> {
        std::iter::from_fn(|| agenda.next_turn()).map(|key| key.name).collect()
    }

    #[test]
    fn the_oldest_begins_first_and_what_cannot_wait_begins_at_once() {
        let mut agenda = Agenda::default();
        for (name, created) in [("young", 3), ("old", 1), ("middle", 2), ("cancelled", 0), ("deleted", 0)] {
            assert!(!agenda.look(&key(name), item(name, 1, created, Need::Turn)));
        }
        assert!(agenda.look(&key("joined"), item("joined", 1, 9, Need::Task)));
        assert!(agenda.look(&key("cancelled"), item("cancelled", 2, 0, Need::Task)));
        assert!(!agenda.look(&key("deleted"), None));
        assert!(agenda.is_waited_for());
        assert_eq!(turns(&mut agenda), ["old", "middle", "young"]);
        assert!(!agenda.is_waited_for());
    }

    #[test]
    fn a_migration_has_one_task_at_a_time_and_another_one_only_for_another_version() {
        let mut agenda = Agenda::default();
        assert!(agenda.look(&key("m"), item("u", 1, 0, Need::Task)));
        assert!(!agenda.look(&key("m"), item("u", 2, 0, Need::Task)));
        agenda.ended("u");
        assert!(agenda.look(&key("m"), item("u", 2, 0, Need::Task)));
        agenda.ended("u");
        assert!(!agenda.look(&key("m"), item("u", 2, 0, Need::Task)));
        assert!(!agenda.look(&key("m"), item("u", 3, 0, Need::Nothing)));
    }

    #[test]
    fn another_object_of_the_same_name_is_another_migration_and_nothing_is_kept_of_one_that_is_gone() {
        let mut agenda = Agenda::default();
        assert!(agenda.look(&key("m"), item("first", 1, 0, Need::Task)));
        assert!(agenda.look(&key("m"), item("second", 1, 0, Need::Task)));
        agenda.ended("first");
        assert!(!agenda.look(&key("m"), item("second", 2, 0, Need::Task)));
        agenda.ended("second");
        assert!(!agenda.look(&key("m"), None));
        assert!(agenda.begun.is_empty() && agenda.uids.is_empty(), "{agenda:?}");
        // An object that has long ended costs a name.
        assert!(!agenda.look(&key("ended"), item("e", 1, 0, Need::Nothing)));
        assert!(agenda.begun.is_empty());
    }
}
