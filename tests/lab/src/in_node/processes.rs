//! The processes that the service started, and how they ended.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, PipeReader, Read, Seek, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use parking_lot::{Condvar, Mutex};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};

use super::launch::CGROUPS;
use crate::node::protocol::Ending;

/// The processes that the service spawned. Clones share one state.
#[derive(Clone, Default)]
pub(super) struct Processes(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    endings: HashMap<u32, Option<Ending>>,
    logs: HashMap<String, Log>,
}

/// The output of the last program spawned under a name.
#[derive(Default)]
struct Log {
    pid: u32,
    lines: Vec<String>,
    ended: bool,
}

impl Processes {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.state.lock());
        self.0.changed.notify_all();
    }

    /// Waits until `look` returns a value, or the deadline passes.
    fn wait_for<T>(&self, deadline: Instant, mut look: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let mut state = self.0.state.lock();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            if self.0.changed.wait_until(&mut state, deadline).timed_out() {
                return look(&state);
            }
        }
    }

    /// Starts a program in a session and a cgroup of its own, and returns its pid.
    pub(super) fn spawn(&self, name: &str, argv: &[String], env: &[(String, String)]) -> anyhow::Result<u32> {
        let cgroup = cgroup_of(name)?;
        if argv.is_empty() {
            bail!("no program was named");
        }
        fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        let log = PathBuf::from(format!("/var/log/{name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("opening {}", log.display()))?;
        let (output, input) = io::pipe()?;
        let mut child = Command::new("/proc/self/exe")
            .arg("launch")
            .arg(&cgroup)
            .args(argv)
            .envs(env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(input.try_clone()?)
            .stderr(input)
            .spawn()
            .context("starting the launcher")?;
        let pid = child.id();
        self.change(|state| {
            state.endings.insert(pid, None);
            state.logs.insert(name.to_owned(), Log { pid, ..Log::default() });
        });
        let (processes, logged_as) = (self.clone(), name.to_owned());
        thread::spawn(move || processes.copy_log(&logged_as, pid, output, file));
        let processes = self.clone();
        thread::spawn(move || {
            let ending = child.wait().map_or(Ending::Unknown, ending_of);
            println!("slackwater-lab-node: process {pid} ended: {ending:?}");
            processes.change(|state| {
                state.endings.insert(pid, Some(ending));
            });
        });
        Ok(pid)
    }

    fn copy_log(&self, name: &str, pid: u32, output: PipeReader, mut file: File) {
        for line in BufReader::new(output).split(b'\n') {
            let Ok(line) = line else { break };
            let line = String::from_utf8_lossy(&line).into_owned();
            // A full disk must not end the observed program.
            let _ = writeln!(file, "{line}");
            println!("{name}: {line}");
            self.change(|state| {
                if let Some(log) = state.logs.get_mut(name).filter(|log| log.pid == pid) {
                    log.lines.push(line);
                }
            });
        }
        self.change(|state| {
            if let Some(log) = state.logs.get_mut(name).filter(|log| log.pid == pid) {
                log.ended = true;
            }
        });
    }

    /// Waits for a process to end. `None`: it did not end in time.
    pub(super) fn wait(&self, pid: u32, timeout: Duration) -> anyhow::Result<Option<Ending>> {
        let deadline = Instant::now() + timeout;
        if self.0.state.lock().endings.contains_key(&pid) {
            return Ok(self.wait_for(deadline, |state| state.endings.get(&pid).copied().flatten()));
        }
        let Ok(descriptor) = pidfd_open(pid_of(pid)?, PidfdFlags::empty()) else {
            return Ok(Some(Ending::Unknown));
        };
        let mut descriptors = [PollFd::new(&descriptor, PollFlags::IN)];
        Ok((poll(&mut descriptors, Some(&Timespec::try_from(timeout)?))? > 0).then_some(Ending::Unknown))
    }

    /// Waits for a line in a log. `None`: the log or the time ended without one.
    pub(super) fn wait_line(
        &self,
        name: &str,
        text: &str,
        timeout: Duration,
    ) -> anyhow::Result<Option<String>> {
        if !self.0.state.lock().logs.contains_key(name) {
            bail!("nothing was spawned under the name {name}");
        }
        let found = self.wait_for(Instant::now() + timeout, |state| {
            let log = state.logs.get(name)?;
            match log.lines.iter().find(|line| line.contains(text)) {
                Some(line) => Some(Some(line.clone())),
                None => log.ended.then_some(None),
            }
        });
        Ok(found.flatten())
    }
}

/// Kills every process in the cgroup of this name, and waits until the kernel reports that it is empty.
pub(super) fn kill_group(name: &str) -> anyhow::Result<()> {
    let cgroup = cgroup_of(name)?;
    fs::write(cgroup.join("cgroup.kill"), "1").with_context(|| format!("killing {}", cgroup.display()))?;
    let mut events = File::open(cgroup.join("cgroup.events"))?;
    loop {
        // Reading through the polled descriptor, from its start, is what arms it for the next change.
        events.rewind()?;
        let mut text = String::new();
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&Timespec { tv_sec: 1, tv_nsec: 0 }))?;
    }
}

/// The result of an executed program.
pub(super) struct Executed {
    pub(super) ending: Option<Ending>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// Runs a program to its end, or until its time is up.
pub(super) fn exec(argv: &[String], stdin: Vec<u8>, timeout: Duration) -> anyhow::Result<Executed> {
    let (program, arguments) = argv.split_first().context("no program was named")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    if let Some(mut to) = child.stdin.take() {
        // The program need not read its input.
        thread::spawn(move || to.write_all(&stdin));
    }
    let stdout = child.stdout.take().map(|from| thread::spawn(move || read_all(from)));
    let stderr = child.stderr.take().map(|from| thread::spawn(move || read_all(from)));
    let pid = pid_of(child.id())?;
    let descriptor = pidfd_open(pid, PidfdFlags::empty())?;
    let in_time =
        poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&Timespec::try_from(timeout)?))? > 0;
    if !in_time {
        kill_process_group(pid, Signal::KILL)?;
    }
    let status = child.wait()?;
    let read = |thread: Option<thread::JoinHandle<Vec<u8>>>| {
        thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
    };
    Ok(Executed { ending: in_time.then(|| ending_of(status)), stdout: read(stdout), stderr: read(stderr) })
}

fn read_all(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Keep what was read before an error.
    let _ = from.read_to_end(&mut bytes);
    bytes
}

fn ending_of(status: ExitStatus) -> Ending {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ending::Status(code),
        (None, Some(signal)) => Ending::Signal(signal),
        (None, None) => Ending::Unknown,
    }
}

fn cgroup_of(name: &str) -> anyhow::Result<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(plain) {
        bail!("{name:?} cannot name a cgroup");
    }
    Ok(Path::new(CGROUPS).join(name))
}

/// The kernel's idea of this process number.
pub(super) fn pid_of(pid: u32) -> anyhow::Result<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| anyhow!("{pid} is no process number"))
}
