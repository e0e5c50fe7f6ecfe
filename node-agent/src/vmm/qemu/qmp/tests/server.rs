//! A QMP server that does what the test says.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use crate::vmm::qemu::qmp::{Deadlines, QmpClient};

pub(in crate::vmm::qemu) const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10},
    "package": "Debian", "mood": "good"}, "capabilities": ["oob"], "future": {}}}"#;

pub(in crate::vmm::qemu) fn greeting() -> String {
    GREETING.replace('\n', "")
}

/// No test takes longer.
pub(in crate::vmm::qemu) async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), what).await.expect("it should not take that long")
}

pub(in crate::vmm::qemu) struct Server {
    _dir: TempDir,
    pub(in crate::vmm::qemu) socket: PathBuf,
    pub(in crate::vmm::qemu) listener: UnixListener,
}

impl Server {
    pub(in crate::vmm::qemu) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o600)).unwrap();
        Self { _dir: dir, socket, listener }
    }

    /// Takes a connection and says nothing.
    pub(in crate::vmm::qemu) async fn accept(&self) -> Talk {
        let (stream, _) = soon(self.listener.accept()).await.unwrap();
        let (from, to) = stream.into_split();
        Talk { lines: BufReader::new(from).lines(), to }
    }

    /// Takes a connection and negotiates as QEMU does.
    pub(in crate::vmm::qemu) async fn negotiate(&self) -> Talk {
        let mut talk = self.accept().await;
        talk.say(&greeting()).await;
        let id = talk.expect("qmp_capabilities").await["id"].clone();
        talk.say(&json!({"return": {}, "id": id}).to_string()).await;
        talk
    }

    /// A client and the server's end of its connection.
    pub(in crate::vmm::qemu) async fn connected(&self, command: Duration) -> (QmpClient, Talk) {
        let deadlines = Deadlines { command, ..Deadlines::default() };
        let (client, talk) = tokio::join!(QmpClient::connect_with(&self.socket, deadlines), self.negotiate());
        (client.unwrap(), talk)
    }
}

pub(in crate::vmm::qemu) struct Talk {
    pub(in crate::vmm::qemu) lines: Lines<BufReader<OwnedReadHalf>>,
    pub(in crate::vmm::qemu) to: OwnedWriteHalf,
}

impl Talk {
    pub(in crate::vmm::qemu) async fn say(&mut self, line: &str) {
        self.to.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    /// The next command.
    pub(in crate::vmm::qemu) async fn next(&mut self) -> Value {
        let line = soon(self.lines.next_line()).await.unwrap().expect("the client is gone");
        serde_json::from_str(&line).unwrap()
    }

    /// The next command, which is this one.
    pub(in crate::vmm::qemu) async fn expect(&mut self, command: &str) -> Value {
        let request = self.next().await;
        assert_eq!(request["execute"], command);
        request
    }

    /// Takes the next command, which is this one, and answers it.
    pub(in crate::vmm::qemu) async fn answer(&mut self, command: &str, answer: Value) {
        let id = self.expect(command).await["id"].clone();
        self.say(&json!({"return": answer, "id": id}).to_string()).await;
    }
}
