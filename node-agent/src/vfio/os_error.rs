//! An errno in readable form.

use std::fmt;

use rustix::io::Errno;

/// An errno that the kernel answered. It is displayed in words and by name: `Invalid argument (EINVAL)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OsError(pub Errno);

impl OsError {
    /// The symbolic name, for the numbers that VFIO and its drivers give.
    fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            Errno::ACCESS => "EACCES",
            Errno::AGAIN => "EAGAIN",
            Errno::BADF => "EBADF",
            Errno::BADMSG => "EBADMSG",
            Errno::BUSY => "EBUSY",
            Errno::CANCELED => "ECANCELED",
            Errno::FAULT => "EFAULT",
            Errno::INTR => "EINTR",
            Errno::INVAL => "EINVAL",
            Errno::IO => "EIO",
            Errno::MFILE => "EMFILE",
            Errno::NODEV => "ENODEV",
            Errno::NOENT => "ENOENT",
            Errno::NOMEM => "ENOMEM",
            Errno::NOMSG => "ENOMSG",
            Errno::NOSPC => "ENOSPC",
            Errno::NOTCONN => "ENOTCONN",
            Errno::NOTTY => "ENOTTY",
            Errno::NXIO => "ENXIO",
            Errno::OPNOTSUPP => "EOPNOTSUPP",
            Errno::OVERFLOW => "EOVERFLOW",
            Errno::PERM => "EPERM",
            Errno::PIPE => "EPIPE",
            Errno::PROTO => "EPROTO",
            Errno::RANGE => "ERANGE",
            Errno::SPIPE => "ESPIPE",
            Errno::SRCH => "ESRCH",
            Errno::TIMEDOUT => "ETIMEDOUT",
            _ => return None,
        })
    }
}

impl From<Errno> for OsError {
    fn from(errno: Errno) -> Self {
        Self(errno)
    }
}

impl fmt::Display for OsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.0.raw_os_error();
        let with_number = std::io::Error::from_raw_os_error(number).to_string();
        let words = with_number.strip_suffix(&format!(" (os error {number})")).unwrap_or(&with_number);
        match self.name() {
            Some(name) => write!(f, "{words} ({name})"),
            None => write!(f, "{words} (errno {number})"),
        }
    }
}

impl std::error::Error for OsError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_is_displayed_in_words_and_by_name() {
        assert_eq!(OsError(Errno::INVAL).to_string(), "Invalid argument (EINVAL)");
        assert_eq!(OsError(Errno::XFULL).to_string(), "Exchange full (errno 54)");
    }
}
