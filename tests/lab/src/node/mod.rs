//! A node of the lab, as the tests see it.

mod clock;
mod config;
mod control;
mod machine;
pub mod protocol;
mod qmp;

use std::{net::SocketAddr, path::Path, time::Duration};

use rustix::process::Signal;

pub use clock::{ClockReading, ClockRelation, monotonic_ns};
pub use config::NodeConfig;
pub use machine::AGENT_PORT;

use self::control::Control;
pub(crate) use self::machine::Boot;
use self::machine::Machine;
use self::protocol::{CONTROL_PORT, Ending, Request, Response};
use crate::error::LabError;

/// A running node.
#[derive(Debug)]
pub struct Node {
    name: String,
    number: u8,
    devices: Vec<String>,
    machine: Machine,
    control: Control,
}

/// The result of a program that was run in a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// The program.
    pub program: String,
    /// How it ended. `None`: its time was up, and it was killed.
    pub ending: Option<Ending>,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Executed {
    /// The standard output of a program that succeeded.
    ///
    /// # Errors
    /// When it did not succeed.
    pub fn success(self) -> Result<String, LabError> {
        if self.ending == Some(Ending::Status(0)) {
            return Ok(String::from_utf8_lossy(&self.stdout).into_owned());
        }
        Err(LabError::ProgramFailed {
            program: self.program,
            ending: self.ending.map_or_else(|| "its time up".to_owned(), |ending| format!("{ending:?}")),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
        })
    }
}

impl Node {
    /// Starts the node's machine; it is not up yet.
    pub(crate) async fn start(
        boot: &Boot<'_>,
        config: &NodeConfig,
        number: u8,
        link: &Path,
    ) -> Result<Self, LabError> {
        let machine = Machine::start(boot, config, number, link).await?;
        let control = Control { node: config.name.clone(), address: machine.forwarded(CONTROL_PORT)? };
        // As node-init.sh makes them.
        let devices =
            (0..config.devices.len()).map(|device| format!("5a1ac0de-{number:04x}-4000-8000-{device:012x}"));
        Ok(Self { name: config.name.clone(), number, devices: devices.collect(), machine, control })
    }

    /// Waits until the node is up.
    pub(crate) async fn ready(&self) -> Result<(), LabError> {
        self.machine.ready().await
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its devices, in the configuration's order, by the UUIDs of `/sys/bus/mdev/devices`.
    #[must_use]
    pub fn devices(&self) -> &[String] {
        &self.devices
    }

    /// Where this machine reaches the agent in the node.
    ///
    /// # Errors
    /// When QEMU forwards no port.
    pub fn agent_address(&self) -> Result<SocketAddr, LabError> {
        self.machine.forwarded(AGENT_PORT)
    }

    /// Where the other nodes reach the agent in the node.
    #[must_use]
    pub fn link_address(&self) -> SocketAddr {
        SocketAddr::from(([10, 77, 0, self.number], AGENT_PORT))
    }

    /// Where this machine reaches the node's control service.
    #[must_use]
    pub fn control_address(&self) -> SocketAddr {
        self.control.address
    }

    /// The serial console, as a growing file: the kernel's messages, and the lines of every spawned program.
    #[must_use]
    pub fn console(&self) -> &Path {
        self.machine.console()
    }

    /// Runs a program to its end, 30 s at most.
    ///
    /// # Errors
    /// When it could not be run. That it failed is in the result.
    pub async fn exec(&self, argv: &[&str]) -> Result<Executed, LabError> {
        self.exec_for(argv, b"", Duration::from_secs(30)).await
    }

    /// Runs a shell command that must succeed, 30 s at most, and returns its standard output.
    ///
    /// # Errors
    /// When it could not be run, or failed.
    pub async fn shell(&self, command: &str) -> Result<String, LabError> {
        self.exec(&["sh", "-c", command]).await?.success()
    }

    /// Runs a program to its end, with this standard input.
    ///
    /// # Errors
    /// When it could not be run. That it failed, or took too long, is in the result.
    pub async fn exec_for(&self, argv: &[&str], stdin: &[u8], limit: Duration) -> Result<Executed, LabError> {
        let request = Request::Exec { argv: owned(argv), timeout_ms: millis(limit) };
        match self.control.ask_for(&request, stdin, limit).await? {
            (Response::Exec { ending, stdout_bytes }, mut stdout) => {
                let stdout_bytes = usize::try_from(stdout_bytes).unwrap_or(usize::MAX).min(stdout.len());
                let stderr = stdout.split_off(stdout_bytes);
                let program = argv.first().copied().unwrap_or_default().to_owned();
                Ok(Executed { program, ending, stdout, stderr })
            }
            (other, _) => Err(self.control.unexpected_answer(&other)),
        }
    }

    /// Starts a program in the background, in a session and a cgroup of its own, and returns its pid. `name`
    /// names the cgroup, and the log `/var/log/NAME.log`.
    ///
    /// # Errors
    /// When it could not be started.
    pub async fn spawn(&self, name: &str, argv: &[&str], env: &[(&str, &str)]) -> Result<u32, LabError> {
        let env = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        match self.control.ask(&Request::Spawn { name: name.to_owned(), argv: owned(argv), env }, b"").await?
        {
            (Response::Spawned { pid }, _) => Ok(pid),
            (other, _) => Err(self.control.unexpected_answer(&other)),
        }
    }

    /// Waits for a process to end. `None`: it did not end in time. How it ended is known only of spawned
    /// processes.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn wait(&self, pid: u32, limit: Duration) -> Result<Option<Ending>, LabError> {
        match self.control.ask_for(&Request::Wait { pid, timeout_ms: millis(limit) }, b"", limit).await? {
            (Response::Ended { ending }, _) => Ok(ending),
            (other, _) => Err(self.control.unexpected_answer(&other)),
        }
    }

    /// Waits until the program spawned under `name` has printed a line that contains `text`.
    ///
    /// # Errors
    /// When no such line came in time, or the program ended without it.
    pub async fn wait_line(&self, name: &str, text: &str, limit: Duration) -> Result<String, LabError> {
        let request =
            Request::WaitLine { name: name.to_owned(), text: text.to_owned(), timeout_ms: millis(limit) };
        match self.control.ask_for(&request, b"", limit).await? {
            (Response::Line { line: Some(line) }, _) => Ok(line),
            (Response::Line { line: None }, _) => {
                Err(self.control.refusal(format!("{name} did not print a line with {text:?}")))
            }
            (other, _) => Err(self.control.unexpected_answer(&other)),
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn signal(&self, pid: u32, signal: Signal) -> Result<(), LabError> {
        self.control.ask(&Request::Signal { pid, signal: signal.as_raw() }, b"").await.map(drop)
    }

    /// Kills a process with SIGKILL.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn kill(&self, pid: u32) -> Result<(), LabError> {
        self.signal(pid, Signal::KILL).await
    }

    /// Kills with SIGKILL every process in the cgroup of the program spawned under `name`, and waits until it
    /// is empty.
    ///
    /// # Errors
    /// When nothing was spawned under that name.
    pub async fn kill_group(&self, name: &str) -> Result<(), LabError> {
        self.control.ask(&Request::KillGroup { name: name.to_owned() }, b"").await.map(drop)
    }

    /// Writes a file; its folders are made.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<(), LabError> {
        self.control.ask(&Request::Put { path: path.to_owned(), mode }, content).await.map(drop)
    }

    /// Reads a file to its end.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn get(&self, path: &str) -> Result<Vec<u8>, LabError> {
        Ok(self.control.ask(&Request::Get { path: path.to_owned() }, b"").await?.1)
    }

    /// Reads a file of text.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn get_text(&self, path: &str) -> Result<String, LabError> {
        Ok(String::from_utf8_lossy(&self.get(path).await?).into_owned())
    }

    /// Reads the node's clock against this machine's.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn clock(&self) -> Result<ClockReading, LabError> {
        self.control.clock().await
    }

    /// Plugs the node's cable on the link between the nodes, or unplugs it.
    pub(crate) async fn set_link(&self, up: bool) -> Result<(), LabError> {
        self.machine.set_link(up).await
    }

    /// Stops the node like a power failure.
    pub async fn power_off(&self) {
        self.machine.power_off().await;
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn millis(limit: Duration) -> u64 {
    u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)
}
