//! Whether a process that was written down is alive, gone, or not known. It is judged by the boot id, the
//! process number and the start time alone.
//!
//! | boot id | its number now | verdict |
//! |---|---|---|
//! | another | anything | gone: no process outlives a boot |
//! | any | no process has it | gone |
//! | any | a process with another start time has it | gone: the number was used again |
//! | the same | a process with this start time has it | alive |
//! | cannot be read | a process with this start time has it | not known |
//! | the same, or cannot be read | whether a process has it, or since when, cannot be read | not known |
//!
//! *Not known* is no end: whoever asks holds what depends on it, says why, and asks again.

use super::borrow::{self, BorrowError, ProcessIdentity};

/// Whether a process is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// The process runs.
    Alive,
    /// It has ended for certain.
    Gone,
    /// The kernel does not say. The reason is for a person.
    NotKnown(String),
}

impl Liveness {
    /// Looks for a process.
    #[must_use]
    pub fn of(wanted: &ProcessIdentity) -> Self {
        judge(wanted, borrow::this_boot(), borrow::start_of(wanted.pid))
    }
}

/// The verdict on `wanted`, from this boot's id and the start time of the process that has its number now.
fn judge(
    wanted: &ProcessIdentity,
    boot: Result<String, BorrowError>,
    start_ticks: Result<u64, BorrowError>,
) -> Liveness {
    if boot.as_ref().is_ok_and(|boot| *boot != wanted.boot_id) {
        return Liveness::Gone;
    }
    match (start_ticks, boot) {
        (Err(BorrowError::NoProcess { .. }), _) => Liveness::Gone,
        (Ok(start), _) if start != wanted.start_ticks => Liveness::Gone,
        (Ok(_), Ok(_)) => Liveness::Alive,
        (Err(error), _) | (Ok(_), Err(error)) => Liveness::NotKnown(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::vfio::borrow::VmmProcess;
    use crate::vfio::os_error::OsError;

    const THIS_BOOT: &str = "b";

    fn wanted() -> ProcessIdentity {
        ProcessIdentity { boot_id: THIS_BOOT.to_owned(), pid: 9, start_ticks: 11 }
    }

    fn unreadable() -> BorrowError {
        BorrowError::ReadProc { path: "/proc/9/stat".into(), why: "Input/output error".to_owned() }
    }

    fn not_opened(errno: Errno) -> BorrowError {
        BorrowError::OpenProcess { pid: 9, errno: OsError(errno) }
    }

    fn is_not_known(verdict: &Liveness) -> bool {
        matches!(verdict, Liveness::NotKnown(_))
    }

    #[test]
    fn a_process_is_gone_only_if_there_is_none_or_another_one_or_another_boot() {
        let boot = |id: &str| Ok(id.to_owned());
        let none = || Err(BorrowError::NoProcess { pid: 9 });
        assert_eq!(judge(&wanted(), boot(THIS_BOOT), Ok(11)), Liveness::Alive);
        for (boot, now) in [
            (boot("another"), Ok(11)),
            (boot("another"), Err(unreadable())),
            (boot(THIS_BOOT), none()),
            (boot(THIS_BOOT), Ok(12)),
            (Err(unreadable()), none()),
            (Err(unreadable()), Ok(12)),
        ] {
            assert_eq!(judge(&wanted(), boot.clone(), now.clone()), Liveness::Gone, "{boot:?} {now:?}");
        }
    }

    #[test]
    fn whatever_the_kernel_cannot_say_is_not_known_and_the_reason_is_named() {
        let boot = || Ok(THIS_BOOT.to_owned());
        for errno in [Errno::ACCESS, Errno::PERM, Errno::IO, Errno::NFILE, Errno::MFILE, Errno::NOMEM] {
            let verdict = judge(&wanted(), boot(), Err(not_opened(errno)));
            assert!(is_not_known(&verdict), "{errno}: {verdict:?}");
        }
        let verdict = judge(&wanted(), boot(), Err(unreadable()));
        assert_eq!(verdict, Liveness::NotKnown("reading /proc/9/stat: Input/output error".to_owned()));
        assert!(is_not_known(&judge(&wanted(), Err(unreadable()), Ok(11))), "of which boot it is");
        assert!(is_not_known(&judge(&wanted(), Err(unreadable()), Err(unreadable()))));
    }

    #[test]
    fn this_process_is_alive_and_one_with_its_number_and_another_start_is_not_it() {
        let this = VmmProcess::open(std::process::id()).unwrap().identity().clone();
        assert_eq!(Liveness::of(&this), Liveness::Alive);
        let earlier = ProcessIdentity { start_ticks: this.start_ticks - 1, ..this.clone() };
        assert_eq!(Liveness::of(&earlier), Liveness::Gone);
        let before_the_boot = ProcessIdentity { boot_id: "another".to_owned(), ..this };
        assert_eq!(Liveness::of(&before_the_boot), Liveness::Gone);
    }

    #[test]
    fn a_process_that_ended_is_gone_before_and_after_its_parent_has_waited_for_it() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let process = VmmProcess::open(child.id()).unwrap().identity().clone();
        assert_eq!(Liveness::of(&process), Liveness::Alive);
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while Liveness::of(&process) == Liveness::Alive {
            assert!(std::time::Instant::now() < deadline, "its end was not seen");
            std::thread::yield_now();
        }
        assert_eq!(Liveness::of(&process), Liveness::Gone, "as a zombie");
        child.wait().unwrap();
        assert_eq!(Liveness::of(&process), Liveness::Gone);
    }
}
