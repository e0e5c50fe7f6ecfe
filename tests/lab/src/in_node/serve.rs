//! The service: takes requests, one thread a connection.

use std::{
    fs,
    io::{BufReader, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::Context;
use rustix::process::{Signal, kill_process};

use super::{
    launch::CGROUPS,
    processes::{self, Processes},
};
use crate::node::monotonic_ns;
use crate::node::protocol::{self, CONTROL_PORT, READY_LINE, Request, Response};

/// Listens and serves until the node is switched off.
pub(super) fn serve() -> anyhow::Result<()> {
    // A cgroup must not hold processes and subgroups at once: the service has this group, and each spawned
    // program a subgroup.
    fs::create_dir_all(CGROUPS).with_context(|| format!("making {CGROUPS}"))?;
    let listener = TcpListener::bind(("0.0.0.0", CONTROL_PORT)).context("listening")?;
    println!("{READY_LINE}");
    let processes = Processes::default();
    for connection in listener.incoming() {
        let processes = processes.clone();
        thread::spawn(move || match connection.context("accepting").and_then(|c| converse(c, &processes)) {
            Ok(()) => {}
            Err(error) => println!("slackwater-lab-node: connection ended: {error:#}"),
        });
    }
    Ok(())
}

fn converse(mut connection: TcpStream, processes: &Processes) -> anyhow::Result<()> {
    connection.set_nodelay(true)?;
    let mut from = BufReader::new(connection.try_clone()?);
    while let Some((request, payload)) = protocol::read::<Request>(&mut from)? {
        let (response, payload) = answer(request, payload, processes)
            .unwrap_or_else(|error| (Response::Failed { message: format!("{error:#}") }, Vec::new()));
        // One write, so that a short answer is one segment.
        connection.write_all(&protocol::encode(&response, &payload)?)?;
    }
    Ok(())
}

fn answer(request: Request, payload: Vec<u8>, processes: &Processes) -> anyhow::Result<(Response, Vec<u8>)> {
    let response = match request {
        Request::Exec { argv, timeout_ms } => {
            let mut executed = processes::exec(&argv, payload, Duration::from_millis(timeout_ms))?;
            let stdout_bytes = executed.stdout.len() as u64;
            executed.stdout.append(&mut executed.stderr);
            return Ok((Response::Exec { ending: executed.ending, stdout_bytes }, executed.stdout));
        }
        Request::Spawn { name, argv, env } => Response::Spawned { pid: processes.spawn(&name, &argv, &env)? },
        Request::Wait { pid, timeout_ms } => {
            Response::Ended { ending: processes.wait(pid, Duration::from_millis(timeout_ms))? }
        }
        Request::WaitLine { name, text, timeout_ms } => {
            Response::Line { line: processes.wait_line(&name, &text, Duration::from_millis(timeout_ms))? }
        }
        Request::Signal { pid, signal } => {
            let signal = Signal::from_named_raw(signal).with_context(|| format!("{signal} is no signal"))?;
            kill_process(processes::pid_of(pid)?, signal).with_context(|| format!("signalling {pid}"))?;
            Response::Done
        }
        Request::KillGroup { name } => {
            processes::kill_group(&name)?;
            Response::Done
        }
        Request::Put { path, mode } => {
            put(Path::new(&path), mode, &payload).with_context(|| format!("writing {path}"))?;
            Response::Done
        }
        Request::Get { path } => {
            return Ok((Response::Content, fs::read(&path).with_context(|| format!("reading {path}"))?));
        }
        Request::Clock => Response::Clock { monotonic_ns: u64::try_from(monotonic_ns())? },
    };
    Ok((response, Vec::new()))
}

fn put(path: &Path, mode: u32, content: &[u8]) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, content)?;
    // Files of /proc and /sys keep the mode they have.
    if !path.starts_with("/proc") && !path.starts_with("/sys") {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}
