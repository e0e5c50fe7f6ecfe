//! The part of QEMU's machine protocol (QMP) that the lab needs: commands, one at a time.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixListener,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

use crate::error::LabError;

const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection to one QEMU.
#[derive(Debug)]
pub(crate) struct Qmp {
    lines: Lines<BufReader<OwnedReadHalf>>,
    to: OwnedWriteHalf,
}

impl Qmp {
    /// Accepts QEMU's connection and negotiates capabilities.
    pub(crate) async fn accept(listener: &UnixListener) -> Result<Self, LabError> {
        let talk = async {
            let (stream, _) = listener.accept().await.map_err(LabError::io("taking QEMU's connection"))?;
            let (from, to) = stream.into_split();
            let mut qmp = Self { lines: BufReader::new(from).lines(), to };
            qmp.execute("qmp_capabilities", json!({})).await?;
            Ok(qmp)
        };
        timeout(COMMAND_TIMEOUT, talk).await.map_err(|_| timed_out("QEMU's connection"))?
    }

    /// Executes a command and returns what it returned.
    pub(crate) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, LabError> {
        let talk = async {
            let request = json!({"execute": command, "arguments": arguments});
            self.to
                .write_all(format!("{request}\n").as_bytes())
                .await
                .map_err(LabError::io(format!("sending {command} to QEMU")))?;
            loop {
                let line = self
                    .lines
                    .next_line()
                    .await
                    .map_err(LabError::io(format!("reading QEMU's answer to {command}")))?
                    .ok_or_else(|| command_failed(command, "the connection was closed"))?;
                let mut answer: Value = serde_json::from_str(&line)
                    .map_err(|error| command_failed(command, &format!("{error}: {line}")))?;
                if let Some(error) = answer.get("error") {
                    return Err(command_failed(command, &error.to_string()));
                }
                // Anything else is an event, or the greeting.
                if let Some(value) = answer.get_mut("return") {
                    return Ok(value.take());
                }
            }
        };
        timeout(COMMAND_TIMEOUT, talk).await.map_err(|_| timed_out(command))?
    }
}

fn command_failed(command: &str, message: &str) -> LabError {
    LabError::Refused { node: "QEMU".into(), message: format!("{command}: {message}") }
}

fn timed_out(action: &str) -> LabError {
    LabError::TimedOut { action: action.to_owned(), seconds: COMMAND_TIMEOUT.as_secs() }
}

/// The ports of this machine that lead into the node, out of the monitor's `info usernet`: (ours, the
/// node's).
pub(crate) fn forwarded_ports(usernet: &str) -> Vec<(u16, u16)> {
    let pair = |line: &str| {
        let mut words = line.split_whitespace();
        if words.next()? != "TCP[HOST_FORWARD]" {
            return None;
        }
        let (_descriptor, _address, ours, _node, theirs) =
            (words.next()?, words.next()?, words.next()?, words.next()?, words.next()?);
        Some((ours.parse().ok()?, theirs.parse().ok()?))
    };
    usernet.lines().filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_ports_are_read_from_the_monitor() {
        let text = "Hub -1 (host0):\r\n  \
                    Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                    TCP[HOST_FORWARD]  15       127.0.0.1 41234       10.0.2.15  7000     0     0\r\n  \
                    TCP[ESTABLISHED]  15       127.0.0.1 41234       10.0.2.15  7000     0     0\r\n";
        assert_eq!(forwarded_ports(text), [(41234, 7000)]);
    }
}
