//! The protocol between the lab and a node's control service.
//!
//! A message is one line of JSON, and behind it as many bytes of payload as the line announces (a file's
//! content, a program's output). A connection carries requests one after the other; a client that needs two
//! at once opens two connections. The port is reachable from the loopback interface of the lab's machine
//! only.

use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Where the service listens inside a node.
pub const CONTROL_PORT: u16 = 7000;

/// The line that the service prints to the node's serial console once it listens.
pub const READY_LINE: &str = "slackwater-lab-node: ready";

/// The largest payload. A message that announces more is invalid.
pub const MAX_PAYLOAD_BYTES: u64 = 1 << 30;

/// A request of the lab to a node. Programs are argument vectors: there is no shell unless one is
/// named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Runs a program to its end. The payload is its standard input. When time is up its whole process group
    /// is killed.
    Exec {
        /// Program and arguments.
        argv: Vec<String>,
        /// How long it may take.
        timeout_ms: u64,
    },
    /// Starts a program in the background, in a session and a cgroup of its own. Each line that it prints
    /// goes to `/var/log/NAME.log` and, behind its name, to the serial console.
    Spawn {
        /// Names the cgroup and the log.
        name: String,
        /// Program and arguments.
        argv: Vec<String>,
        /// Added to the environment.
        env: Vec<(String, String)>,
    },
    /// Waits for a process to end: one that was spawned, or any other.
    Wait {
        /// The process.
        pid: u32,
        /// How long to wait.
        timeout_ms: u64,
    },
    /// Waits for a line with `text` in it in the log of what was last spawned under `name`.
    WaitLine {
        /// The name passed to `Spawn`.
        name: String,
        /// What the line contains.
        text: String,
        /// How long to wait.
        timeout_ms: u64,
    },
    /// Sends a signal, by its number.
    Signal {
        /// To whom.
        pid: u32,
        /// Which.
        signal: i32,
    },
    /// Kills (SIGKILL) all that lives in the cgroup of what was spawned under `name`, and waits until it is
    /// empty.
    KillGroup {
        /// The name passed to `Spawn`.
        name: String,
    },
    /// Writes the payload to a file, whose folders are made.
    Put {
        /// Absolute.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Reads a file to its end, also one without a size (under /proc and /sys).
    Get {
        /// Absolute.
        path: String,
    },
    /// Reads the node's CLOCK_MONOTONIC.
    Clock,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// With this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
    /// Not known: it was not the service's child.
    Unknown,
}

/// What the node answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "done", rename_all = "snake_case")]
pub enum Response {
    /// `Exec`: the payload is the standard output, then the standard error.
    Exec {
        /// How it ended; none: its time was up.
        ending: Option<Ending>,
        /// How much of the payload is standard output.
        stdout_bytes: u64,
    },
    /// `Spawn`.
    Spawned {
        /// The program's process.
        pid: u32,
    },
    /// `Wait`.
    Ended {
        /// How; none: its time was up.
        ending: Option<Ending>,
    },
    /// `WaitLine`.
    Line {
        /// The line; none: there was none in time, or the program ended without it.
        line: Option<String>,
    },
    /// `Signal`, `KillGroup`, `Put`.
    Done,
    /// `Get`: the payload is the content.
    Content,
    /// `Clock`.
    Clock {
        /// Nanoseconds of CLOCK_MONOTONIC.
        monotonic_ns: u64,
    },
    /// The request failed.
    Failed {
        /// Why, for people.
        message: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    #[serde(flatten)]
    message: T,
    #[serde(default)]
    payload_bytes: u64,
}

/// Encodes a message with its payload.
///
/// # Errors
/// When the message cannot be written as JSON.
pub fn encode<T: Serialize>(message: &T, payload: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(&Envelope { message, payload_bytes: payload.len() as u64 })?;
    bytes.push(b'\n');
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Decodes the line of a message, and says how many bytes of payload follow.
///
/// # Errors
/// `InvalidData` when it is not a message, or announces more than [`MAX_PAYLOAD_BYTES`].
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> io::Result<(T, usize)> {
    let envelope: Envelope<T> = serde_json::from_slice(line)?;
    if envelope.payload_bytes > MAX_PAYLOAD_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "payload too large"));
    }
    let bytes = usize::try_from(envelope.payload_bytes).map_err(io::Error::other)?;
    Ok((envelope.message, bytes))
}

/// Reads one message; none at the end of the connection.
///
/// # Errors
/// As the reader's, and as [`decode`]'s.
pub fn read<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<(T, Vec<u8>)>> {
    let mut line = Vec::new();
    if from.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    let (message, bytes) = decode(&line)?;
    let mut payload = vec![0; bytes];
    from.read_exact(&mut payload)?;
    Ok(Some((message, payload)))
}

/// Writes one message.
///
/// # Errors
/// As the writer's.
pub fn write<T: Serialize>(to: &mut impl Write, message: &T, payload: &[u8]) -> io::Result<()> {
    to.write_all(&encode(message, payload)?)?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_with_its_payload() {
        let request = Request::Put { path: "/a".into(), mode: 0o600 };
        let bytes = encode(&request, b"x\ny").unwrap();
        let mut from = bytes.as_slice();
        assert_eq!(read::<Request>(&mut from).unwrap(), Some((request, b"x\ny".to_vec())));
        assert_eq!(read::<Request>(&mut from).unwrap(), None);
    }

    #[test]
    fn a_message_without_fields_comes_back() {
        let bytes = encode(&Request::Clock, b"").unwrap();
        assert_eq!(read::<Request>(&mut bytes.as_slice()).unwrap(), Some((Request::Clock, vec![])));
    }

    #[test]
    fn a_payload_that_is_announced_too_large_is_refused() {
        let line = format!(r#"{{"do":"clock","payload_bytes":{}}}"#, MAX_PAYLOAD_BYTES + 1);
        assert!(decode::<Request>(line.as_bytes()).is_err());
    }
}
