//! A server that is not a QEMU, on a socket where the agent expects one: tests that the agent survives it.

use std::{
    io::Write,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    thread,
};

use anyhow::Context;
use strum::EnumString;

/// What it sends to each client.
#[derive(Clone, Copy, EnumString)]
#[strum(serialize_all = "kebab-case")]
enum Babble {
    /// A line that is not a message, again and again.
    Garbage,
    /// One line, without an end.
    Endless,
    /// A greeting, and then one line without an end: the client has already accepted it as a QEMU.
    GreetedEndless,
    /// Nothing, like a monitor that serves another client.
    Silent,
}

const GREETING: &str = concat!(
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#,
    "\n"
);

/// Serves the socket, for this user alone, until it is killed.
pub(super) fn serve(socket: &str, what: &str) -> anyhow::Result<()> {
    let babble: Babble = what.parse().with_context(|| {
        format!("cannot serve {what:?}: expected garbage, endless, greeted-endless or silent")
    })?;
    // A client must not connect before the mode is set: the socket gets its name only then.
    let unnamed = format!("{socket}.new");
    let listener = UnixListener::bind(&unnamed).with_context(|| format!("binding {unnamed}"))?;
    std::fs::set_permissions(&unnamed, PermissionsExt::from_mode(0o600))?;
    std::fs::rename(&unnamed, socket).with_context(|| format!("naming {socket}"))?;
    println!("babbling {what} on {socket}");
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            // It ends when the client closes the connection.
            let sent = send(stream, babble);
            println!("a client has left: {sent:?}");
        });
    }
    Ok(())
}

fn send(mut stream: UnixStream, babble: Babble) -> std::io::Result<()> {
    let piece: Vec<u8> = match babble {
        Babble::Garbage => b"\x80\xff{not json]\n".repeat(64),
        Babble::Endless | Babble::GreetedEndless => vec![b'x'; 64 << 10],
        Babble::Silent => return std::io::copy(&mut stream, &mut std::io::sink()).map(drop),
    };
    if matches!(babble, Babble::GreetedEndless) {
        stream.write_all(GREETING.as_bytes())?;
    }
    loop {
        stream.write_all(&piece)?;
    }
}
