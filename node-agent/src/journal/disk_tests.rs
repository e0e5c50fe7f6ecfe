//! Every step that a journal takes on the disk fails once, or a few times in a row, in every way in which disks
//! fail.

use std::fs;
use std::sync::Arc;

use rustix::io::Errno;
use tempfile::TempDir;

use super::*;
use crate::journal::disk_faults::Step;

/// How a step fails, and how many in a row.
const WAYS: [(Errno, usize); 6] =
    [(Errno::NOSPC, 1), (Errno::DQUOT, 1), (Errno::ROFS, 1), (Errno::IO, 1), (Errno::IO, 2), (Errno::IO, 3)];

/// What was done, as far as the order matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    SpareWritten,
    NamesSynced(bool),
}

struct Rig {
    dir: TempDir,
    journal: Journal,
    done: Arc<Mutex<Vec<Done>>>,
    hit: Arc<Mutex<bool>>,
}

fn key() -> Key {
    Key::new("m", Role::Source).unwrap()
}

impl Rig {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        Self { dir, journal, done: Arc::default(), hit: Arc::default() }
    }

    /// Lets the step number `from` fail, and the `count - 1` after it.
    fn fail(&self, from: usize, count: usize, way: Errno) {
        let (done, hit) = (Arc::clone(&self.done), Arc::clone(&self.hit));
        let folder = self.dir.path().join("journal");
        let mut number = 0;
        *hit.lock() = false;
        self.journal.directory.faults.set(move |step| {
            let fails = (from..from + count).contains(&number);
            number += 1;
            match step {
                Step::Write("m.source.spare") if !fails => done.lock().push(Done::SpareWritten),
                Step::SyncDirectory => done.lock().push(Done::NamesSynced(!fails)),
                // The kernel drops the pages that it could not write.
                Step::SyncFile(name) if fails => {
                    let bytes = fs::metadata(folder.join(name)).unwrap().len();
                    fs::write(folder.join(name), vec![0; usize::try_from(bytes).unwrap()]).unwrap();
                }
                _ => {}
            }
            *hit.lock() |= fails;
            if fails { Err(way.into()) } else { Ok(()) }
        });
    }

    fn has_failed(&self) -> bool {
        *self.hit.lock()
    }

    fn found(&self) -> Result<Content, JournalError> {
        self.journal.directory.faults.clear();
        self.journal.read_all().unwrap().remove(0).1
    }

    /// While it is not known which file has which name on the disk, the spare may be the current content there.
    fn assert_names_known_before_writes(&self, context: &str) {
        let done = self.done.lock();
        let mut known = true;
        for step in done.iter() {
            match step {
                Done::NamesSynced(synced) => known = *synced,
                Done::SpareWritten => assert!(known, "{context}: {done:?}"),
            }
        }
    }
}

/// Repeats what failed, until it succeeds.
fn insist(
    rig: &Rig,
    context: &str,
    mut call: impl FnMut() -> Result<(), JournalError>,
    old: &str,
    new: &str,
) {
    let mut tries = 0;
    while let Err(error) = call() {
        tries += 1;
        assert!(tries < 20, "{context}: {error:?}");
        // What an agent that starts now would find; the faults go on after this look.
        let fails = rig.journal.directory.faults.take();
        let found = rig.found().unwrap_or_else(|error| panic!("{context}: {error}")).bytes;
        assert!([old, new].map(str::as_bytes).contains(&found.as_slice()), "{context}: {found:?}");
        rig.journal.directory.faults.put(fails);
    }
    let fails = rig.journal.directory.faults.take();
    assert_eq!(rig.found().unwrap().bytes, new.as_bytes(), "{context}");
    rig.journal.directory.faults.put(fails);
}

#[test]
fn whichever_step_fails_the_journal_holds_the_old_content_or_the_new_and_a_repeated_call_succeeds() {
    for exchanges in [true, false] {
        for (way, count) in WAYS {
            for from in 0.. {
                let context = format!("exchanges: {exchanges}, {count} from step {from}: {way}");
                let rig = Rig::new();
                let mut file = rig.journal.create(&key(), b"saving").unwrap();
                file.copies.exchanges = exchanges;
                rig.fail(from, count, way);
                insist(&rig, &context, || file.write(b"committed"), "saving", "committed");
                insist(
                    &rig,
                    &context,
                    || file.write(b"aborted, and longer"),
                    "committed",
                    "aborted, and longer",
                );
                insist(&rig, &context, || file.finish(b"ended"), "aborted, and longer", "ended");
                rig.assert_names_known_before_writes(&context);
                let reached = rig.has_failed();
                rig.journal.directory.faults.clear();
                // Nothing is left that a start does not clear away. (It is not opened again: a child of another
                // test may hold a copy of its lock until it has become another program.)
                rig.journal.clear_leftovers().unwrap();
                let names = fs::read_dir(rig.dir.path().join("journal")).unwrap();
                let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
                assert_eq!(names, ["m.source"], "{context}");
                rig.journal.create(&key(), b"the next attempt").unwrap();
                if !reached {
                    assert!(from > 10, "only {from} steps");
                    break;
                }
            }
        }
    }
}

#[test]
fn whichever_step_of_a_creation_fails_what_is_left_of_it_can_be_ended_or_is_durably_nothing() {
    for (earlier, (way, count)) in
        [false, true].into_iter().flat_map(|earlier| WAYS.map(|way| (earlier, way)))
    {
        for from in 0.. {
            let context = format!("after another: {earlier}, {count} from step {from}: {way}");
            let rig = Rig::new();
            if earlier {
                rig.journal.create(&key(), b"1").unwrap().finish(b"attempt 1").unwrap();
            }
            rig.fail(from, count, way);
            let created = rig.journal.create(&key(), b"attempt 2");
            let reached = rig.has_failed();
            rig.journal.directory.faults.clear();
            if created.is_err() {
                if let Some(mut file) = rig.journal.left_by_failed_creation(&key()).unwrap() {
                    assert_eq!(rig.found().unwrap().bytes, b"attempt 2", "{context}");
                    file.finish(b"refused").unwrap();
                } else if earlier {
                    assert_eq!(rig.found().unwrap().bytes, b"attempt 1", "{context}");
                }
                assert!(rig.journal.left_by_failed_creation(&key()).unwrap().is_none(), "{context}");
                rig.journal.create(&key(), b"attempt 3").unwrap_or_else(|error| panic!("{context}: {error}"));
            }
            if !reached {
                assert!(from > 7, "only {from} steps");
                break;
            }
        }
    }
}

#[test]
fn that_nothing_is_left_of_a_creation_is_not_believed_before_the_directory_is_synced() {
    let rig = Rig::new();
    rig.journal.directory.faults.set(|step| match step {
        Step::SyncDirectory => Err(Errno::IO.into()),
        _ => Ok(()),
    });
    rig.journal.create(&key(), b"saving").unwrap_err();
    assert!(matches!(rig.journal.left_by_failed_creation(&key()), Err(JournalError::Sync { .. })));
}

#[test]
fn an_open_journal_of_an_earlier_size_is_read_as_open_and_grows() {
    let rig = Rig::new();
    let mut file = rig.journal.create(&key(), b"saving").unwrap();
    file.write(b"committed").unwrap();
    drop(file);
    let path = rig.dir.path().join("journal/m.source");
    File::options().write(true).open(&path).unwrap().set_len(EARLIER_SPACE_BYTES as u64).unwrap();
    assert!(matches!(rig.journal.create(&key(), b"2"), Err(JournalError::Unfinished { .. })));
    let mut file = rig.journal.reopen(&key()).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), SPACE_BYTES as u64);
    // One that is finished with just that length is not taken for an open one.
    let content = vec![b'x'; EARLIER_SPACE_BYTES - format::HEADER_BYTES - format::ACKNOWLEDGED.len()];
    file.finish(&content).unwrap();
    assert_eq!(rig.found().unwrap().bytes, content);
    rig.journal.create(&key(), b"2").unwrap();
}
