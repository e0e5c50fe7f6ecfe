//! Why a sandbox could not be made.

use std::io;
use std::path::PathBuf;

/// Why a sandbox could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// A user that is not a twin's.
    #[error("the sandbox is for user 0: a program that starts as root is not confined")]
    Root,
    /// A namespace, or a step in it.
    #[error("sandbox: cannot {step}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed. EPERM: CAP_SYS_ADMIN is missing.
        source: io::Error,
    },
    /// Something that it should show.
    #[error("sandbox: cannot show {path}")]
    Show {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The seccomp filter.
    #[error("sandbox: cannot install the seccomp filter")]
    Filter(#[source] seccompiler::Error),
}

/// The error of a step.
pub(super) fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> SandboxError {
    move |source| SandboxError::Step { step, source: source.into() }
}
