//! Why a command brought no answer.

use std::path::PathBuf;
use std::time::Duration;

/// Why QEMU did not do, or did not say, what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// No connection to the socket.
    #[error("the QMP socket {} cannot be reached: {reason}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What was seen.
        reason: String,
    },
    /// A connection, but whoever took it did not greet as QEMU does.
    #[error("no QMP greeting on {}: {reason}", path.display())]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// What was seen instead, and what to do.
        reason: String,
    },
    /// QEMU understood the command and refused it.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Refused {
        /// Which command.
        command: String,
        /// QEMU's error class: `GenericError`, `CommandNotFound`, `DeviceNotFound` ...
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// The connection broke while the command was on its way. Nobody knows whether it was executed; it is not repeated.
    #[error("QEMU was lost during {command}, which it may have executed or not: {reason}")]
    Lost {
        /// Which command.
        command: String,
        /// Why the connection broke.
        reason: String,
    },
    /// No answer in time. QEMU may execute the command later.
    #[error("QEMU did not answer {command} within {} ms, and may still execute it", limit.as_millis())]
    Deadline {
        /// Which command.
        command: String,
        /// How long it had, with the connecting if there was any.
        limit: Duration,
    },
    /// An answer that cannot be understood.
    #[error("QEMU's answer to {command} cannot be understood: {reason}")]
    Answer {
        /// Which command.
        command: String,
        /// Which field, and what is wrong with it.
        reason: String,
    },
    /// The command's arguments cannot be written as JSON. Nothing was sent.
    #[error("the arguments of {command} cannot be written: {reason}")]
    Arguments {
        /// Which command.
        command: String,
        /// What is wrong with them.
        reason: String,
    },
}
