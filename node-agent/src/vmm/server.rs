//! The process behind a VMM's socket.
//!
//! The agent takes devices out of it and lets it write guest memory that it sends to another node, so it
//! trusts only a socket that no other user could have made: closed to all others, without a link on its path,
//! and of the user that its folder belongs to: the VM's own, or the agent's. In a folder to which others may
//! write, only the agent's own user counts. A process of that user must serve it: the one that SO_PEERCRED
//! names, which called listen(2).

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use slackwater_proto::channel::ConnectError;
use tokio::net::unix::UCred;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::VmmError;
use crate::process::folder::{FoundSocket, find_socket};
use crate::vfio::borrow::VmmProcess;

/// The mode of a socket that only its owner can use, as the contract requires.
pub const PRIVATE: u32 = 0o600;

/// Between two tries to watch for the end of a process.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

/// Finds a socket that no other user could have made. It may have these permissions at most.
///
/// # Errors
/// [`VmmError::Trust`], or [`VmmError::Connect`] if it does not exist.
pub(crate) fn trust(socket: &Path, most: u32) -> Result<FoundSocket, VmmError> {
    let distrust = |reason: String| VmmError::Trust { path: socket.display().to_string(), reason };
    let found = find_socket(socket).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => VmmError::Connect(ConnectError::Socket {
            path: socket.to_owned(),
            reason: "it does not exist".to_owned(),
        }),
        _ => distrust(error.to_string()),
    })?;
    let FoundSocket { user, mode, maker, .. } = found;
    if user != maker {
        return Err(distrust(format!("it belongs to user {user}, and must belong to user {maker}")));
    } else if mode & !most != 0 {
        return Err(distrust(format!("its mode is {mode:04o}, and must be {most:04o}")));
    }
    Ok(found)
}

/// The process, held by a pidfd: another process with its number is never mistaken for it.
#[derive(Debug)]
pub struct Server {
    process: VmmProcess,
    pidfd: OwnedFd,
}

impl Server {
    /// The process that serves the socket, by the credentials of a connection to it. `user` is whom the
    /// socket belongs to: [`trust`].
    ///
    /// # Errors
    /// [`VmmError::Trust`] if it may not be trusted, or cannot be held.
    pub fn of(peer: io::Result<UCred>, socket: &Path, user: u32) -> Result<Self, VmmError> {
        let distrust = |reason: String| VmmError::Trust { path: socket.display().to_string(), reason };
        let peer = peer.map_err(|error| distrust(format!("who serves it is not known: {error}")))?;
        if peer.uid() != user {
            return Err(distrust(format!("it is served by user {}, and must be by user {user}", peer.uid())));
        }
        let pid = peer.pid().and_then(Pid::from_raw).ok_or_else(|| {
            distrust(
                "its process is in another PID namespace: the agent must see the VMM's process".to_owned(),
            )
        })?;
        let not_held = |why: String| distrust(format!("its process {pid} cannot be held: {why}"));
        let pidfd = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|errno| not_held(io::Error::from(errno).to_string()))?;
        let process = VmmProcess::open(pid.as_raw_nonzero().get().unsigned_abs())
            .map_err(|error| not_held(error.to_string()))?;
        Ok(Self { process, pidfd })
    }

    /// The process: devices are borrowed from it.
    pub fn process(&self) -> &VmmProcess {
        &self.process
    }

    /// Its process id in the agent's pid namespace.
    pub fn pid(&self) -> u32 {
        self.process.identity().pid
    }

    /// Returns when the process has ended.
    pub async fn exited(&self) {
        let mut warned = false;
        // An error is no end.
        while let Err(error) = self.process.exited().await {
            if !std::mem::replace(&mut warned, true) {
                warn!(pid = self.pid(), %error, "the VMM's process cannot be watched; trying again");
            }
            sleep(WATCH_AGAIN).await;
        }
    }

    /// Waits until the process that was asked to quit has ended, and kills it after `limit`, or if it
    /// refused.
    ///
    /// # Errors
    /// [`VmmError::Deadline`] if it still exists after that.
    pub async fn end(&self, asked: Result<(), VmmError>, limit: Duration) -> Result<(), VmmError> {
        if let Err(error) = asked {
            warn!(pid = self.pid(), %error, "the VMM did not quit");
        } else if timeout(limit, self.exited()).await.is_ok() {
            return Ok(());
        }
        self.kill();
        timeout(limit, self.exited())
            .await
            .map_err(|_| VmmError::Deadline { call: "the end of its process", limit })
    }

    /// By the pidfd: never another process with its number.
    fn kill(&self) {
        // It fails only if the process has ended.
        if let Err(error) = pidfd_send_signal(&self.pidfd, Signal::KILL) {
            warn!(pid = self.pid(), %error, "the VMM's process was not killed");
        }
    }
}
