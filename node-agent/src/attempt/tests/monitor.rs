//! A real QEMU whose monitor breaks while it is told to run its VM.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::attempt::vmm_calls::resume;
use crate::vmm::contract::Deadlines;
use crate::vmm::qemu::QemuVmm;
use crate::vmm::stopped::Stopped;
use crate::vmm::{RunState, Vmm};

/// A QEMU that waits for `cont`; None, and the reason on stdout, if there is none here.
fn qemu(socket: &Path) -> Option<Child> {
    let program = "qemu-system-x86_64";
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let child = Command::new(program)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-S"])
        .args(["-qmp", &monitor])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    match child {
        Ok(child) => Some(child),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("skipped: {program} is not installed");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// Carries the connections to QEMU. The first one breaks at `cont`: before QEMU has it, or after.
async fn carry(listener: UnixListener, socket: PathBuf, qemu_has_it: bool) {
    let mut breaks = true;
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let (mut from, mut back) = client.into_split();
        let (mut answers, mut to) = UnixStream::connect(&socket).await.unwrap().into_split();
        let answering = tokio::spawn(async move { tokio::io::copy(&mut answers, &mut back).await });
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let line = &buffer[..read];
            let is_cont = String::from_utf8_lossy(line).contains("\"cont\"");
            if is_cont && std::mem::take(&mut breaks) {
                answering.abort();
                if qemu_has_it {
                    to.write_all(line).await.unwrap();
                }
                break;
            }
            to.write_all(line).await.unwrap();
        }
        answering.abort();
        let _ = answering.await;
    }
}

#[tokio::test]
async fn a_real_qemu_whose_monitor_breaks_at_cont_runs_its_vm() {
    for qemu_has_it in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (socket, between) = (dir.path().join("qmp.sock"), dir.path().join("between.sock"));
        let Some(mut child) = qemu(&socket) else { return };
        let listener = UnixListener::bind(&between).unwrap();
        std::fs::set_permissions(&between, PermissionsExt::from_mode(0o600)).unwrap();
        let run = async {
            // There is no event for that.
            while UnixStream::connect(&socket).await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
            let carrying = tokio::spawn(carry(listener, socket.clone(), qemu_has_it));
            let vm = QemuVmm::connect(&between, dir.path(), &[], Deadlines::default()).await.unwrap();
            assert_eq!(vm.run_state().await.unwrap(), RunState::Stopped(Stopped::NotStarted));
            resume(&vm, |_| {}).await.unwrap();
            assert_eq!(vm.run_state().await.unwrap(), RunState::Running);
            carrying.abort();
        };
        timeout(Duration::from_secs(30), run).await.expect("it should not take that long");
        child.kill().await.unwrap();
    }
}
