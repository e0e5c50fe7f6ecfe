//! One command for a QEMU in the node, by its machine protocol.

use std::{
    io::{BufRead, BufReader, Lines, Write},
    os::unix::net::UnixStream,
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Executes a command with these arguments (JSON) and prints what it returned. The socket serves one client at a time: others
/// wait until this is done.
pub(super) fn execute(socket: &str, command: &str, arguments: &str) -> anyhow::Result<()> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connecting to {socket}"))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    ask(&stream, &mut lines, "qmp_capabilities", &json!({}))?;
    println!("{}", ask(&stream, &mut lines, command, &serde_json::from_str(arguments)?)?);
    Ok(())
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
