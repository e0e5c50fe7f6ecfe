//! VMMigrations that have ended: how long they stay, and what becomes of a copy of one.

use std::collections::BTreeMap;

use kube::ResourceExt;
use kube::api::PostParams;
use slackwater_api::{
    ACCEPTED_AS_ANNOTATION, MIGRATION_FINALIZER, MigrationPhase, VMMigration, VMMigrationSpec,
};
use slackwater_proto::node::{Outcome, Phase};

use crate::world::{World, is, message};

#[tokio::test]
async fn an_ended_migration_is_deleted_when_its_time_has_passed_and_a_copy_of_it_does_not_run_again() {
    let world = World::start().await;
    let migration = world.migrate("move-counter", |spec| spec.ttl_seconds_after_finished = Some(1)).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::Committed);
    world.a.phase(Phase::Started);
    let running = world.until("move-counter", "be committed", is("Committed", "True")).await;
    let uid = migration.uid().unwrap();
    assert_eq!(running.annotations().get(ACCEPTED_AS_ANNOTATION), Some(&uid));
    world.a.finish(Outcome::Succeeded, "", "");
    world.until_gone(&migration).await;
    world.b.until_acknowledged(&uid, 1).await;

    // As a backup has it: with the annotation and the finalizer, without the status.
    let mut copy = VMMigration::new("move-counter", VMMigrationSpec::new("counter"));
    copy.metadata.annotations = Some(BTreeMap::from([(ACCEPTED_AS_ANNOTATION.to_owned(), uid)]));
    copy.metadata.finalizers = Some(vec![MIGRATION_FINALIZER.to_owned()]);
    let copy = world.migrations().create(&PostParams::default(), &copy).await.unwrap();
    let refused = world.until("move-counter", "be refused", is("Accepted", "False/RestoredCopy")).await;
    assert!(message(&refused, "Succeeded").contains("create a VMMigration without that annotation"));
    assert_eq!(refused.status.unwrap().phase, Some(MigrationPhase::Refused));
    assert_eq!(world.b.calls().len(), 1, "{:#?}", world.b.calls());
    world.delete("move-counter").await;
    world.until_gone(&copy).await;
    world.assert_nothing_was_forbidden();
}
