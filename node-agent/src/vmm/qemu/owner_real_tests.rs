//! The QEMU of this machine, whose VM somebody else stops while it is copied.

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use futures::StreamExt;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::QemuVmm;
use super::owner::run_state;
use super::qmp::QmpClient;
use super::qmp::commands::QueryStatus;
use crate::vmm::budget::{Budget, Copying};
use crate::vmm::contract::Deadlines;
use crate::vmm::stopped::Stopped;
use crate::vmm::{RunState, Vmm, VmmError};

const RAM_BYTES: usize = 64 << 20;
/// So slowly that RAM is not copied before the test has done what it does.
const BYTES_PER_SECOND: u64 = 2_000_000;

/// A VM that runs its firmware, with two monitors, and with RAM that is not empty; None, and the reason on
/// stdout, if there is no QEMU here.
fn qemu(folder: &Path) -> Option<Child> {
    let program = "qemu-system-x86_64";
    let ram = folder.join("ram");
    let mut file = std::fs::File::create(&ram).unwrap();
    let page: Vec<u8> = (0..4096_u32).map(|n| (n % 251 + 1) as u8).collect();
    (0..RAM_BYTES / page.len()).for_each(|_| file.write_all(&page).unwrap());
    let monitor = |name: &str| format!("unix:{},server=on,wait=off", folder.join(name).display());
    let memory = format!(
        "memory-backend-file,id=ram,mem-path={},share=off,size={RAM_BYTES},prealloc=off",
        ram.display()
    );
    let child = Command::new(program)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-shutdown", "-m", "64"])
        .args(["-machine", "q35,accel=tcg,memory-backend=ram", "-object", &memory, "-device", "pvpanic"])
        .args(["-qmp", &monitor("qmp.sock"), "-qmp", &monitor("owner.sock")])
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

/// What its owner, or its guest, does with the VM, until it stands still.
async fn stops(owner: &QmpClient, how: &str) {
    while owner.execute(QueryStatus).await.unwrap().running {
        match how {
            "stop" => owner.raw("stop", json!({})).await,
            // What a guest writes to a port; its firmware has to have set up the power management before.
            line => owner.raw("human-monitor-command", json!({ "command-line": line })).await,
        }
        .unwrap();
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_vm_of_a_real_qemu_that_is_stopped_while_it_is_copied_is_not_moved_and_stays_so() {
    for (how, state) in [
        ("stop", RunState::Paused),
        ("o /w 0x604 0x2000", RunState::Stopped(Stopped::ShutDown)),
        ("o /b 0x505 1", RunState::Stopped(Stopped::Panicked)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let Some(mut child) = qemu(dir.path()) else { return };
        let run = async {
            for name in ["qmp.sock", "owner.sock"] {
                let socket = dir.path().join(name);
                // There is no event for that.
                while UnixStream::connect(&socket).await.is_err() {
                    sleep(Duration::from_millis(20)).await;
                }
                std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o600)).unwrap();
            }
            let socket = dir.path().join("qmp.sock");
            let vm = QemuVmm::connect(&socket, dir.path(), &[], Deadlines::default()).await.unwrap();
            let owner = QmpClient::connect(&dir.path().join("owner.sock")).await.unwrap();
            let budget = Budget { bandwidth_bytes_per_second: BYTES_PER_SECOND, ..Budget::default() };
            let mut streams = vm.start_save(false, budget).await.unwrap();
            let mut main = streams.remove(0);
            let taken = tokio::spawn(async move { while main.next().await.is_some() {} });
            let (estimates, _estimated) = tokio::sync::mpsc::unbounded_channel();
            let flow = std::sync::Arc::default();
            let copy = Copying { budget, devices: Vec::new(), flow, estimates };
            let (copied, ()) = tokio::join!(vm.converged(copy), stops(&owner, how));
            assert!(
                matches!(&copied, Err(VmmError::VmStopped { state: found }) if *found == state),
                "{how}: {copied:?}"
            );
            vm.abort_save().await.unwrap();
            assert_eq!(vm.take_back().await.unwrap(), state, "{how}");
            sleep(Duration::from_millis(100)).await;
            let status = owner.execute(QueryStatus).await.unwrap();
            assert_eq!((run_state(&status.status), status.running), (state, false), "{how}");
            taken.abort();
        };
        timeout(Duration::from_secs(60), run).await.expect("it should not take that long");
        child.kill().await.unwrap();
    }
}
