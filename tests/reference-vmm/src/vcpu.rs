//! The thread that runs the vCPU, and the requests that it takes from other threads.
//!
//! The thread owns the machine. It looks for requests between two exits of the vCPU; a signal brings the vCPU
//! out of KVM_RUN so that it does so at once. When a pause is answered, the vCPU is out of KVM_RUN, the port
//! access by which it left is complete (an IN's data is in its registers, an OUT is done and will not be
//! repeated), and the thread waits for a request: it touches neither the machine nor a device until the next
//! request.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::bus::AccessError;
use super::machine_state::MachineState;

/// What to do after a step of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Go on.
    Next,
    /// The guest is idle for its pace.
    Idle,
}

/// Why a machine failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// KVM_RUN failed.
    #[error("KVM cannot run the vCPU")]
    Run(#[source] kvm_ioctls::Error),
    /// The vCPU left the guest for a reason that the guest's program does not cause.
    #[error("the vCPU left the guest unexpectedly: {exit}")]
    UnexpectedExit {
        /// KVM's exit.
        exit: String,
    },
    /// A device refused a port access.
    #[error("a port access of the guest failed")]
    Access(#[source] AccessError),
    /// A part of the state could not be read.
    #[error("KVM cannot read the vCPU's {part}")]
    GetState {
        /// Which part.
        part: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// This processor lacks an MSR that is part of the state.
    #[error("KVM cannot {verb} MSR {index:#x}")]
    Msr {
        /// The MSR's number.
        index: u32,
        /// Whether it was to be read or written.
        verb: &'static str,
    },
    /// A part of the state was refused.
    #[error("KVM cannot set the vCPU's {part}")]
    SetState {
        /// Which part.
        part: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// A machine with one vCPU, as its thread drives it.
pub trait Machine: Send + 'static {
    /// Runs the vCPU until it leaves the guest, and does what the guest asked for.
    ///
    /// # Errors
    /// If the machine cannot continue.
    fn step(&mut self) -> Result<Step, MachineError>;

    /// Completes what the last step left incomplete in the vCPU, without running the guest.
    ///
    /// # Errors
    /// If the machine cannot continue.
    fn settle(&mut self) -> Result<(), MachineError>;

    /// The state of a settled machine.
    ///
    /// # Errors
    /// If a part of it cannot be read.
    fn state(&mut self) -> Result<MachineState, MachineError>;

    /// Puts a machine that has never run into that state.
    ///
    /// # Errors
    /// If a part of it is refused.
    fn restore(&mut self, state: &MachineState) -> Result<(), MachineError>;
}

/// Why a request was not carried out.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The thread has ended.
    #[error("the vCPU has ended")]
    Ended,
    /// The machine failed.
    #[error("the machine failed")]
    Machine(#[source] Arc<MachineError>),
}

type Answer<T> = oneshot::Sender<T>;

enum Request {
    Pause(Answer<()>),
    Resume(Answer<()>),
    State(Answer<Result<MachineState, MachineError>>),
    Restore(Arc<MachineState>, Answer<Result<(), MachineError>>),
    Stop,
}

/// A handle to the vCPU's thread.
#[derive(Debug)]
pub struct Vcpu {
    requests: Sender<Request>,
    thread: JoinHandle<()>,
    /// How the thread ended; `None` while it has not.
    ended: watch::Receiver<Option<Result<(), Arc<MachineError>>>>,
}

/// How long to wait for an answer before the vCPU is kicked again: a signal that comes just before the thread
/// enters KVM_RUN is lost.
const KICK_AGAIN: Duration = Duration::from_millis(10);

/// The handler's only use is that the signal interrupts KVM_RUN instead of ending the process.
extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpu {
    /// Starts the thread. The vCPU is paused until [`Self::resume`]. An idle guest waits for `pace`.
    ///
    /// # Errors
    /// If no thread or signal handler can be created.
    pub fn spawn(machine: impl Machine, pace: Duration) -> std::io::Result<Self> {
        register_signal_handler(SIGRTMIN(), kicked)
            .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
        let (requests, inbox) = mpsc::channel();
        let (end, ended) = watch::channel(None);
        let thread = Builder::new().name("vcpu0".into()).spawn(move || {
            // Drop the machine and its descriptors before the end is published.
            let result = drive(machine, &inbox, pace).map_err(Arc::new);
            end.send_replace(Some(result));
        })?;
        Ok(Self { requests, thread, ended })
    }

    async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, VcpuError> {
        let (answer, mut answered) = oneshot::channel();
        self.requests.send(request(answer)).map_err(|_| VcpuError::Ended)?;
        loop {
            self.kick();
            if let Ok(answer) = timeout(KICK_AGAIN, &mut answered).await {
                return answer.map_err(|_| VcpuError::Ended);
            }
        }
    }

    fn kick(&self) {
        // Fails only for a thread that has ended, which its waiters notice.
        self.thread.kill(SIGRTMIN()).unwrap_or_default();
    }

    /// Returns when the vCPU is paused, as described above. It may be paused already.
    ///
    /// # Errors
    /// If the vCPU has ended.
    pub async fn pause(&self) -> Result<(), VcpuError> {
        self.ask(Request::Pause).await
    }

    /// Lets the vCPU run. It may be running already.
    ///
    /// # Errors
    /// If the vCPU has ended.
    pub async fn resume(&self) -> Result<(), VcpuError> {
        self.ask(Request::Resume).await
    }

    /// The state of the machine, which must be paused.
    ///
    /// # Errors
    /// If the vCPU has ended, or its state cannot be read.
    pub async fn state(&self) -> Result<MachineState, VcpuError> {
        self.ask(Request::State).await?.map_err(|error| VcpuError::Machine(Arc::new(error)))
    }

    /// Puts the machine, which has never run, into that state.
    ///
    /// # Errors
    /// If the vCPU has ended, or does not take the state.
    pub async fn restore(&self, state: Arc<MachineState>) -> Result<(), VcpuError> {
        let restore = |answer| Request::Restore(state, answer);
        self.ask(restore).await?.map_err(|error| VcpuError::Machine(Arc::new(error)))
    }

    /// Returns when the thread has ended, and how.
    ///
    /// # Errors
    /// Why the machine could not continue, if that ended it.
    pub async fn ended(&self) -> Result<(), VcpuError> {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Err(error))) => Err(VcpuError::Machine(Arc::clone(error))),
            Ok(_) => Ok(()),
            Err(_) => Err(VcpuError::Ended),
        }
    }

    /// Ends the thread. Returns when the machine has been dropped.
    pub async fn stop(&self) {
        // Fails only if it has ended already.
        self.requests.send(Request::Stop).unwrap_or_default();
        loop {
            self.kick();
            if timeout(KICK_AGAIN, self.ended()).await.is_ok() {
                return;
            }
        }
    }
}

fn drive(mut machine: impl Machine, inbox: &Receiver<Request>, pace: Duration) -> Result<(), MachineError> {
    let mut running = false;
    let mut idle = false;
    loop {
        let request = if !running {
            inbox.recv().map_err(|_| TryRecvError::Disconnected)
        } else if idle {
            inbox.recv_timeout(pace).map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            })
        } else {
            inbox.try_recv()
        };
        idle = false;
        // A requester may have stopped waiting for its answer.
        match request {
            Ok(Request::Pause(answer)) => {
                if running {
                    machine.settle()?;
                    running = false;
                }
                answer.send(()).unwrap_or_default();
            }
            Ok(Request::Resume(answer)) => {
                running = true;
                answer.send(()).unwrap_or_default();
            }
            Ok(Request::State(answer)) => drop(answer.send(machine.state())),
            Ok(Request::Restore(state, answer)) => drop(answer.send(machine.restore(&state))),
            Ok(Request::Stop) | Err(TryRecvError::Disconnected) => return Ok(()),
            Err(TryRecvError::Empty) => idle = machine.step()? == Step::Idle,
        }
    }
}

#[cfg(test)]
#[path = "vcpu_tests.rs"]
pub(super) mod tests;
