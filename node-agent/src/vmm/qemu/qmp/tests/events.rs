use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::server::{Server, Talk, soon};
use crate::vmm::qemu::qmp::commands::QueryStatus;
use crate::vmm::qemu::qmp::{EventKind, Events, MigrationStatus, Notice, QmpError, VfioState};

const LONG: Duration = Duration::from_secs(15);

async fn kind(events: &mut Events) -> EventKind {
    match soon(events.next()).await {
        Some(Notice::Event(event)) => event.kind,
        other => panic!("{other:?}"),
    }
}

async fn tell(talk: &mut Talk, name: &str, data: Value) {
    let timestamp = json!({"seconds": 1_795_431_934, "microseconds": 339_344});
    talk.say(&json!({"timestamp": timestamp, "event": name, "data": data}).to_string()).await;
}

#[tokio::test]
async fn events_between_answers_reach_every_subscriber() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let (mut one, mut two) = (client.events(), client.events());
    let script = async {
        let id = talk.expect("query-status").await["id"].clone();
        tell(&mut talk, "MIGRATION", json!({"status": "pre-switchover"})).await;
        let status = json!({"status": "running", "running": true});
        talk.say(&json!({"return": status, "id": id}).to_string()).await;
        let device =
            json!({"device-id": "v0", "qom-path": "/machine/peripheral/v0", "device-state": "stop-copy"});
        tell(&mut talk, "VFIO_MIGRATION", device).await;
    };
    let (status, ()) = soon(async { tokio::join!(client.execute(QueryStatus), script) }).await;
    assert!(status.unwrap().running);
    for events in [&mut one, &mut two] {
        assert_eq!(kind(events).await, EventKind::Migration { status: MigrationStatus::PreSwitchover });
        let device = EventKind::VfioMigration {
            device_id: "v0".to_owned(),
            qom_path: "/machine/peripheral/v0".to_owned(),
            state: VfioState::StopCopy,
        };
        assert_eq!(kind(events).await, device);
    }
}

#[tokio::test]
async fn an_event_has_qemus_time_and_an_unknown_one_keeps_its_data() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let mut events = client.events();
    tell(&mut talk, "DAYDREAM", json!({"of": "boats"})).await;
    talk.say(r#"{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}, "mood": "calm"}"#).await;
    tell(&mut talk, "MIGRATION", json!({"state": "?"})).await;
    tell(&mut talk, "MIGRATION_PASS", json!({"pass": 2})).await;
    tell(&mut talk, "SHUTDOWN", json!({"guest": false, "reason": "host-qmp-quit"})).await;
    tell(&mut talk, "DAYDREAM", json!("x".repeat(70_000))).await;

    let other = |name: &str, data| EventKind::Other { name: name.to_owned(), data };
    let Some(Notice::Event(first)) = soon(events.next()).await else { panic!("no event") };
    assert_eq!(first.kind, other("DAYDREAM", json!({"of": "boats"})));
    assert_eq!(first.timestamp, Some(UNIX_EPOCH + Duration::from_micros(1_795_431_934_339_344)));
    let Some(Notice::Event(second)) = soon(events.next()).await else { panic!("no event") };
    assert_eq!((second.kind, second.timestamp), (EventKind::Stop, None));
    assert_eq!(kind(&mut events).await, other("MIGRATION", json!({"state": "?"})));
    assert_eq!(kind(&mut events).await, EventKind::MigrationPass { pass: 2 });
    let reason = "host-qmp-quit".to_owned();
    assert_eq!(kind(&mut events).await, EventKind::Shutdown { guest: false, reason });
    assert_eq!(kind(&mut events).await, other("DAYDREAM", Value::Null));
}

#[tokio::test]
async fn a_slow_subscriber_learns_what_it_missed_and_holds_nothing_up() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let mut slow = client.events();
    let script = async {
        for pass in 1..=1000 {
            tell(&mut talk, "MIGRATION_PASS", json!({"pass": pass})).await;
        }
        talk.answer("query-status", json!({"status": "running", "running": true})).await;
    };
    let (status, ()) = soon(async { tokio::join!(client.execute(QueryStatus), script) }).await;
    status.unwrap();
    assert_eq!(soon(slow.next()).await, Some(Notice::Lagged { missed: 744 }));
    assert_eq!(kind(&mut slow).await, EventKind::MigrationPass { pass: 745 });
}

#[tokio::test]
async fn a_migration_is_awaited_by_events_and_without_them_by_queries() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = async {
        talk.answer("query-migrate", json!({})).await;
        talk.answer("query-migrate", json!({"status": "setup"})).await;
        tell(&mut talk, "MIGRATION", json!({"status": "active"})).await;
        talk.answer("query-migrate", json!({"status": "active"})).await;
        talk.answer("query-migrate", json!({"status": "completed", "downtime": 12})).await;
    };
    let until = client.migration_status_until(|info| info.status == Some(MigrationStatus::Completed));
    let (info, ()) = soon(async { tokio::join!(until, script) }).await;
    assert_eq!(info.unwrap().downtime_ms, Some(12));
}

#[tokio::test]
async fn a_migration_is_awaited_over_a_broken_connection_until_there_is_none() {
    let server = Server::new();
    let (client, mut talk) = server.connected(LONG).await;
    let script = async {
        talk.expect("query-migrate").await;
        drop(talk);
        let mut talk = server.negotiate().await;
        talk.answer("query-migrate", json!({"status": "active"})).await;
        drop(talk);
        drop(server);
    };
    let until = client.migration_status_until(|info| info.status == Some(MigrationStatus::Completed));
    let (info, ()) = soon(async { tokio::join!(until, script) }).await;
    // The path is gone with the server, or, if the query was faster, its listener only.
    assert!(matches!(info, Err(QmpError::Connect { .. } | QmpError::NoGreeting { .. })), "{info:?}");
}
