//! An agent that starts reads its journals before it serves, finds each VM and its devices, and goes on.
//!
//! A VMM is the one that was journalled if boot id, process number and start time are the same. Then its
//! devices are borrowed and read back, and the pure machine decides what follows. A journal that cannot be
//! read, or is of another migration, is logged and held: a call about that migration is refused with the name
//! of the file, and nothing is guessed. The same goes for open journals that are about one VM or device
//! (`conflict`).

use std::sync::Arc;
use std::time::Duration;

use slackwater_handover::Record;
use slackwater_handover::destination::End as DestinationEnd;
use tracing::{error, info, warn};

use super::reopen::restarted;
use super::resources::NodeResources;
use super::{conflict, entries, take_up_destination, take_up_source};
use crate::attempt::destination::DestinationRun;
use crate::attempt::entry::{EndEntry, Ended, Entry, ParseEntryError};
use crate::attempt::events::EventLog;
use crate::attempt::ledger::Ledger;
use crate::attempt::source::SourceRun;
use crate::attempt::unheard::{Unheard, tell_all};
use crate::host::clock::Clock;
use crate::journal::{Content, Found, Journal, JournalError, Key, Role};
use crate::service::reason::ServiceReason;
use crate::service::registry::{Hold, LocalEnd, MAX_REMEMBERED_MIGRATIONS};

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
enum UnusableJournal {
    /// The file.
    #[error("the journal of this migration cannot be read: {}", .0.with_causes())]
    Read(#[from] JournalError),
    /// Its content.
    #[error("the journal {key} cannot be used: {source}")]
    Parse { key: String, source: ParseEntryError },
    /// It has the name of another one.
    #[error(
        "the journal {key} is of another migration: it says {}.{}, VM {}/{}",
        found.migration_id, role_of(found).as_str(), found.namespace, found.name
    )]
    OtherMigration { key: String, found: Box<Entry> },
}

impl UnusableJournal {
    fn may_pass(&self) -> bool {
        matches!(self, Self::Read(error) if error.may_pass())
    }
}

/// Between two tries to take up what may be taken up later.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the journal holds.
struct JournalContent {
    epoch: u64,
    found: Vec<Found>,
}

/// Takes up everything that the journal holds. What takes time goes on after this returns; its VM and devices
/// are held from now on.
pub(super) async fn take_up_all(node: &NodeResources) -> Result<(), JournalError> {
    let journal = Arc::clone(&node.journal);
    let JournalContent { epoch, found } = match tokio::task::spawn_blocking(move || read(&journal)).await {
        Ok(read) => read?,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    node.registry.restore_epoch(epoch);
    let mut usable = Vec::with_capacity(found.len());
    for (key, content) in found {
        match parse(&key, content) {
            Ok(entry) => usable.push((key, entry)),
            Err(error) => {
                let migration = key.id();
                error!(migration, why = %error, "a journal cannot be used; what it is about is left as it is");
                node.registry.hold_unreadable(key.id(), error.to_string());
                if error.may_pass() {
                    tokio::spawn(read_again(node.clone(), key));
                }
            }
        }
    }
    let unheard = usable.iter().filter_map(|(_, entry)| unheard(node, entry)).collect();
    tokio::spawn(tell_all(unheard));
    let conflicts = conflict::find(&usable, |key| node.journal.file(key));
    for (key, entry) in usable {
        match conflicts.get(&key) {
            None => take_up(node, key, entry),
            Some(why) => {
                error!(migration = entry.migration_id, why, "what these journals are about is left as it is");
                node.registry.hold_what_is_free(
                    &entry.migration_id,
                    &entries::vm_of(&entry),
                    devices_of(&entry),
                );
                node.registry.hold_conflicting(&entry.migration_id, why.clone());
                if key.role() == Role::Source {
                    node.registry.has_its_vm_here(&entry.migration_id);
                }
            }
        }
    }
    Ok(())
}

/// Reads the journal, without the oldest of those whose end has been acknowledged.
fn read(journal: &Journal) -> Result<JournalContent, JournalError> {
    let has_ended =
        |_: &Key, content: &Content| Entry::parse(content).is_ok_and(|entry| entry.ended.is_some());
    if let Err(error) = journal.prune(MAX_REMEMBERED_MIGRATIONS, has_ended) {
        warn!(%error, "old journals could not be removed");
    }
    let epoch = journal.epoch().unwrap_or_else(|error| {
        error!(%error, "the highest operator epoch cannot be read; the next operator's counts");
        0
    });
    Ok(JournalContent { epoch, found: journal.read_all()? })
}

/// The entry of a journal, if it is what its name says.
fn parse(key: &Key, content: Result<Content, JournalError>) -> Result<Entry, UnusableJournal> {
    let entry =
        Entry::parse(&content?).map_err(|source| UnusableJournal::Parse { key: key.to_string(), source })?;
    if entry.migration_id != key.id() || role_of(&entry) != key.role() {
        return Err(UnusableJournal::OtherMigration { key: key.to_string(), found: Box::new(entry) });
    }
    Ok(entry)
}

/// An earlier agent has given the attempt up, and nobody knows whether the destination has heard it. An attempt
/// that has not ended here tells it itself.
pub(super) fn unheard(node: &NodeResources, entry: &Entry) -> Option<Unheard> {
    let given_up = entry.ended.is_some() && entry.record == Record::Aborted;
    let peer = node.peer_of(entry).filter(|_| given_up)?;
    Some(Unheard::new(peer, entry.state()))
}

fn role_of(entry: &Entry) -> Role {
    match entry.end {
        EndEntry::Source { .. } => Role::Source,
        EndEntry::Destination { .. } => Role::Destination,
    }
}

pub(super) fn take_up(node: &NodeResources, key: Key, entry: Entry) {
    let reference = entries::reference_of(&entry);
    if let Some(ended) = &entry.ended {
        let ledger = Ledger::ended(&entry);
        let part = match entries::reservation_of(&entry) {
            None => LocalEnd::Source(SourceRun::over(log_of_ended(&node.config.node, &entry, ended), ledger)),
            Some(request) => {
                LocalEnd::Destination(DestinationRun::over(ledger, end_of(&entry)), Box::new(request))
            }
        };
        node.registry.join(&reference, part);
        if node.journal.is_acknowledged(&key).unwrap_or(false) {
            node.registry.acknowledge(&reference.id, reference.attempt);
        }
        return;
    }
    info!(migration = entry.migration_id, record = ?entry.record, "taking up what an earlier agent began");
    hold(node, &entry);
    node.registry.join(&reference, LocalEnd::Recovering);
    if key.role() == Role::Source {
        node.registry.has_its_vm_here(&reference.id);
    }
    let node = node.clone();
    tokio::spawn(async move {
        let id = entry.migration_id.clone();
        let (mut pause, longest) = RETRY_PAUSES;
        let mut told = false;
        loop {
            let (key, entry) = (key.clone(), entry.clone());
            let taken_up = match key.role() {
                Role::Source => take_up_source::take_up(&node, key, entry).await,
                Role::Destination => take_up_destination::take_up(&node, key, entry).await,
            };
            match taken_up {
                Ok(()) => return node.registry.explained(&id),
                Err(error) if error.may_pass() => {
                    if !std::mem::replace(&mut told, true) {
                        warn!(migration = id, why = %error, "a migration cannot be taken up yet; trying again");
                    }
                    let why = error.to_string();
                    node.registry.explain(&id, Hold { reason: ServiceReason::JournalUnreadable, why });
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(longest);
                }
                Err(error) => {
                    error!(
                        migration = id, why = %error,
                        "a migration cannot be taken up; what it is about is left as it is"
                    );
                    return node.registry.hold_unreadable(&id, error.to_string());
                }
            }
        }
    });
}

/// Reads a journal again that the disk did not give, until it does.
async fn read_again(node: NodeResources, key: Key) {
    let (mut pause, longest) = RETRY_PAUSES;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
        let (journal, of) = (Arc::clone(&node.journal), key.clone());
        let Ok(content) = tokio::task::spawn_blocking(move || journal.read_one(&of)).await else { continue };
        match parse(&key, content) {
            Ok(entry) => {
                info!(migration = key.id(), "a journal can be read again");
                return take_up_late(&node, key, entry);
            }
            Err(error) if error.may_pass() => {}
            Err(error) => return node.registry.hold_unreadable(key.id(), error.to_string()),
        }
    }
}

/// Takes up a journal that was read after the others. What it is about was not held meanwhile.
fn take_up_late(node: &NodeResources, key: Key, entry: Entry) {
    let holder = entry
        .ended
        .is_none()
        .then(|| node.registry.holder_of_any(&entries::vm_of(&entry), devices_of(&entry)));
    match holder.flatten() {
        None => {
            node.registry.explained(key.id());
            take_up(node, key, entry);
        }
        Some(held) => {
            let file = node.journal.file(&key);
            let why = format!(
                "the journal {} could not be read when the agent started, and meanwhile {held}: nothing is done for \
                 it. If the VM has left it behind, stop the agent, move the file away, and start it again",
                file.display()
            );
            error!(migration = key.id(), why, "what this journal is about is left as it is");
            node.registry.hold_conflicting(key.id(), why);
        }
    }
}

/// The devices of this node that an entry is about.
fn devices_of(entry: &Entry) -> Vec<&str> {
    entries::local_devices(entry).collect()
}

/// The VM and the devices are not free before the attempt has ended.
fn hold(node: &NodeResources, entry: &Entry) {
    let names = devices_of(entry);
    if let Err(held) = node.registry.take(&entry.migration_id, &entries::vm_of(entry), names) {
        warn!(migration = entry.migration_id, %held, "two unfinished journals are about the same");
    }
}

fn log_of_ended(node: &str, entry: &Entry, ended: &Ended) -> EventLog {
    let log = EventLog::new(node);
    let at = Clock { unix_ns: entry.recorded_unix_ns, ..Clock::now() };
    log.finished(at, ended.to_finished(entry.failure.as_ref()));
    log
}

fn end_of(entry: &Entry) -> DestinationEnd {
    let failure = entry.failure().unwrap_or_else(restarted);
    match entry.record {
        Record::Running => DestinationEnd::Running,
        Record::Starting => DestinationEnd::Stuck(failure),
        _ => DestinationEnd::Discarded(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt::entry::tests::entry;

    fn key(id: &str, role: Role) -> Key {
        Key::new(id, role).unwrap()
    }

    fn content(text: &str) -> Content {
        Content { version: 2, bytes: text.as_bytes().to_vec() }
    }

    #[test]
    fn a_journal_that_is_what_its_name_says_is_used() {
        let text = serde_json::to_string(&entry()).unwrap();
        assert_eq!(parse(&key("3f", Role::Source), Ok(content(&text))).unwrap(), entry());
    }

    #[test]
    fn a_journal_of_another_migration_or_end_or_version_is_refused_with_its_name() {
        let written = || content(&serde_json::to_string(&entry()).unwrap());
        let error = |key: &Key, content| parse(key, content).unwrap_err().to_string();
        assert_eq!(
            error(&key("4a", Role::Source), Ok(written())),
            "the journal 4a.source is of another migration: it says 3f.source, VM demo/counter"
        );
        let end = error(&key("3f", Role::Destination), Ok(written()));
        assert!(end.starts_with("the journal 3f.destination is of another migration"), "{end}");
        let newer = error(&key("3f", Role::Source), Ok(content("{\"quorum\": 3}")));
        assert!(
            newer.starts_with("the journal 3f.source cannot be used: it is not an entry of version 2"),
            "{newer}"
        );
        assert!(newer.contains("quorum"), "{newer}");
        let unreadable = JournalError::InvalidId { id: "x".to_owned() };
        let unreadable = error(&key("3f", Role::Source), Err(unreadable));
        assert!(unreadable.starts_with("the journal of this migration cannot be read: "), "{unreadable}");
    }
}
