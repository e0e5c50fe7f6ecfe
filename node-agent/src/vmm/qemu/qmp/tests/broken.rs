use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::server::{Server, greeting, soon};
use crate::vmm::qemu::qmp::commands::{Done, QueryStatus, Stop};
use crate::vmm::qemu::qmp::{Deadlines, Notice, QmpClient, QmpError};

const LONG: Duration = Duration::from_secs(15);
const HASTY: Deadlines = Deadlines { greeting: Duration::from_millis(100), command: LONG };

/// The error of a client whose server begins with this line.
async fn error_after(line: &str) -> String {
    let server = Server::new();
    let script = async {
        let mut talk = server.accept().await;
        talk.say(line).await;
        talk
    };
    let (client, _talk) = soon(async { tokio::join!(QmpClient::connect(&server.socket), script) }).await;
    let error = client.unwrap_err();
    assert!(matches!(&error, QmpError::NoGreeting { path, .. } if *path == server.socket), "{error:?}");
    error.to_string()
}

#[tokio::test]
async fn a_server_that_does_not_greet_as_qemu_does_is_refused() {
    let error = error_after("220 mail.example ESMTP").await;
    assert!(error.ends_with("a line is not a JSON object: `220 mail.example ESMTP`"), "{error}");
    let error = error_after(r#"{"return": {}}"#).await;
    assert!(error.ends_with("the first line is not a greeting: it is not a QMP socket"), "{error}");
    let error = error_after(r#"{"QMP": {"version": {"qemu": {"major": 10}}}}"#).await;
    assert!(error.ends_with("in `QMP`, field `version.qemu`: missing field `minor`"), "{error}");
}

#[tokio::test]
async fn a_monitor_that_another_client_holds_is_reported_as_such() {
    let server = Server::new();
    let (client, _silent) =
        soon(async { tokio::join!(QmpClient::connect_with(&server.socket, HASTY), server.accept()) }).await;
    let error = client.unwrap_err();
    assert!(matches!(error, QmpError::NoGreeting { .. }), "{error:?}");
    assert!(error.to_string().contains("another client may hold the monitor"), "{error}");
    assert!(error.to_string().contains("give the agent a socket of its own"), "{error}");
}

#[tokio::test]
async fn a_qemu_that_greets_and_then_hangs_is_not_mistaken_for_one_that_is_held() {
    let server = Server::new();
    let script = async {
        let mut talk = server.accept().await;
        talk.say(&greeting()).await;
        talk
    };
    let (client, _talk) =
        soon(async { tokio::join!(QmpClient::connect_with(&server.socket, HASTY), script) }).await;
    let error = client.unwrap_err().to_string();
    assert!(error.ends_with("did not answer qmp_capabilities within 100 ms: it hangs"), "{error}");
}

#[tokio::test]
async fn a_socket_without_a_server_is_reported_as_such() {
    let server = Server::new();
    let socket = server.socket.clone();
    drop(server.listener);
    let error = soon(QmpClient::connect(&socket)).await.unwrap_err().to_string();
    assert!(error.ends_with("no process listens on it: its QEMU has ended"), "{error}");
    std::fs::remove_file(&socket).unwrap();
    let error = soon(QmpClient::connect(&socket)).await.unwrap_err().to_string();
    assert!(error.contains("it does not exist"), "{error}");
}

#[tokio::test]
async fn a_command_in_flight_is_lost_and_not_repeated_and_the_next_one_connects_again() {
    let server = Server::new();
    let (client, mut talk) = server.connected(LONG).await;
    let mut events = client.events();
    let script = async {
        talk.expect("stop").await;
        drop(talk);
    };
    let (stop, ()) = soon(async { tokio::join!(client.execute(Stop), script) }).await;
    let closed = || "the connection was closed".to_owned();
    assert_eq!(stop, Err(QmpError::Lost { command: "stop".to_owned(), reason: closed() }));
    assert_eq!(soon(events.next()).await, Some(Notice::Lost { reason: closed() }));

    let script = async {
        let mut talk = server.negotiate().await;
        // Not stop.
        talk.answer("query-status", json!({"status": "running", "running": true})).await;
        talk
    };
    let (status, _talk) = soon(async { tokio::join!(client.execute(QueryStatus), script) }).await;
    status.unwrap();
    assert_eq!(soon(events.next()).await, Some(Notice::Reconnected));
}

#[tokio::test]
async fn many_commands_that_find_the_connection_broken_share_a_new_one() {
    let server = Server::new();
    let (client, talk) = server.connected(LONG).await;
    let mut events = client.events();
    drop(talk);
    soon(events.next()).await.unwrap();
    let script = async {
        let mut talk = server.negotiate().await;
        for _ in 0..3 {
            talk.answer("stop", json!({})).await;
        }
        talk
    };
    let (one, two, three, _talk) = soon(async {
        tokio::join!(client.execute(Stop), client.execute(Stop), client.execute(Stop), script)
    })
    .await;
    assert_eq!([one, two, three], [Ok(Done {}), Ok(Done {}), Ok(Done {})]);
}

#[tokio::test]
async fn a_command_that_cannot_connect_again_fails_and_the_next_one_tries_again() {
    let server = Server::new();
    let (client, talk) = server.connected(LONG).await;
    let mut events = client.events();
    let socket = server.socket.clone();
    let hidden = socket.with_extension("hidden");
    std::fs::rename(&socket, &hidden).unwrap();
    drop(talk);
    soon(events.next()).await.unwrap();
    let error = soon(client.execute(Stop)).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error:?}");

    std::fs::rename(&hidden, &socket).unwrap();
    let script = async {
        let mut talk = server.negotiate().await;
        talk.answer("stop", json!({})).await;
        talk
    };
    let (stop, _talk) = soon(async { tokio::join!(client.execute(Stop), script) }).await;
    assert_eq!(stop, Ok(Done {}));
}

#[tokio::test]
async fn garbage_ends_the_connection_and_is_quoted() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = async {
        talk.expect("stop").await;
        talk.say(r#"{"return": {}, "id"#).await;
        talk
    };
    let (stop, mut talk) = soon(async { tokio::join!(client.execute(Stop), script) }).await;
    let reason = r#"a line is not a JSON object: `{"return": {}, "id`"#.to_owned();
    assert_eq!(stop, Err(QmpError::Lost { command: "stop".to_owned(), reason }));
    assert!(soon(talk.lines.next_line()).await.unwrap().is_none(), "the client should have hung up");
}

#[tokio::test]
async fn a_line_without_an_end_ends_the_connection() {
    let (client, mut talk) = Server::new().connected(LONG).await;
    let script = async {
        talk.expect("stop").await;
        let mut written_bytes = 0;
        while written_bytes < 8 << 20 {
            match talk.to.write(&[b' '; 64 << 10]).await {
                Ok(bytes) => written_bytes += bytes,
                Err(_) => break,
            }
        }
        written_bytes
    };
    let (stop, written_bytes) = soon(async { tokio::join!(client.execute(Stop), script) }).await;
    let reason = "a line has more than 4194304 bytes, which is not a QMP message".to_owned();
    assert_eq!(stop, Err(QmpError::Lost { command: "stop".to_owned(), reason }));
    assert!(written_bytes < 6 << 20, "the client took {written_bytes} bytes");
}

#[tokio::test]
async fn a_server_that_does_not_read_holds_up_no_command_beyond_its_deadline() {
    let (client, talk) = Server::new().connected(Duration::from_millis(300)).await;
    let large = json!({"text": "x".repeat(1 << 20)});
    let commands = (0..80).map(|_| client.raw("echo", large.clone()));
    for answer in soon(futures::future::join_all(commands)).await {
        assert!(matches!(answer, Err(QmpError::Deadline { .. })), "{answer:?}");
    }
    // Those that were not written are not written any more.
    let mut talk = talk;
    let written = async {
        talk.expect("echo").await;
        talk.answer("stop", json!({})).await;
    };
    let (answer, ()) =
        soon(async { tokio::join!(client.raw_within("stop", Value::Null, LONG), written) }).await;
    assert_eq!(answer, Ok(json!({})));
}
