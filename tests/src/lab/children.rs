//! The programs that the lab starts on this machine. None outlives the lab: not when it is dropped, and not when its process is
//! killed.

use std::{
    io,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{oneshot, watch};

use super::error::LabError;

type Job = (Command, oneshot::Sender<io::Result<Child>>);

/// A running program.
#[derive(Debug)]
pub(super) struct RunningChild {
    pid: Option<Pid>,
    ending: watch::Receiver<Option<ExitStatus>>,
    /// Its standard output, if that was asked for as a pipe.
    pub(super) stdout: Option<std::process::ChildStdout>,
}

/// Starts `program`, with what `configure` adds, so that it dies with this process.
pub(super) async fn start(
    program: &str,
    configure: impl FnOnce(&mut Command),
) -> Result<RunningChild, LabError> {
    let action = format!("starting {program}");
    // The kernel sends the signal when the *thread* that started the child ends, so one thread starts all and never ends.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]).stdin(Stdio::null());
    configure(&mut command);
    let (answer, answered) = oneshot::channel();
    let gone = |_| LabError::Io { action: action.clone(), source: io::Error::other("the starter is gone") };
    starter().send((command, answer)).map_err(|_| gone(()))?;
    let mut child = answered.await.map_err(|_| gone(()))?.map_err(LabError::io(action.clone()))?;
    let (ended, ending) = watch::channel(None);
    let running = RunningChild {
        pid: i32::try_from(child.id()).ok().and_then(Pid::from_raw),
        ending,
        stdout: child.stdout.take(),
    };
    thread::spawn(move || {
        // Waiting fails only for what is no child of ours.
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
                    // Who asked may have gone away meanwhile: then the child goes, too.
                    if let Err(Ok(mut child)) = answer.send(command.spawn()) {
                        let _ = child.kill();
                    }
                }
            });
            sender
        })
        .clone()
}

impl RunningChild {
    /// Waits for it to end.
    pub(super) async fn ended(&self) -> Option<ExitStatus> {
        let mut ending = self.ending.clone();
        ending.wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }

    /// Sends a signal, unless it has ended.
    pub(super) fn signal(&self, signal: Signal) {
        if let (Some(pid), None) = (self.pid, *self.ending.borrow()) {
            // It may end at the same time.
            let _ = kill_process(pid, signal);
        }
    }
}

impl Drop for RunningChild {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}
