//! Sends one command to a QEMU in the node over QMP, or runs one migration to its end.

use std::{
    io::{BufRead, BufReader, Lines, Write},
    os::unix::net::UnixStream,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Executes a command with these arguments (JSON) and prints what it returned. The socket serves one client
/// at a time: others wait until this is done.
pub(super) fn execute(socket: &str, command: &str, arguments: &str) -> anyhow::Result<()> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connecting to {socket}"))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    ask(&stream, &mut lines, "qmp_capabilities", &json!({}))?;
    println!("{}", ask(&stream, &mut lines, command, &serde_json::from_str(arguments)?)?);
    Ok(())
}

/// Starts a migration, waits for its end without polling, and prints what `query-migrate` returns then. The
/// migration's events must be enabled.
pub(super) fn migrate(socket: &str, uri: &str) -> anyhow::Result<()> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connecting to {socket}"))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    ask(&stream, &mut lines, "qmp_capabilities", &json!({}))?;
    ask(&stream, &mut lines, "migrate", &json!({ "uri": uri }))?;
    let mut said = ask(&stream, &mut lines, "query-migrate", &json!({}))?;
    while !is_over(&said) {
        let line = lines.next().context("the connection was closed during the migration")??;
        let event: Value = serde_json::from_str(&line)?;
        let ended = event.get("event").is_some_and(|name| name == "MIGRATION")
            && event.get("data").is_some_and(is_over);
        if ended {
            said = ask(&stream, &mut lines, "query-migrate", &json!({}))?;
        }
    }
    println!("{said}");
    Ok(())
}

/// Whether a migration with this status has ended.
fn is_over(said: &Value) -> bool {
    let status = said.get("status").and_then(Value::as_str);
    status.is_some_and(|status| matches!(status, "completed" | "failed" | "cancelled"))
}

fn ask(
    mut to: &UnixStream,
    lines: &mut Lines<BufReader<UnixStream>>,
    command: &str,
    arguments: &Value,
) -> anyhow::Result<Value> {
    writeln!(to, "{}", json!({"execute": command, "arguments": arguments}))?;
    for line in lines {
        let mut answer: Value = serde_json::from_str(&line?)?;
        if let Some(error) = answer.get("error") {
            bail!("{command}: {error}");
        }
        // Anything else is an event, or the greeting.
        if let Some(value) = answer.get_mut("return") {
            return Ok(value.take());
        }
    }
    bail!("{command}: the connection was closed")
}
