use tempfile::TempDir;

use super::*;
use crate::attempt::entry::tests::entry;
use crate::journal::Role;

struct Rig {
    _folder: TempDir,
    journal: Arc<Journal>,
    ledger: Ledger,
}

fn rig() -> Rig {
    let folder = TempDir::new().unwrap();
    let journal = Arc::new(Journal::open(folder.path()).unwrap());
    let key = Key::new("3f", Role::Source).unwrap();
    let ledger = Ledger::new(Arc::clone(&journal), key, entry());
    Rig { _folder: folder, journal, ledger }
}

impl Rig {
    async fn record(&self, record: Record) -> Result<(), Failure> {
        let (done, recorded) = tokio::sync::oneshot::channel();
        self.ledger.record(record, None, false, move |result| {
            let _ = done.send(result);
        });
        recorded.await.unwrap()
    }

    /// What an agent that starts now finds; None: nothing.
    fn found(&self) -> Option<Entry> {
        let content = self.journal.read_all().unwrap().pop()?.1;
        Some(Entry::parse(&content.unwrap()).unwrap())
    }
}

#[tokio::test]
async fn an_end_that_cannot_be_recorded_is_told_to_callers_and_recorded_as_soon_as_that_is_possible() {
    let rig = rig();
    rig.record(Record::Saving).await.unwrap();
    rig.record(Record::Aborted).await.unwrap();
    rig.journal.fail_syncs(true);
    let mut end = rig.ledger.end();
    rig.ledger.finish(None, Ended::default()).await;
    assert!(rig.ledger.state().ended, "a caller hears of it");
    assert_eq!(rig.found().unwrap().ended, None, "the next agent does not");
    let EndRecord::Failing(why) = end.wait_for(|end| *end != EndRecord::Open).await.unwrap().clone() else {
        panic!("it is taken for durable")
    };
    assert!(why.contains("3f.source") && why.contains("Input/output error"), "{why}");
    // That it goes on trying shows only in that it has not given up: far beyond the first few tries.
    tokio::time::sleep(30 * LONGEST_PAUSE).await;
    assert!(matches!(*end.borrow(), EndRecord::Failing(_)));
    rig.journal.fail_syncs(false);
    end.wait_for(|end| *end == EndRecord::Durable).await.unwrap();
    assert_eq!(rig.found().unwrap().ended, Some(Ended::default()));
}

#[tokio::test]
async fn an_attempt_whose_first_record_failed_has_not_ended_before_it_is_durable_that_nothing_is_left() {
    let rig = rig();
    rig.journal.fail_syncs(true);
    rig.record(Record::Saving).await.unwrap_err();
    let mut end = rig.ledger.end();
    rig.ledger.finish(None, Ended::default()).await;
    assert!(matches!(*end.wait_for(|end| *end != EndRecord::Open).await.unwrap(), EndRecord::Failing(_)));
    assert_eq!(rig.ledger.state(), JournalState::default(), "nothing was begun");
    rig.journal.fail_syncs(false);
    end.wait_for(|end| *end == EndRecord::Durable).await.unwrap();
    assert!(rig.found().is_none_or(|entry| entry.ended.is_some()));
}

#[tokio::test]
async fn an_attempt_that_recorded_nothing_has_ended_at_once() {
    let rig = rig();
    rig.ledger.finish(None, Ended::default()).await;
    assert_eq!(*rig.ledger.end().borrow(), EndRecord::Durable);
    assert_eq!(rig.found(), None);
}
