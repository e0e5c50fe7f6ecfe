//! Pretends to be another version of QEMU in a node: runs the real one, and changes its answers on its
//! monitor.
//!
//! It takes QEMU's arguments. The real program is `/bin/real-qemu`. Each line of `/etc/other-qemu` is a text,
//! a tab, and the text that replaces it. Without `-qmp unix:PATH,...` it becomes the real program.

use std::{
    fs,
    io::{BufRead, BufReader, Write, copy},
    os::unix::{
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    process::Command,
    thread,
    time::Duration,
};

use anyhow::Context;

const REAL: &str = "/bin/real-qemu";
const RULES: &str = "/etc/other-qemu";

fn main() -> anyhow::Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let monitor = arguments.iter().position(|argument| argument == "-qmp").map(|index| index + 1);
    let Some(monitor) = monitor.and_then(|index| arguments.get_mut(index)) else {
        return Err(Command::new(REAL).args(arguments).exec()).context(REAL);
    };
    let path =
        monitor.strip_prefix("unix:").and_then(|rest| rest.split(',').next()).context("-qmp")?.to_owned();
    let behind = format!("{path}.real");
    *monitor = format!("unix:{behind},server=on,wait=off");
    let rules = fs::read_to_string(RULES).context(RULES)?;
    let rules: Vec<(String, String)> = rules
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(from, to)| (from.to_owned(), to.to_owned()))
        .collect();
    let mut real = Command::new(REAL).args(&arguments).spawn().context(REAL)?;
    while !std::path::Path::new(&behind).exists() {
        if let Some(status) = real.try_wait()? {
            std::process::exit(status.code().unwrap_or(1));
        }
        thread::sleep(Duration::from_millis(5));
    }
    let listener = UnixListener::bind(&path).with_context(|| path.clone())?;
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            // If one side closes its connection, so does the other.
            let _ = serve(&client, &behind, &rules);
        }
    });
    let status = real.wait()?;
    let _ = fs::remove_file(&path);
    std::process::exit(status.code().unwrap_or(1));
}

fn serve(client: &UnixStream, behind: &str, rules: &[(String, String)]) -> anyhow::Result<()> {
    let server = loop {
        match UnixStream::connect(behind) {
            Ok(server) => break server,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    };
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let _ = copy(&mut from_client, &mut to_server);
        to_server.shutdown(std::net::Shutdown::Both)
    });
    let mut to_client = client;
    for line in BufReader::new(&server).lines() {
        let mut line = line?;
        for (from, to) in rules {
            line = line.replace(from, to);
        }
        to_client.write_all(line.as_bytes())?;
        to_client.write_all(b"\r\n")?;
    }
    Ok(())
}
