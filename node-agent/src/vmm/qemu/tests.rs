use std::time::Duration;

use serde_json::{Value, json};

use super::QemuVmm;
use super::owner::run_state;
use super::qmp::tests::server::{Server, Talk, soon};
use crate::vmm::budget::{Budget, Copying};
use crate::vmm::contract::Deadlines;
use crate::vmm::stopped::Stopped;
use crate::vmm::{RunState, Vmm, VmmError};

/// A VM of a QEMU that says what the test says.
async fn vm(server: &Server, deadlines: Deadlines) -> (QemuVmm, Talk) {
    let connect = QemuVmm::connect(&server.socket, server.socket.parent().unwrap(), &[], deadlines);
    let (vm, talk) = soon(async { tokio::join!(connect, server.negotiate()) }).await;
    (vm.unwrap(), talk)
}

fn status(status: &str) -> (&'static str, Value) {
    ("query-status", json!({"status": status, "running": status == "running"}))
}

fn migration(status: &str) -> (&'static str, Value) {
    ("query-migrate", json!({ "status": status }))
}

/// Answers these commands, which come in this order, and no others.
async fn answers(talk: &mut Talk, script: Vec<(&'static str, Value)>) {
    for (command, answer) in script {
        talk.answer(command, answer).await;
    }
}

#[tokio::test]
async fn a_vm_is_resumed_only_when_qemu_has_taken_it_back_from_its_migration() {
    let server = Server::new();
    let (vm, mut talk) = vm(&server, Deadlines::default()).await;
    let script = vec![
        status("finish-migrate"),
        status("finish-migrate"),
        status("postmigrate"),
        status("postmigrate"),
        ("cont", json!({})),
        status("paused"),
        status("running"),
    ];
    let (resumed, ()) = soon(async { tokio::join!(vm.take_back(), answers(&mut talk, script)) }).await;
    assert_eq!(resumed.unwrap(), RunState::Running);
}

#[tokio::test]
async fn a_vm_that_its_owner_or_its_guest_has_stopped_is_taken_back_as_it_is_and_never_resumed() {
    for state in [
        "paused",
        "shutdown",
        "suspended",
        "guest-panicked",
        "io-error",
        "watchdog",
        "internal-error",
        "prelaunch",
        "daydreaming",
    ] {
        let server = Server::new();
        let (vm, mut talk) = vm(&server, Deadlines::default()).await;
        let script = vec![status("finish-migrate"), status(state)];
        let (left, ()) = soon(async { tokio::join!(vm.take_back(), answers(&mut talk, script)) }).await;
        assert_eq!(left.unwrap(), run_state(&state.parse().unwrap()), "{state}");
    }
}

#[tokio::test]
async fn a_vm_that_runs_when_it_should_be_stopped_for_its_migration_is_not_stopped_by_the_agent() {
    let server = Server::new();
    let (vm, mut talk) = vm(&server, Deadlines::default()).await;
    let (paused, ()) =
        soon(async { tokio::join!(vm.pause(), answers(&mut talk, vec![status("running")])) }).await;
    assert!(paused.unwrap_err().to_string().contains("another client has ended its migration"));
}

/// What comes of a copying during which these events come. After them QEMU is in `finish-migrate` and
/// pre-switchover, or, with a `status`, it goes on copying while the VM does that.
async fn copied(events: &[(&str, Value)], says: Option<&'static str>) -> Result<(), VmmError> {
    let server = Server::new();
    let (vm, mut talk) = vm(&server, Deadlines::default()).await;
    *vm.since_save.lock() = Some(vm.qmp.events());
    let (estimates, _estimated) = tokio::sync::mpsc::unbounded_channel();
    let copy = Copying {
        budget: Budget::default(),
        devices: Vec::new(),
        flow: std::sync::Arc::default(),
        estimates,
    };
    let qemu = async {
        let mut asked = 0;
        loop {
            let request = talk.next().await;
            asked += 1;
            if asked == 3 {
                for (name, data) in events {
                    let timestamp = json!({"seconds": 1, "microseconds": 0});
                    talk.say(&json!({"event": name, "data": data, "timestamp": timestamp}).to_string()).await;
                }
            }
            let done = asked > 3 && says.is_none();
            let answer = match request["execute"].as_str().unwrap() {
                "query-migrate" => json!({"status": if done { "pre-switchover" } else { "active" }}),
                "query-status" => match (asked > 3, says) {
                    (false, _) => json!({"status": "running", "running": true}),
                    (true, None) => json!({"status": "finish-migrate", "running": false}),
                    (true, Some(says)) => json!({"status": says, "running": says == "running"}),
                },
                other => panic!("{other}"),
            };
            talk.say(&json!({"return": answer, "id": request["id"]}).to_string()).await;
        }
    };
    soon(async {
        tokio::select! {
            copied = vm.converged(copy) => copied,
            () = qemu => unreachable!(),
        }
    })
    .await
}

#[tokio::test]
async fn a_vm_that_only_qemu_has_stopped_is_ready_for_the_gate() {
    copied(&[("MIGRATION_PASS", json!({"pass": 2})), ("STOP", Value::Null)], None).await.unwrap();
}

#[tokio::test]
async fn a_vm_that_its_guest_or_another_client_stops_while_it_is_copied_is_not_moved_and_the_cause_is_named()
{
    let stop = || ("STOP", Value::Null);
    let pass = || ("MIGRATION_PASS", json!({"pass": 3}));
    let shutdown = || ("SHUTDOWN", json!({"guest": true, "reason": "guest-shutdown"}));
    for (events, says, state) in [
        (vec![stop(), pass()], None, RunState::Paused),
        (vec![stop()], Some("paused"), RunState::Paused),
        (vec![], Some("io-error"), RunState::Stopped(Stopped::IoError)),
        (vec![shutdown(), stop()], None, RunState::Stopped(Stopped::ShutDown)),
        (vec![("SUSPEND", Value::Null)], None, RunState::Stopped(Stopped::Suspended)),
        (
            vec![("GUEST_PANICKED", json!({"action": "pause"})), stop()],
            None,
            RunState::Stopped(Stopped::Panicked),
        ),
    ] {
        let error = copied(&events, says).await.unwrap_err();
        assert!(
            matches!(error, VmmError::VmStopped { state: found } if found == state),
            "{events:?} {error:?}"
        );
        for says in [state.words(), state.remedy(), "stays as it is"] {
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}

#[tokio::test]
async fn a_vm_that_runs_already_is_left_as_it_is() {
    let server = Server::new();
    let (vm, mut talk) = vm(&server, Deadlines::default()).await;
    let (resumed, ()) =
        soon(async { tokio::join!(vm.resume(), answers(&mut talk, vec![status("running")])) }).await;
    resumed.unwrap();
}

#[tokio::test]
async fn a_cont_that_qemu_answers_late_is_still_executed() {
    let server = Server::new();
    let hasty = Deadlines { run_state: Duration::from_millis(50), ..Deadlines::default() };
    let (vm, mut talk) = vm(&server, hasty).await;
    let script = async {
        answers(&mut talk, vec![status("paused")]).await;
        let late = talk.expect("cont").await["id"].clone();
        answers(&mut talk, vec![status("paused")]).await;
        talk.say(&json!({"return": {}, "id": late}).to_string()).await;
        answers(&mut talk, vec![status("running")]).await;
    };
    let (resumed, ()) = soon(async { tokio::join!(vm.resume(), script) }).await;
    resumed.unwrap();
}

#[tokio::test]
async fn a_qemu_that_refuses_cont_is_not_mistaken_for_one_that_runs() {
    let server = Server::new();
    let (vm, mut talk) = vm(&server, Deadlines::default()).await;
    let script = async {
        answers(&mut talk, vec![status("internal-error")]).await;
        let id = talk.expect("cont").await["id"].clone();
        let error = json!({"class": "GenericError", "desc": "Resetting the Virtual Machine is required"});
        talk.say(&json!({"error": error, "id": id}).to_string()).await;
    };
    let (resumed, ()) = soon(async { tokio::join!(vm.resume(), script) }).await;
    let error = resumed.unwrap_err();
    assert!(matches!(error, VmmError::Refused { call: "resume", .. }), "{error:?}");
    assert!(error.to_string().contains("Resetting the Virtual Machine is required"), "{error}");
}

#[tokio::test]
async fn a_guest_that_has_failed_since_a_cont_whose_answer_was_lost_is_not_run_again() {
    for state in ["guest-panicked", "io-error", "shutdown", "running"] {
        let server = Server::new();
        let vm = lost_at_cont(&server).await;
        let again = async {
            let mut talk = server.negotiate().await;
            answers(&mut talk, vec![status(state)]).await;
            talk
        };
        let (resumed, _talk) = soon(async { tokio::join!(vm.resume(), again) }).await;
        resumed.unwrap();
    }
}

#[tokio::test]
async fn a_vm_that_is_still_paused_after_a_cont_whose_answer_was_lost_is_told_again() {
    let server = Server::new();
    let vm = lost_at_cont(&server).await;
    let again = async {
        let mut talk = server.negotiate().await;
        answers(&mut talk, vec![status("prelaunch"), ("cont", json!({})), status("running")]).await;
        talk
    };
    let (resumed, _talk) = soon(async { tokio::join!(vm.resume(), again) }).await;
    resumed.unwrap();
}

/// A VM whose monitor has broken when it was told to `cont`.
async fn lost_at_cont(server: &Server) -> QemuVmm {
    let (vm, mut talk) = vm(server, Deadlines::default()).await;
    let breaks = async {
        answers(&mut talk, vec![status("prelaunch")]).await;
        talk.expect("cont").await;
        drop(talk);
    };
    let (lost, ()) = soon(async { tokio::join!(vm.resume(), breaks) }).await;
    assert!(matches!(lost, Err(VmmError::Lost { .. })), "{lost:?}");
    vm
}

#[tokio::test]
async fn a_save_has_ended_when_qemu_reports_completed_and_not_when_it_takes_the_vm_back() {
    for (end, saved) in [("completed", true), ("cancelled", false), ("failed", false)] {
        let server = Server::new();
        let (vm, mut talk) = vm(&server, Deadlines::default()).await;
        let script = async {
            answers(&mut talk, vec![("migrate-continue", json!({})), migration("device")]).await;
            let timestamp = json!({"seconds": 1, "microseconds": 0});
            let event = json!({"event": "MIGRATION", "data": {"status": end}, "timestamp": timestamp});
            talk.say(&event.to_string()).await;
            answers(&mut talk, vec![migration(end)]).await;
        };
        let (result, ()) = soon(async { tokio::join!(vm.finish_save(), script) }).await;
        assert_eq!(result.is_ok(), saved, "{end}: {result:?}");
        if let Err(error) = result {
            assert!(error.to_string().contains(&format!("QEMU's migration is {end}")), "{error}");
        }
    }
}
