use std::time::Duration;

use serde_json::{Value, json};

use super::server::{Server, soon};
use crate::vmm::qemu::qmp::commands::{
    Done, Migrate, MigrateContinue, MigrateSetCapabilities, MigrateSetParameters, MigrationCapability,
    QomList, QueryMigrateParameters, QueryStatus, StatusInfo, Stop, VersionTriple,
};
use crate::vmm::qemu::qmp::{Command, QmpError, RunState};

const LONG: Duration = Duration::from_secs(15);

#[tokio::test]
async fn the_greeting_has_the_version() {
    let (client, _talk) = Server::new().connected(LONG).await;
    assert_eq!(client.version().qemu, VersionTriple { major: 10, minor: 0, micro: 2 });
    assert_eq!(client.version().to_string(), "10.0.2 (Debian)");
}

#[tokio::test]
async fn answers_that_come_out_of_order_find_their_commands() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = async {
        let mut ids = Vec::new();
        for _ in 0..3 {
            let request = talk.next().await;
            ids.push((request["execute"].clone(), request["id"].clone()));
        }
        for (name, id) in ids.iter().rev() {
            talk.say(&json!({"return": name, "id": id}).to_string()).await;
        }
    };
    let (one, two, three, ()) = soon(async {
        tokio::join!(
            client.raw("one", Value::Null),
            client.raw("two", Value::Null),
            client.raw("three", Value::Null),
            script
        )
    })
    .await;
    assert_eq!([one, two, three], [Ok(json!("one")), Ok(json!("two")), Ok(json!("three"))]);
}

#[tokio::test]
async fn unknown_fields_and_answers_without_a_command_are_ignored() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = async {
        let id = talk.expect("query-status").await["id"].clone();
        talk.say(r#"{"return": {}, "id": 4711}"#).await;
        talk.say(r#"{"return": {}, "id": "libvirt-12"}"#).await;
        talk.say(r#"{"error": {"class": "GenericError", "desc": "of a command without an id"}}"#).await;
        talk.say(r#"{"daydream": true}"#).await;
        let status = json!({"status": "daydreaming", "running": false, "singlestep": false});
        talk.say(&json!({"return": status, "id": id, "seal": 1}).to_string()).await;
    };
    let (status, ()) = soon(async { tokio::join!(client.execute(QueryStatus), script) }).await;
    let expected = StatusInfo { status: RunState::Other("daydreaming".to_owned()), running: false };
    assert_eq!(status, Ok(expected));
}

#[tokio::test]
async fn a_refused_command_has_qemus_class_and_message() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = async {
        let id = talk.expect("stop").await["id"].clone();
        let error = json!({"class": "GenericError", "desc": "not today"});
        talk.say(&json!({"error": error, "id": id}).to_string()).await;
        talk.answer("stop", json!({})).await;
    };
    let (refused, ()) = soon(async {
        tokio::join!(
            async {
                let refused = client.execute(Stop).await.unwrap_err();
                assert_eq!(client.execute(Stop).await, Ok(Done {}));
                refused
            },
            script
        )
    })
    .await;
    let (command, class, desc) = ("stop".to_owned(), "GenericError".to_owned(), "not today".to_owned());
    assert_eq!(refused.to_string(), "QEMU refused stop: not today (GenericError)");
    assert_eq!(refused, QmpError::Refused { command, class, desc });
}

#[tokio::test]
async fn a_command_that_is_not_answered_ends_at_its_deadline_and_its_late_answer_is_ignored() {
    let (client, mut talk) = Server::new().connected(Duration::from_millis(50)).await;
    let late = soon(client.execute(Stop)).await.unwrap_err();
    let limit = Duration::from_millis(50);
    assert_eq!(late, QmpError::Deadline { command: "stop".to_owned(), limit });

    let script = async {
        talk.answer("stop", json!({})).await;
        talk.answer("query-status", json!({"status": "paused", "running": false})).await;
    };
    let (status, ()) = soon(async { tokio::join!(client.execute_within(QueryStatus, LONG), script) }).await;
    assert_eq!(status.unwrap().status, RunState::Paused);
}

#[tokio::test]
async fn an_answer_that_cannot_be_parsed_names_its_field() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = talk.answer("query-status", json!({"status": "running", "running": "yes"}));
    let (answer, ()) = soon(async { tokio::join!(client.execute(QueryStatus), script) }).await;
    assert_eq!(
        answer.unwrap_err().to_string(),
        "QEMU's answer to query-status cannot be understood: field `running`: invalid type: string \"yes\", \
         expected a boolean"
    );
}

#[tokio::test]
async fn devices_are_the_children_that_have_an_id() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = talk.answer(
        "qom-list",
        json!([{"name": "type", "type": "string"}, {"name": "v0", "type": "child<vfio-pci>"}]),
    );
    let list = QomList { path: "/machine/peripheral".to_owned() };
    let (properties, ()) = soon(async { tokio::join!(client.execute(list), script) }).await;
    let properties = properties.unwrap();
    let devices = properties.iter().filter_map(|property| Some((&*property.name, property.child_type()?)));
    assert_eq!(devices.collect::<Vec<_>>(), [("v0", "vfio-pci")]);
}

#[tokio::test]
async fn dropped_clients_leave_the_monitor_free() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    drop(client.clone());
    let script = talk.answer("stop", json!({}));
    let (answer, ()) = soon(async { tokio::join!(client.execute(Stop), script) }).await;
    assert_eq!(answer, Ok(Done {}));
    drop(client);
    assert!(soon(talk.lines.next_line()).await.unwrap().is_none());
}

#[test]
fn commands_are_written_as_in_qapi() {
    fn written<C: Command>(command: &C) -> (&'static str, Value) {
        (C::NAME, serde_json::to_value(command).unwrap())
    }
    assert_eq!(written(&QueryStatus), ("query-status", Value::Null));
    assert_eq!(
        written(&MigrateSetCapabilities {
            capabilities: vec![MigrationCapability::on("events"), MigrationCapability::off("multifd")]
        }),
        (
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "events", "state": true},
                              {"capability": "multifd", "state": false}]})
        )
    );
    let parameters = MigrateSetParameters {
        downtime_limit_ms: Some(900),
        avail_switchover_bandwidth: Some(1 << 30),
        ..Default::default()
    };
    assert_eq!(
        written(&parameters),
        (
            "migrate-set-parameters",
            json!({"downtime-limit": 900, "avail-switchover-bandwidth": 1_073_741_824})
        )
    );
    assert_eq!(written(&Migrate { uri: "unix:/m".to_owned() }), ("migrate", json!({"uri": "unix:/m"})));
    let switch_over = MigrateContinue::switch_over();
    assert_eq!(written(&switch_over), ("migrate-continue", json!({"state": "pre-switchover"})));
}

#[tokio::test]
async fn a_large_number_among_the_parameters_is_unchanged() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = talk.answer("query-migrate-parameters", json!({"max-bandwidth": u64::MAX, "tls-creds": ""}));
    let (answer, ()) = soon(async { tokio::join!(client.execute(QueryMigrateParameters), script) }).await;
    let parameters = answer.unwrap();
    assert_eq!((parameters.max_bandwidth, parameters.downtime_limit_ms), (Some(u64::MAX), None));
    assert_eq!(parameters.rest["tls-creds"], "");
}
