use std::fs;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn key(id: &str) -> Key {
    Key::new(id, Role::Source).unwrap()
}

fn state() -> (TempDir, Journal) {
    let dir = TempDir::new().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    (dir, journal)
}

fn path(dir: &TempDir, name: &str) -> PathBuf {
    dir.path().join("journal").join(name)
}

/// What an agent that starts now finds under this key.
fn found(journal: &Journal, key: &Key) -> Result<Vec<u8>, JournalError> {
    let found = journal.read_all().unwrap().into_iter().find(|(found, _)| found == key);
    found.expect("a journal is there").1.map(|content| content.bytes)
}

fn names(dir: &TempDir) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir.path().join("journal"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_id_that_could_be_a_path_is_refused() {
    for id in ["", ".", "..", "a/b", "A", "a.b", "a b", "ä", &"a".repeat(65)] {
        assert!(matches!(Key::new(id, Role::Source), Err(JournalError::InvalidId { .. })), "{id:?}");
    }
    for id in ["a", "3f2c-9", &"z".repeat(64)] {
        assert!(Key::new(id, Role::Destination).is_ok(), "{id:?}");
    }
}

#[test]
fn a_second_agent_is_refused_until_the_first_has_ended() {
    let (dir, journal) = state();
    let error = Journal::open(dir.path()).unwrap_err();
    assert!(matches!(error, JournalError::Locked { .. }));
    let words = error.to_string();
    assert!(words.contains(&format!("(process {})", std::process::id())), "{words}");
    assert!(words.contains(&dir.path().display().to_string()), "{words}");

    let file = journal.create(&key("m"), b"1").unwrap();
    drop(journal);
    assert!(matches!(Journal::open(dir.path()), Err(JournalError::Locked { .. })), "a file still writes");
    drop(file);
    Journal::open(dir.path()).unwrap();
}

#[test]
fn the_last_content_is_found_after_a_restart_with_its_key() {
    let (dir, journal) = state();
    let mut source = journal.create(&key("m"), b"one").unwrap();
    let destination = Key::new("m", Role::Destination).unwrap();
    let mut other = journal.create(&destination, b"reserved").unwrap();
    source.write(b"a longer second record").unwrap();
    source.write(b"3").unwrap();
    other.write(b"loaded").unwrap();
    drop((source, other, journal));

    let journal = Journal::open(dir.path()).unwrap();
    let all: Vec<(Key, Vec<u8>)> =
        journal.read_all().unwrap().into_iter().map(|(key, content)| (key, content.unwrap().bytes)).collect();
    assert_eq!(all, [(key("m"), b"3".to_vec()), (destination, b"loaded".to_vec())]);
}

#[test]
fn space_for_both_copies_is_allocated_when_the_journal_is_made_and_no_more_later() {
    let (dir, journal) = state();
    let mut file = journal.create(&key("m"), b"1").unwrap();
    let blocks = || {
        let allocated = |name| fs::metadata(path(&dir, name)).unwrap();
        let (live, spare) = (allocated("m.source"), allocated("m.source.spare"));
        assert_eq!((live.len(), spare.len()), (SPACE_BYTES as u64, SPACE_BYTES as u64));
        (live.blocks() * 512, spare.blocks() * 512)
    };
    let (live, spare) = blocks();
    assert!(live >= SPACE_BYTES as u64 && spare >= SPACE_BYTES as u64, "{live}, {spare}");
    for round in 0..5 {
        file.write(&vec![round; CONTENT_MAX_BYTES]).unwrap();
        assert_eq!(names(&dir), ["m.source", "m.source.spare"]);
        blocks();
    }
}

#[test]
fn a_finished_journal_stays_readable_without_its_spare_and_its_unused_space() {
    let (dir, journal) = state();
    let mut file = journal.create(&key("m"), b"1").unwrap();
    file.finish(b"the end").unwrap();
    assert_eq!(names(&dir), ["m.source"]);
    assert!(fs::metadata(path(&dir, "m.source")).unwrap().len() < 100);
    assert_eq!(found(&journal, &key("m")).unwrap(), b"the end");
}

#[test]
fn a_journal_that_is_not_finished_is_not_replaced_and_a_finished_one_is() {
    let (_dir, journal) = state();
    let mut file = journal.create(&key("m"), b"attempt 1").unwrap();
    assert!(matches!(journal.create(&key("m"), b"attempt 2"), Err(JournalError::Unfinished { .. })));
    assert_eq!(found(&journal, &key("m")).unwrap(), b"attempt 1");
    file.finish(b"attempt 1, ended").unwrap();
    let mut file = journal.create(&key("m"), b"attempt 2").unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"attempt 2");
    file.write(b"attempt 2, committed").unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"attempt 2, committed");
}

#[test]
fn a_record_that_fills_the_file_is_not_taken_for_a_finished_one() {
    let (_dir, journal) = state();
    let mut file = journal.create(&key("m"), b"1").unwrap();
    file.write(&vec![7; CONTENT_MAX_BYTES]).unwrap();
    assert!(matches!(journal.create(&key("m"), b"2"), Err(JournalError::Unfinished { .. })));
}

#[test]
fn content_that_does_not_fit_is_refused_and_changes_nothing() {
    let (dir, journal) = state();
    let large = vec![b'x'; CONTENT_MAX_BYTES + 1];
    let error = journal.create(&key("m"), &large).unwrap_err();
    assert!(matches!(error, JournalError::ContentTooLarge { .. }));
    assert!(error.to_string().contains(&CONTENT_MAX_BYTES.to_string()), "{error}");
    assert!(names(&dir).is_empty());

    let mut file = journal.create(&key("m"), b"old").unwrap();
    assert!(matches!(file.write(&large), Err(JournalError::ContentTooLarge { .. })));
    assert_eq!(found(&journal, &key("m")).unwrap(), b"old");
    assert!(matches!(file.finish(&large), Err(JournalError::ContentTooLarge { .. })));
    assert_eq!(found(&journal, &key("m")).unwrap(), b"old");
}

#[test]
fn a_restarted_agent_goes_on_writing() {
    let (dir, journal) = state();
    let file = journal.create(&key("m"), b"saving").unwrap();
    drop((file, journal));
    let journal = Journal::open(dir.path()).unwrap();
    fs::remove_file(path(&dir, "m.source.spare")).unwrap();
    let mut file = journal.reopen(&key("m")).unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"saving");
    assert_eq!(fs::metadata(path(&dir, "m.source.spare")).unwrap().len(), SPACE_BYTES as u64);
    file.write(b"aborted").unwrap();
    file.finish(b"aborted, ended").unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"aborted, ended");
    assert_eq!(names(&dir), ["m.source"]);
}

#[test]
fn a_finished_journal_can_be_reopened() {
    let (dir, journal) = state();
    journal.create(&key("m"), b"1").unwrap().finish(b"ended").unwrap();
    let mut file = journal.reopen(&key("m")).unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"ended");
    assert!(matches!(journal.create(&key("m"), b"2"), Err(JournalError::Unfinished { .. })));
    file.write(b"more").unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"more");
    assert_eq!(fs::metadata(path(&dir, "m.source.spare")).unwrap().len(), SPACE_BYTES as u64);
}

#[test]
fn a_full_disk_is_distinguished_from_other_failures_and_the_old_content_stays() {
    let (_dir, journal) = state();
    let mut file = journal.create(&key("m"), b"old").unwrap();
    file.copies.spare = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = file.write(b"new").unwrap_err();
    assert!(matches!(error, JournalError::NoSpace { .. }), "{error:?}");
    assert!(error.to_string().contains("m.source"), "{error}");
    assert_eq!(found(&journal, &key("m")).unwrap(), b"old");
    file = journal.reopen(&key("m")).unwrap();
    file.copies.spare = OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert!(matches!(file.finish(b"new"), Err(JournalError::NoSpace { .. })));
    assert_eq!(found(&journal, &key("m")).unwrap(), b"old");
}

#[test]
fn after_a_failed_write_the_old_content_stays_and_the_next_write_succeeds() {
    let (dir, journal) = state();
    let mut file = journal.create(&key("m"), b"old").unwrap();
    let spare = path(&dir, "m.source.spare");

    // The spare cannot be written.
    file.copies.spare = File::open(&spare).unwrap();
    assert!(matches!(file.write(b"new"), Err(JournalError::Write { .. })));
    assert_eq!(found(&journal, &key("m")).unwrap(), b"old");

    // It has been taken away: the next write makes another.
    fs::remove_file(&spare).unwrap();
    file.write(b"new").unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"new");

    // The spare is written, and cannot be put in place.
    fs::rename(&spare, dir.path().join("elsewhere")).unwrap();
    assert!(matches!(file.write(b"newer"), Err(JournalError::Replace { .. })));
    assert_eq!(found(&journal, &key("m")).unwrap(), b"new");
    file.write(b"newer").unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"newer");
}

#[test]
fn a_failed_creation_leaves_nothing_and_does_not_touch_the_finished_journal() {
    for blocked in ["m.source.spare", "m.source.new"] {
        let (dir, journal) = state();
        fs::create_dir(path(&dir, blocked)).unwrap();
        journal.create(&key("m"), b"1").unwrap_err();
        assert_eq!(names(&dir), [blocked]);
        fs::remove_dir(path(&dir, blocked)).unwrap();

        journal.create(&key("m"), b"1").unwrap().finish(b"ended").unwrap();
        fs::create_dir(path(&dir, blocked)).unwrap();
        journal.create(&key("m"), b"2").unwrap_err();
        assert_eq!(found(&journal, &key("m")).unwrap(), b"ended");
    }
}

#[test]
fn a_write_cut_off_at_any_byte_of_the_spare_leaves_the_old_content() {
    let (dir, journal) = state();
    let old = b"{\"record\":\"SAVING\",\"attempt\":1}".to_vec();
    let new = b"{\"record\":\"COMMITTED\",\"attempt\":1,\"peer\":\"node-b\"}".to_vec();
    let mut file = journal.create(&key("m"), b"before").unwrap();
    file.write(&old).unwrap();
    drop((file, journal));
    let spare = path(&dir, "m.source.spare");
    let before = fs::read(&spare).unwrap();
    let written = format::encode(NEWEST_VERSION, &new).unwrap();
    for cut in 0..=written.len() {
        let mut torn = written[..cut].to_vec();
        torn.extend(&before[cut..]);
        fs::write(&spare, torn).unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!(found(&journal, &key("m")).unwrap(), old, "cut at {cut}");
    }
    let journal = Journal::open(dir.path()).unwrap();
    journal.reopen(&key("m")).unwrap().write(&new).unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), new);
}

#[test]
fn without_an_exchange_of_names_writes_are_still_atomic() {
    let (dir, journal) = state();
    let mut file = journal.create(&key("m"), b"0").unwrap();
    file.copies.exchanges = false;
    for round in 1..4_u8 {
        file.write(&[round]).unwrap();
        assert_eq!(found(&journal, &key("m")).unwrap(), [round]);
        assert_eq!(names(&dir), ["m.source", "m.source.spare"]);
        assert_eq!(fs::metadata(path(&dir, "m.source.spare")).unwrap().len(), SPACE_BYTES as u64);
    }
    // The next spare cannot be allocated.
    fs::create_dir(path(&dir, "m.source.new")).unwrap();
    file.write(b"new").unwrap_err();
    assert_eq!(found(&journal, &key("m")).unwrap(), [3]);
    fs::remove_dir(path(&dir, "m.source.new")).unwrap();
    file.finish(b"ended").unwrap();
    assert_eq!(found(&journal, &key("m")).unwrap(), b"ended");
    assert_eq!(names(&dir), ["m.source"]);
}

#[test]
fn an_unreadable_journal_has_its_error_keeps_its_spare_and_does_not_hide_the_others() {
    let (dir, journal) = state();
    for id in ["crc", "cut", "empty", "foreign", "good", "newer"] {
        drop(journal.create(&key(id), b"{\"attempt\":1}").unwrap());
    }
    drop(journal);
    let change = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = path(&dir, name);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
    };
    change("crc.source", &|bytes| bytes[25] ^= 0x20);
    change("cut.source", &|bytes| bytes.truncate(30));
    change("empty.source", &Vec::clear);
    change("foreign.source", &|bytes| bytes[..8].copy_from_slice(b"SOMETHIN"));
    change("newer.source", &|bytes| {
        bytes[8] = 7;
        bytes.truncate(33);
    });

    let journal = Journal::open(dir.path()).unwrap();
    let words = |id: &str| {
        let error = found(&journal, &key(id)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&path(&dir, &format!("{id}.source")).display().to_string()), "{text}");
        (error, text)
    };
    assert!(matches!(words("crc").0, JournalError::ChecksumMismatch { .. }));
    assert!(matches!(words("cut").0, JournalError::Truncated { needs_bytes: 33, has_bytes: 30, .. }));
    assert!(matches!(words("empty").0, JournalError::Truncated { has_bytes: 0, .. }));
    assert!(matches!(words("foreign").0, JournalError::NotAJournal { .. }));
    let (newer, text) = words("newer");
    assert!(matches!(newer, JournalError::NewerVersion { found: 7, known: NEWEST_VERSION, .. }));
    assert!(text.contains("format 7") && text.contains("run the newer agent"), "{text}");
    assert_eq!(found(&journal, &key("good")).unwrap(), b"{\"attempt\":1}");

    for id in ["crc", "cut", "empty", "foreign", "newer"] {
        let before = fs::read(path(&dir, &format!("{id}.source"))).unwrap();
        journal.create(&key(id), b"2").unwrap_err();
        journal.reopen(&key(id)).unwrap_err();
        assert_eq!(fs::read(path(&dir, &format!("{id}.source"))).unwrap(), before);
        assert!(path(&dir, &format!("{id}.source.spare")).exists(), "{id}");
    }
    assert!(journal.prune(0, |_, _| true).unwrap().is_empty());
}

/// Gives a file another version.
fn set_version(path: &Path, version: u32) {
    let mut bytes = fs::read(path).unwrap();
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_agent_does_not_start_over_an_open_journal_of_a_newer_version_and_changes_nothing() {
    let (dir, journal) = state();
    drop(journal.create(&key("m"), b"{}").unwrap());
    drop(journal);
    let file = path(&dir, "m.source");
    set_version(&file, 3);
    fs::write(path(&dir, "gone.source.spare"), b"left over").unwrap();
    let before = (fs::read(&file).unwrap(), names(&dir));

    let error = Journal::open(dir.path()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "{} is an open journal of format 3, and this agent reads formats up to 2: it does not start over \
             it. Run the newer agent that wrote it until the migration has ended, and drain the migrations of \
             a node before a downgrade",
            file.display()
        )
    );
    assert_eq!((fs::read(&file).unwrap(), names(&dir)), before);

    // When the newer agent has ended the migration, the older one starts, and holds the file as unreadable.
    set_version(&file, NEWEST_VERSION);
    let journal = Journal::open(dir.path()).unwrap();
    journal.reopen(&key("m")).unwrap().finish(b"{}").unwrap();
    drop(journal);
    set_version(&file, 3);
    let journal = Journal::open(dir.path()).unwrap();
    let newer = found(&journal, &key("m")).unwrap_err();
    assert!(matches!(newer, JournalError::NewerVersion { found: 3, known: 2, .. }), "{newer}");
}

#[test]
fn a_journal_of_an_older_version_is_read_with_its_version_and_written_in_the_newest() {
    let (dir, journal) = state();
    drop(journal.create(&key("m"), b"old").unwrap());
    drop(journal);
    set_version(&path(&dir, "m.source"), 1);
    let journal = Journal::open(dir.path()).unwrap();
    let content = || journal.read_all().unwrap().remove(0).1.unwrap();
    assert_eq!(content(), Content { version: 1, bytes: b"old".to_vec() });
    journal.reopen(&key("m")).unwrap().write(b"new").unwrap();
    assert_eq!(content(), Content { version: NEWEST_VERSION, bytes: b"new".to_vec() });
}

#[test]
fn the_epoch_stays_readable_for_an_older_agent() {
    let (dir, journal) = state();
    journal.set_epoch(3).unwrap();
    journal.set_epoch(4).unwrap();
    drop(journal);
    Journal::open(dir.path()).unwrap().set_epoch(5).unwrap();
    for name in [EPOCH.to_owned(), format!("{EPOCH}{SPARE}")] {
        let bytes = fs::read(path(&dir, &name)).unwrap();
        assert_eq!(bytes[8..12], 1_u32.to_le_bytes(), "{name}");
    }
}

#[test]
fn a_directory_or_a_link_under_a_journals_name_is_refused() {
    let (dir, journal) = state();
    fs::create_dir(path(&dir, "d.source")).unwrap();
    fs::write(dir.path().join("target"), format::encode(NEWEST_VERSION, b"{}").unwrap()).unwrap();
    std::os::unix::fs::symlink(dir.path().join("target"), path(&dir, "l.source")).unwrap();
    assert!(matches!(found(&journal, &key("d")), Err(JournalError::Read { .. })));
    assert!(matches!(found(&journal, &key("l")), Err(JournalError::Open { .. })));
}

#[test]
fn leftovers_are_removed_where_that_is_safe_and_unknown_files_stay() {
    let (dir, journal) = state();
    journal.create(&key("ended"), b"1").unwrap().finish(b"2").unwrap();
    drop(journal.create(&key("alive"), b"1").unwrap());
    drop(journal);
    for name in
        ["ended.source.spare", "gone.source.spare", "gone.source.new", "epoch.new", "README", "X.source.new"]
    {
        fs::write(path(&dir, name), b"left over").unwrap();
    }
    let journal = Journal::open(dir.path()).unwrap();
    let left = ["README", "X.source.new", "alive.source", "alive.source.spare", "ended.source"];
    assert_eq!(names(&dir), left);
    assert_eq!(journal.read_all().unwrap().len(), 2);
}

#[test]
fn only_the_oldest_finished_journals_are_removed() {
    let (dir, journal) = state();
    let start = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    for (age, id) in ["e", "d", "c", "b", "a"].into_iter().enumerate() {
        journal.create(&key(id), b"1").unwrap().finish(b"ended").unwrap();
        journal.acknowledge(&key(id)).unwrap();
        let written = start + std::time::Duration::from_secs(age as u64);
        File::options()
            .write(true)
            .open(path(&dir, &format!("{id}.source")))
            .unwrap()
            .set_modified(written)
            .unwrap();
    }
    drop(journal.create(&key("open"), b"ended").unwrap());
    // The operator does not know of this one.
    journal.create(&key("new"), b"1").unwrap().finish(b"ended").unwrap();
    File::options().write(true).open(path(&dir, "new.source")).unwrap().set_modified(start).unwrap();
    // `d` is not finished by what it says.
    let removed = journal.prune(2, |key, content| key.id() != "d" && content.bytes == b"ended").unwrap();
    assert_eq!(removed, [key("e"), key("c")]);
    let left = ["a.source", "b.source", "d.source", "new.source", "open.source", "open.source.spare"];
    assert_eq!(names(&dir), left);
}

#[test]
fn an_acknowledged_end_is_read_as_before_and_an_open_journal_cannot_be_acknowledged() {
    let (dir, journal) = state();
    assert!(journal.acknowledge(&key("m")).is_ok(), "nothing to note");
    let mut file = journal.create(&key("m"), b"saving").unwrap();
    assert!(matches!(journal.acknowledge(&key("m")), Err(JournalError::Unfinished { .. })));
    file.finish(b"ended").unwrap();
    assert!(!journal.is_acknowledged(&key("m")).unwrap());
    journal.remove_acknowledged(&key("m")).unwrap();
    let before = fs::metadata(path(&dir, "m.source")).unwrap().len();
    for _ in 0..2 {
        journal.acknowledge(&key("m")).unwrap();
        assert!(journal.is_acknowledged(&key("m")).unwrap());
        assert_eq!(found(&journal, &key("m")).unwrap(), b"ended");
    }
    assert_eq!(fs::metadata(path(&dir, "m.source")).unwrap().len(), before, "it takes no space");
    drop((file, journal));
    let journal = Journal::open(dir.path()).unwrap();
    assert!(journal.is_acknowledged(&key("m")).unwrap());
    // Another attempt begins anew.
    journal.create(&key("m"), b"2").unwrap().finish(b"2, ended").unwrap();
    assert!(!journal.is_acknowledged(&key("m")).unwrap());
    journal.acknowledge(&key("m")).unwrap();
    journal.remove_acknowledged(&key("m")).unwrap();
    assert!(names(&dir).is_empty());
}

#[test]
fn the_highest_epoch_is_kept_across_restarts_and_never_goes_back() {
    let (dir, journal) = state();
    assert_eq!(journal.epoch().unwrap(), 0);
    for (set, kept) in [(3, 3), (2, 3), (9, 9), (9, 9)] {
        journal.set_epoch(set).unwrap();
        assert_eq!(journal.epoch().unwrap(), kept);
    }
    drop(journal);
    let journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.epoch().unwrap(), 9);
    journal.set_epoch(u64::MAX).unwrap();
    assert_eq!(journal.epoch().unwrap(), u64::MAX);
    assert!(journal.read_all().unwrap().is_empty(), "the epoch is not a migration's journal");
}

#[test]
fn a_damaged_epoch_is_an_error_and_not_zero() {
    let (dir, journal) = state();
    journal.set_epoch(3).unwrap();
    drop(journal);
    fs::write(path(&dir, EPOCH), b"").unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    assert!(matches!(journal.epoch(), Err(JournalError::Truncated { .. })));
    assert!(matches!(journal.set_epoch(4), Err(JournalError::Truncated { .. })));
}

#[test]
fn a_journal_keeps_its_identity_and_one_that_was_begun_anew_has_another() {
    let (dir, journal) = state();
    let identity = journal.identity().unwrap();
    assert!(is_id(&identity), "{identity}");
    assert_eq!(journal.identity().unwrap(), identity);
    drop(journal);
    let journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.identity().unwrap(), identity);
    assert_eq!(names(&dir), [IDENTITY]);
    assert!(journal.read_all().unwrap().is_empty(), "the identity is not a migration's journal");
    drop(journal);
    fs::remove_dir_all(dir.path().join("journal")).unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    let other = journal.identity().unwrap();
    assert_ne!(other, identity);
    drop(journal);
    // Nothing that was said by a damaged one counts any more.
    fs::write(path(&dir, IDENTITY), b"").unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    assert_ne!(journal.identity().unwrap(), other);
}

#[test]
fn an_identity_that_is_not_durable_is_not_told() {
    let (_dir, journal) = state();
    journal.fail_syncs(true);
    assert!(journal.identity().is_err());
    journal.fail_syncs(false);
    let identity = journal.identity().unwrap();
    assert_eq!(journal.identity().unwrap(), identity);
}

#[test]
fn only_the_owner_can_read_the_journals() {
    let dir = TempDir::new().unwrap();
    let state_dir = dir.path().join("state");
    let journal = Journal::open(&state_dir).unwrap();
    drop(journal.create(&key("m"), b"1").unwrap());
    let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(state_dir.join("journal")), 0o700);
    assert_eq!(mode(state_dir.join("journal/m.source")), 0o600);
    assert_eq!(mode(state_dir.join("journal/m.source.spare")), 0o600);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_written_is_what_is_read(
        contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 1..6),
        exchanges: bool,
        finished: bool,
    ) {
        let (dir, journal) = state();
        let mut file = journal.create(&key("m"), b"first").unwrap();
        file.copies.exchanges = exchanges;
        for content in &contents {
            file.write(content).unwrap();
            prop_assert_eq!(&found(&journal, &key("m")).unwrap(), content);
        }
        let last = contents.last().unwrap();
        if finished {
            file.finish(last).unwrap();
        }
        drop((file, journal));
        let journal = Journal::open(dir.path()).unwrap();
        prop_assert_eq!(&found(&journal, &key("m")).unwrap(), last);
    }
}

#[test]
fn an_epoch_is_forgotten_only_while_no_agent_runs_and_no_migration_is_open() {
    let (dir, journal) = state();
    journal.set_epoch(2_147_483_646).unwrap();
    // Two copies.
    journal.set_epoch(2_147_483_647).unwrap();
    assert!(matches!(forget_epoch(dir.path()), Err(JournalError::Locked { .. })));
    let open = journal.create(&key("open"), b"1").unwrap();
    drop((journal, open));

    let refused = forget_epoch(dir.path()).unwrap_err().to_string();
    assert!(refused.contains("open.source is of a migration that has not ended here"), "{refused}");
    let journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.epoch().unwrap(), 2_147_483_647);
    journal.reopen(&key("open")).unwrap().finish(b"2").unwrap();
    drop(journal);
    fs::write(path(&dir, "damaged.destination"), b"SLKWJRNL?").unwrap();
    assert!(forget_epoch(dir.path()).is_err());
    fs::remove_file(path(&dir, "damaged.destination")).unwrap();

    assert_eq!(forget_epoch(dir.path()).unwrap(), Some(2_147_483_647));
    assert_eq!(names(&dir), ["open.source"]);
    let journal = Journal::open(dir.path()).unwrap();
    assert_eq!(journal.epoch().unwrap(), 0);
    journal.set_epoch(3).unwrap();
    assert_eq!(journal.epoch().unwrap(), 3);
}

#[test]
fn a_damaged_epoch_can_be_forgotten_and_a_mistyped_state_directory_is_not_made() {
    let (dir, journal) = state();
    drop(journal);
    fs::write(path(&dir, "epoch"), b"nothing of ours").unwrap();
    assert_eq!(forget_epoch(dir.path()).unwrap(), None);
    assert_eq!(forget_epoch(dir.path()).unwrap(), Some(0));
    let missing = dir.path().join("mistyped");
    assert!(matches!(forget_epoch(&missing), Err(JournalError::OpenDirectory { .. })));
    assert!(!missing.exists());
}
