//! Errors of commands.

use std::path::PathBuf;
use std::time::Duration;

/// A command to QEMU has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// No connection to the socket.
    #[error("the QMP socket {} cannot be reached: {reason}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The server did not greet as QEMU does.
    #[error("no QMP greeting on {}: {reason}", path.display())]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// What happened instead, and what to do.
        reason: String,
    },
    /// QEMU parsed the command and refused it.
    #[error("QEMU refused {command}: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class: `GenericError`, `CommandNotFound`, `DeviceNotFound` ...
        class: String,
        /// QEMU's message.
        desc: String,
    },
    /// The connection broke during the command. It is not known whether QEMU executed it; it is not repeated.
    #[error("QEMU was lost during {command}, which it may have executed or not: {reason}")]
    Lost {
        /// The command.
        command: String,
        /// Why the connection broke.
        reason: String,
    },
    /// No answer in time. QEMU may execute the command later.
    #[error("QEMU did not answer {command} within {} ms, and may still execute it", limit.as_millis())]
    Deadline {
        /// The command.
        command: String,
        /// How long it had, including a new connection.
        limit: Duration,
    },
    /// An answer that cannot be parsed.
    #[error("QEMU's answer to {command} cannot be understood: {reason}")]
    Answer {
        /// The command.
        command: String,
        /// The field, and what is wrong with it.
        reason: String,
    },
    /// The command's arguments cannot be written as JSON. Nothing was sent.
    #[error("the arguments of {command} cannot be written: {reason}")]
    Arguments {
        /// The command.
        command: String,
        /// What is wrong with them.
        reason: String,
    },
}
