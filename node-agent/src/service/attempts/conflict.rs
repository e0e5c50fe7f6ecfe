//! Open journals that are about the same VM or device. Only one migration at a time holds a VM, and until its
//! end is durable: two such journals are a fault, an old copy of a disk, say, or the work of an older agent.
//! The rollback of one could let the VM run here after the other has given it away, so none of them is acted
//! upon. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::attempt::entry::Entry;
use crate::journal::Key;

use super::entries;

/// For each journal that is in conflict with another, why nothing is done for it.
pub(super) fn find(journals: &[(Key, Entry)], file: impl Fn(&Key) -> PathBuf) -> BTreeMap<Key, String> {
    let mut users: BTreeMap<String, Vec<&(Key, Entry)>> = BTreeMap::new();
    for journal in journals.iter().filter(|(_, entry)| entry.ended.is_none()) {
        let (_, entry) = journal;
        users.entry(format!("VM {}/{}", entry.namespace, entry.name)).or_default().push(journal);
        for device in entries::local_devices(entry) {
            users.entry(format!("device {device}")).or_default().push(journal);
        }
    }
    let mut conflicts: BTreeMap<Key, String> = BTreeMap::new();
    for (what, journals) in users.into_iter().filter(|(_, journals)| journals.len() > 1) {
        let files: Vec<String> = journals
            .iter()
            .map(|(key, entry)| format!("{} (its last record is {:?})", file(key).display(), entry.record))
            .collect();
        let why = format!(
            "several open journals are about {what}: {}. Nothing is done for any of them. Find out which migration \
             {what} belongs to, stop the agent, move the other files away, and start it again",
            files.join(" and ")
        );
        for (key, _) in journals {
            // What is said of the VM says more than what is said of its devices.
            if what.starts_with("VM ") || !conflicts.contains_key(key) {
                conflicts.insert(key.clone(), why.clone());
            }
        }
    }
    conflicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt::entry::tests::entry;
    use crate::attempt::entry::{Ended, Features, Pair};
    use crate::journal::Role;
    use slackwater_handover::Record;

    fn journal(id: &str, name: &str, devices: &[&str]) -> (Key, Entry) {
        let pair = |device: &&str| Pair {
            source: (*device).to_owned(),
            target: "elsewhere".to_owned(),
            driver: "mtty".to_owned(),
            model: "mtty-1".to_owned(),
            features: Features::default(),
        };
        let devices = devices.iter().map(pair).collect();
        let entry = Entry { migration_id: id.to_owned(), name: name.to_owned(), devices, ..entry() };
        (Key::new(id, Role::Source).unwrap(), entry)
    }

    fn found(journals: &[(Key, Entry)]) -> Vec<(String, String)> {
        let found = find(journals, |key| PathBuf::from(format!("/state/journal/{key}")));
        found.into_iter().map(|(key, why)| (key.to_string(), why)).collect()
    }

    #[test]
    fn two_open_journals_of_one_vm_are_both_held_with_the_names_of_both_files() {
        let first = journal("m1", "counter", &["a"]);
        let (key, entry) = journal("m2", "counter", &["a"]);
        let second = (key, Entry { record: Record::Committed, ..entry });
        let found = found(&[first, second, journal("m3", "other", &["b"])]);
        let keys: Vec<&str> = found.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["m1.source", "m2.source"]);
        for (_, why) in &found {
            assert!(
                why.starts_with(
                    "several open journals are about VM demo/counter: /state/journal/m1.source (its last record is \
                     Saving) and /state/journal/m2.source (its last record is Committed). Nothing is done"
                ),
                "{why}"
            );
        }
    }

    #[test]
    fn journals_of_different_vms_that_name_one_device_are_held_and_an_ended_one_is_in_nobodys_way() {
        let one = journal("m1", "one", &["a", "b"]);
        let other = journal("m2", "other", &["b"]);
        let held = found(&[one.clone(), other.clone()]);
        assert_eq!(held.len(), 2);
        assert!(held[0].1.starts_with("several open journals are about device b: "), "{held:?}");
        let (key, entry) = other;
        let ended = Entry { ended: Some(Ended::default()), ..entry };
        assert_eq!(found(&[one, (key, ended)]), []);
    }
}
