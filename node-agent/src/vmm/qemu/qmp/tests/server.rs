//! A QMP server that does what the test says.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use crate::vmm::qemu::qmp::{Deadlines, QmpClient};

pub(super) const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10},
    "package": "Debian", "mood": "good"}, "capabilities": ["oob"], "future": {}}}"#;

pub(super) fn greeting() -> String {
    GREETING.replace('\n', "")
}

/// No test takes longer.
pub(super) async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), what).await.expect("it should not take that long")
}

pub(super) struct Server {
    _dir: TempDir,
    pub(super) socket: PathBuf,
    pub(super) listener: UnixListener,
}

impl Server {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        Self { _dir: dir, socket, listener }
    }

    /// Takes a connection and says nothing.
    pub(super) async fn accept(&self) -> Talk {
        let (stream, _) = soon(self.listener.accept()).await.unwrap();
        let (from, to) = stream.into_split();
        Talk { lines: BufReader::new(from).lines(), to }
    }

    /// Takes a connection and negotiates as QEMU does.
    pub(super) async fn negotiate(&self) -> Talk {
        let mut talk = self.accept().await;
        talk.say(&greeting()).await;
        let id = talk.expect("qmp_capabilities").await["id"].clone();
        talk.say(&json!({"return": {}, "id": id}).to_string()).await;
        talk
    }

    /// A client and the server's end of its connection.
    pub(super) async fn connected(&self, command: Duration) -> (QmpClient, Talk) {
        let deadlines = Deadlines { command, ..Deadlines::default() };
        let (client, talk) = tokio::join!(QmpClient::connect_with(&self.socket, deadlines), self.negotiate());
        (client.unwrap(), talk)
    }
}

pub(super) struct Talk {
    pub(super) lines: Lines<BufReader<OwnedReadHalf>>,
    pub(super) to: OwnedWriteHalf,
}

impl Talk {
    pub(super) async fn say(&mut self, line: &str) {
        self.to.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    /// The next command.
    pub(super) async fn next(&mut self) -> Value {
        let line = soon(self.lines.next_line()).await.unwrap().expect("the client is gone");
        serde_json::from_str(&line).unwrap()
    }

    /// The next command, which is this one.
    pub(super) async fn expect(&mut self, command: &str) -> Value {
        let request = self.next().await;
        assert_eq!(request["execute"], command);
        request
    }

    /// Takes the next command, which is this one, and answers it.
    pub(super) async fn answer(&mut self, command: &str, answer: Value) {
        let id = self.expect(command).await["id"].clone();
        self.say(&json!({"return": answer, "id": id}).to_string()).await;
    }
}
