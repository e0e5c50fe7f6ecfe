//! The programs that the lab starts on this machine. None outlives the lab: not when it is dropped, and not
//! when its process is killed.

use std::{
    io,
    os::fd::OwnedFd,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::sync::{oneshot, watch};

use crate::error::LabError;

type Job = (Command, oneshot::Sender<io::Result<Child>>);

/// A running program.
#[derive(Debug)]
pub(crate) struct RunningChild {
    /// Refers to this process even after its number has been reused.
    process: OwnedFd,
    ending: watch::Receiver<Option<ExitStatus>>,
    /// Its standard output, if that was asked for as a pipe.
    pub(crate) stdout: Option<std::process::ChildStdout>,
}

/// Starts `program`, with what `configure` adds, so that it dies with this process.
pub(crate) async fn start(
    program: &str,
    configure: impl FnOnce(&mut Command),
) -> Result<RunningChild, LabError> {
    let action = format!("starting {program}");
    // The kernel sends the signal when the *thread* that started the child ends, so one thread starts all and
    // never ends.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]).stdin(Stdio::null());
    configure(&mut command);
    let (answer, answered) = oneshot::channel();
    let gone = |_| LabError::Io {
        action: action.clone(),
        source: io::Error::other("the thread that starts programs has ended"),
    };
    starter().send((command, answer)).map_err(|_| gone(()))?;
    let mut child = answered.await.map_err(|_| gone(()))?.map_err(LabError::io(action.clone()))?;
    let (ended, ending) = watch::channel(None);
    let running = RunningChild {
        process: process_of(&child).map_err(LabError::io(action))?,
        ending,
        stdout: child.stdout.take(),
    };
    thread::spawn(move || {
        // Waiting fails only for a process that is not our child.
        let status = child.wait().ok();
        ended.send_replace(status);
    });
    Ok(running)
}

fn starter() -> mpsc::Sender<Job> {
    static STARTER: std::sync::OnceLock<mpsc::Sender<Job>> = std::sync::OnceLock::new();
    STARTER
        .get_or_init(|| {
            let (sender, jobs) = mpsc::channel::<Job>();
            thread::spawn(move || {
                for (mut command, answer) in jobs {
                    // The caller may have gone away meanwhile: then the child ends, too.
                    if let Err(Ok(mut child)) = answer.send(command.spawn()) {
                        let _ = child.kill();
                    }
                }
            });
            sender
        })
        .clone()
}

fn process_of(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    Ok(pidfd_open(pid.ok_or(io::ErrorKind::InvalidData)?, PidfdFlags::empty())?)
}

impl RunningChild {
    /// Waits for it to end.
    pub(crate) async fn ended(&self) -> Option<ExitStatus> {
        let mut ending = self.ending.clone();
        ending.wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        // A process that has ended needs no signal.
        let _ = pidfd_send_signal(&self.process, signal);
    }
}

impl Drop for RunningChild {
    /// Kills it and waits until it is gone, since the files that it writes to are about to be removed. That
    /// takes milliseconds.
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&limit));
    }
}
