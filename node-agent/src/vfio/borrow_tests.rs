//! Borrowing from a child process. Real VFIO devices are borrowed in the lab; here the devices are /dev/null
//! and a pipe.

use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::*;

/// A process that waits until its standard input ends; its standard output is `stdout`.
fn child(stdout: Stdio) -> Child {
    Command::new("cat").stdin(Stdio::piped()).stdout(stdout).spawn().unwrap()
}

/// Ends the child by ending its input.
fn end(mut child: Child) {
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// A sysfs in which the character device 1:3, /dev/null, belongs to the VFIO device `device`.
fn sysfs_with_null_as(device: &str, subsystem: &str) -> TempDir {
    let sysfs = tempfile::tempdir().unwrap();
    let entry = sysfs.path().join("devices").join(device).join("vfio-dev/vfio0");
    let class = sysfs.path().join("class").join(subsystem);
    for dir in [&entry, &class, &sysfs.path().join("dev/char")] {
        fs::create_dir_all(dir).unwrap();
    }
    symlink("../..", entry.join("device")).unwrap();
    symlink(&class, entry.join("subsystem")).unwrap();
    symlink(&entry, sysfs.path().join("dev/char/1:3")).unwrap();
    sysfs
}

#[test]
fn a_cdev_of_the_named_device_is_borrowed() {
    let vmm = child(Stdio::null());
    let process = VmmProcess::open(vmm.id()).unwrap();
    let sysfs = sysfs_with_null_as("0000:3b:00.2", "vfio-dev");
    let borrowed = process.borrow_by(1, "0000:3b:00.2", sysfs.path()).unwrap();
    assert_eq!(
        identify(borrowed.as_fd(), sysfs.path()).unwrap(),
        Kind::Cdev("0000:3b:00.2".to_owned()),
        "it is the child's descriptor that was borrowed"
    );
    end(vmm);
}

#[test]
fn another_device_than_the_named_one_is_refused_with_both_names() {
    let vmm = child(Stdio::null());
    let pid = vmm.id();
    let process = VmmProcess::open(pid).unwrap();
    let sysfs = sysfs_with_null_as("0000:3b:00.2", "vfio-dev");
    let error = process.borrow_by(1, "0000:3b:00.3", sysfs.path()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("descriptor 1 of process {pid} is the device 0000:3b:00.2, not 0000:3b:00.3")
    );
    end(vmm);
}

#[test]
fn a_descriptor_that_is_not_a_vfio_device_is_refused_and_described() {
    let vmm = child(Stdio::null());
    let pid = vmm.id();
    let process = VmmProcess::open(pid).unwrap();
    let what = |error: BorrowError| match error {
        BorrowError::NotVfio { what, .. } => what,
        other => panic!("{other}"),
    };
    assert_eq!(what(process.borrow(1, "vf0").unwrap_err()), "/dev/null");
    let sysfs = sysfs_with_null_as("vf0", "mem");
    assert_eq!(what(process.borrow_by(1, "vf0", sysfs.path()).unwrap_err()), "/dev/null");
    assert!(what(process.borrow(0, "vf0").unwrap_err()).starts_with("pipe:["));
    let error = process.borrow(77, "vf0").unwrap_err();
    assert_eq!(error.to_string(), format!("process {pid} has no descriptor 77"));
    end(vmm);
}

#[tokio::test]
async fn the_end_of_the_process_is_noticed() {
    let vmm = child(Stdio::null());
    let process = VmmProcess::open(vmm.id()).unwrap();
    let early = tokio::time::timeout(std::time::Duration::from_millis(20), process.exited()).await;
    assert!(early.is_err(), "it has not ended yet");
    let pid = vmm.id();
    end(vmm);
    process.exited().await.unwrap();
    process.exited().await.unwrap();
    assert_eq!(process.borrow(1, "vf0").unwrap_err(), BorrowError::NoProcess { pid });
    assert_eq!(VmmProcess::open(pid).unwrap_err(), BorrowError::NoProcess { pid });
}

#[test]
fn a_process_that_has_ended_but_was_not_waited_for_cannot_be_opened() {
    let mut vmm = child(Stdio::null());
    let process = VmmProcess::open(vmm.id()).unwrap();
    drop(vmm.stdin.take());
    // Blocks until it has ended, and leaves it to be waited for.
    let mut fds = [PollFd::new(&process.pidfd, PollFlags::IN)];
    poll(&mut fds, None).unwrap();
    let pid = vmm.id();
    assert_eq!(VmmProcess::open(pid).unwrap_err(), BorrowError::NoProcess { pid });
    vmm.wait().unwrap();
}

#[test]
fn only_a_number_that_no_process_has_is_no_process() {
    for errno in [Errno::SRCH, Errno::INVAL, Errno::NOENT] {
        assert_eq!(not_opened(9, errno), BorrowError::NoProcess { pid: 9 });
    }
    for errno in [Errno::ACCESS, Errno::PERM, Errno::NFILE, Errno::MFILE, Errno::NOMEM, Errno::NODEV] {
        assert!(matches!(not_opened(9, errno), BorrowError::OpenProcess { .. }), "{errno}");
    }
}

#[test]
fn the_identity_of_a_process_has_its_boot_its_number_and_its_start() {
    let first = VmmProcess::open(std::process::id()).unwrap();
    let again = VmmProcess::open(std::process::id()).unwrap();
    assert_eq!(first.identity(), again.identity());
    assert_eq!(first.identity().pid, std::process::id());
    assert_eq!(first.identity().boot_id.len(), 36);
    assert!(first.identity().start_ticks > 0);
    assert_eq!(VmmProcess::open(0).unwrap_err(), BorrowError::NoProcess { pid: 0 });
    assert_eq!(VmmProcess::open(u32::MAX).unwrap_err(), BorrowError::NoProcess { pid: u32::MAX });
}

#[test]
fn the_start_time_is_found_after_any_program_name() {
    let stat = "4711 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20 21";
    assert_eq!(parse_start_ticks(stat), Some(987_654));
    assert_eq!(parse_start_ticks("4711 (short) S 1 2 3"), None);
    assert_eq!(parse_start_ticks(""), None);
}

#[test]
fn a_process_that_proc_does_not_show_and_that_has_not_ended_is_not_taken_for_none() {
    let proc = tempfile::tempdir().unwrap();
    let process = child(Stdio::null());
    let error = hold(process.id(), proc.path()).unwrap_err();
    assert!(matches!(error, BorrowError::ReadProc { .. }), "{error}");
    end(process);
}
