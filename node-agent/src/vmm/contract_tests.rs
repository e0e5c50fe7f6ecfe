use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use bytes::Bytes;
use futures::stream;
use rustix::process::geteuid;
use slackwater_proto::limits::vmm_server;
use slackwater_proto::server::{bind_unix, serve_unix};
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::vmm::{Device, RamRange};
use tempfile::TempDir;
use tokio::sync::oneshot;

use super::*;
use crate::vmm::stub::Stub;

struct Served {
    _dir: TempDir,
    socket: PathBuf,
    _stop: oneshot::Sender<()>,
}

fn serve(stub: Stub) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vmm.sock");
    let listener = bind_unix(&socket).unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let stopped = async { stopped.await.unwrap_or_default() };
        serve_unix(listener, Routes::new(vmm_server(stub)), stopped, Duration::ZERO).await
    });
    Served { _dir: dir, socket, _stop: stop }
}

async fn connected(stub: Stub) -> (Served, ContractVmm) {
    let served = serve(stub);
    let vmm = ContractVmm::connect(&served.socket, Deadlines::default()).await.unwrap();
    (served, vmm)
}

#[tokio::test]
async fn every_call_reaches_the_vmm_and_its_refusals_come_back_with_its_message() {
    let stub = Stub::default();
    let (_served, vmm) = connected(stub.clone()).await;
    assert_eq!(vmm.pid(), std::process::id(), "the one that listens");

    let error = vmm.start_save(true, Budget::default()).await.err().unwrap().to_string();
    assert_eq!(error, "the VMM refused start_save: the devices' writes are not tracked");
    let saved: Vec<_> =
        vmm.start_save(false, Budget::default()).await.unwrap().swap_remove(0).collect().await;
    let saved: Vec<String> = saved
        .into_iter()
        .map(|piece| match piece {
            Ok(piece) => String::from_utf8(piece.to_vec()).unwrap(),
            Err(error) => error.to_string(),
        })
        .collect();
    assert_eq!(saved, ["ra", "m", "the VMM refused start_save: the log broke"], "empty pieces are left out");

    vmm.start_load(vec![stream::iter([Bytes::from_static(b"ra"), Bytes::from_static(b"m")]).boxed()])
        .await
        .unwrap();
    let several = vmm.start_load(vec![stream::empty().boxed(), stream::empty().boxed()]).await.unwrap_err();
    assert_eq!(
        several.to_string(),
        "the VMM refused start_load: it takes its state in one stream, and 2 have come"
    );
    assert_eq!(*stub.loaded.lock().unwrap(), b"ram");
    assert_eq!(
        vmm.finish_load().await.unwrap_err().to_string(),
        "the VMM refused finish_load: 17 bytes are missing"
    );
    vmm.finish_save().await.unwrap();
    vmm.abort_save().await.unwrap();
    vmm.resume().await.unwrap();
    vmm.quit().await.unwrap();
}

#[tokio::test]
async fn a_connection_that_breaks_is_opened_again_by_the_next_call_while_its_process_lives() {
    let served = serve(Stub::incoming());
    let between = served.socket.with_file_name("between.sock");
    let listener = tokio::net::UnixListener::bind(&between).unwrap();
    fs::set_permissions(&between, Permissions::from_mode(0o600)).unwrap();
    let cut = std::sync::Arc::new(tokio::sync::Notify::new());
    let (socket, cuts) = (served.socket.clone(), std::sync::Arc::clone(&cut));
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let mut to = tokio::net::UnixStream::connect(&socket).await.unwrap();
            let cuts = std::sync::Arc::clone(&cuts);
            tokio::spawn(async move {
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
                    () = cuts.notified() => {}
                }
            });
        }
    });
    let vmm = ContractVmm::connect(&between, Deadlines::default()).await.unwrap();
    for _ in 0..3 {
        vmm.describe().await.unwrap();
        cut.notify_waiters();
        // Whether this one is carried out is not known, so it is not repeated.
        let broken = vmm.resume().await;
        assert!(matches!(broken, Err(VmmError::Lost { call: "resume", .. })), "{broken:?}");
        vmm.resume().await.unwrap();
    }
}

#[tokio::test]
async fn a_call_that_is_not_answered_ends_at_its_deadline() {
    let served = serve(Stub::incoming());
    let deadlines = Deadlines { run_state: Duration::from_millis(50), ..Deadlines::default() };
    let vmm = ContractVmm::connect(&served.socket, deadlines).await.unwrap();
    assert_eq!(vmm.pause().await.unwrap_err().to_string(), "the VMM did not answer pause within 50 ms");
    vmm.describe().await.unwrap();
}

#[tokio::test]
async fn a_vmm_that_ends_is_lost_and_not_mistaken_for_one_that_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vmm.sock");
    let listener = bind_unix(&socket).unwrap();
    let vmm = ContractVmm::connect(&socket, Deadlines::default()).await.unwrap();
    drop(listener);
    let error = vmm.describe().await.unwrap_err();
    assert!(matches!(error, VmmError::Lost { call: "describe", .. }), "{error:?}");
    let error = ContractVmm::connect(&socket, Deadlines::default()).await.unwrap_err().to_string();
    let expected = format!(
        "the VMM cannot be reached: cannot connect to the socket {}: no process listens on it (it has ended)",
        socket.display()
    );
    assert_eq!(error, expected);
}

#[tokio::test]
async fn only_a_socket_that_no_other_user_could_have_made_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vmm.sock");
    let refusal = async |path: &Path| {
        let error = ContractVmm::connect(path, Deadlines::default()).await.unwrap_err().to_string();
        error.replace(&dir.path().display().to_string(), "DIR")
    };
    assert_eq!(
        refusal(&socket).await,
        "the VMM cannot be reached: cannot connect to the socket DIR/vmm.sock: it does not exist"
    );
    let _listener = UnixListener::bind(&socket).unwrap();
    for mode in [0o666, 0o660, 0o700, 0o4600] {
        fs::set_permissions(&socket, Permissions::from_mode(mode)).unwrap();
        assert_eq!(
            refusal(&socket).await,
            format!("the VMM's socket DIR/vmm.sock is refused: its mode is {mode:04o}, and must be 0600")
        );
    }
    fs::set_permissions(&socket, Permissions::from_mode(0o600)).unwrap();
    let link = dir.path().join("link.sock");
    std::os::unix::fs::symlink(&socket, &link).unwrap();
    assert_eq!(refusal(&link).await, "the VMM's socket DIR/link.sock is refused: it is not a socket");
    let folder_link = dir.path().with_extension("link");
    std::os::unix::fs::symlink(dir.path(), &folder_link).unwrap();
    let told = refusal(&folder_link.join("vmm.sock")).await;
    fs::remove_file(&folder_link).unwrap();
    assert!(told.ends_with("is refused: there is a symbolic link on its path"), "{told}");
}

#[tokio::test]
async fn a_socket_and_its_process_are_of_the_user_whose_folder_it_is() {
    if !geteuid().is_root() {
        eprintln!("not run: only root gives a socket to another user");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vmm.sock");
    let _listener = bind_unix(&socket).unwrap();
    let refusal = async || {
        let error = ContractVmm::connect(&socket, Deadlines::default()).await.unwrap_err().to_string();
        error.replace(&dir.path().display().to_string(), "DIR")
    };
    let own = |path: &Path, user| std::os::unix::fs::chown(path, Some(user), None).unwrap();
    own(&socket, 7);
    assert_eq!(
        refusal().await,
        "the VMM's socket DIR/vmm.sock is refused: it belongs to user 7, and must belong to user 0"
    );
    own(dir.path(), 7);
    assert_eq!(
        refusal().await,
        "the VMM's socket DIR/vmm.sock is refused: it is served by user 0, and must be by user 7"
    );
    own(&socket, 0);
    assert_eq!(
        refusal().await,
        "the VMM's socket DIR/vmm.sock is refused: it belongs to user 0, and must belong to user 7"
    );
    // Where others may write, too, the folder's owner says nothing.
    own(&socket, 7);
    fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).unwrap();
    assert_eq!(
        refusal().await,
        "the VMM's socket DIR/vmm.sock is refused: it belongs to user 7, and must belong to user 0"
    );
}

fn device(name: &str, descriptor: i32) -> Device {
    Device { name: name.to_owned(), descriptor, guest_address: "pio 0x1000".to_owned() }
}

fn description() -> DescribeResponse {
    DescribeResponse {
        run_state: WireRunState::Running.into(),
        devices: vec![device("a", 3), device("b", 4)],
        ram: vec![RamRange { gpa: 0, iova: 0, bytes: 7 }, RamRange { gpa: 9, iova: 9, bytes: u64::MAX }],
        dirty_tracking: WireDirtyTracking::None.into(),
        vmm: "lab 1".to_owned(),
    }
}

#[tokio::test]
async fn a_description_keeps_the_vmms_order() {
    let (_served, vmm) = connected(Stub { description: description(), ..Stub::default() }).await;
    let described = vmm.describe().await.unwrap();
    assert_eq!((described.run_state, described.dirty_tracking), (RunState::Running, DirtyTracking::None));
    assert_eq!(
        described.devices.iter().map(|d| (d.name.as_str(), d.descriptor)).collect::<Vec<_>>(),
        [("a", 3), ("b", 4)]
    );
    assert_eq!(described.ram_bytes, u64::MAX, "a sum that does not fit is not wrapped");
    assert_eq!(described.vmm, "lab 1");
}

#[test]
fn an_invalid_description_is_refused_with_what_is_wrong() {
    type Change = fn(&mut DescribeResponse);
    let changes: [(&str, Change); 6] = [
        ("run_state 9 is unknown", |d| d.run_state = 9),
        ("dirty_tracking 0 is unknown", |d| d.dirty_tracking = 0),
        ("device 1 has no name", |d| d.devices[1].name.clear()),
        ("device b has the descriptor -1", |d| d.devices[1].descriptor = -1),
        ("device a, descriptor 4, is named twice", |d| d.devices[1].name = "a".to_owned()),
        ("device b, descriptor 3, is named twice", |d| d.devices[1].descriptor = 3),
    ];
    for (reason, change) in changes {
        let mut described = description();
        change(&mut described);
        let error = parse(described).unwrap_err().to_string();
        assert_eq!(error, format!("the VMM's answer to describe is not valid: {reason}"));
    }
}
