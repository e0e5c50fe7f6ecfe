//! The QEMU of this machine.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::sleep;

use super::server::soon;
use crate::vmm::qemu::qmp::commands::{
    Cont, CpuModel, CpuModelExpansionType, Done, Migrate, MigrateCancel, MigrateContinue,
    MigrateSetCapabilities, MigrateSetParameters, MigrationCapability, MigrationInfo, QomGet, QomList,
    QueryBlock, QueryCpuModelExpansion, QueryKvm, QueryMachines, QueryMigrate, QueryMigrateCapabilities,
    QueryMigrateParameters, QueryName, QueryPci, QueryStatus, QueryVersion, Quit, StatusInfo, Stop,
};
use crate::vmm::qemu::qmp::{Deadlines, EventKind, MigrationStatus, Notice, QmpClient, QmpError, RunState};

/// A QEMU that serves this socket; `None`, and the reason on stdout, if there is none here. It is killed when
/// it is dropped.
async fn qemu(socket: &Path) -> Option<Child> {
    let program = "qemu-system-x86_64";
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let child = Command::new(program)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-qmp", &monitor])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    match child {
        Ok(child) => {
            soon(listening(socket)).await;
            Some(child)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("skipped: {program} is not installed");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// Returns when a process listens. There is no event for that.
async fn listening(socket: &Path) {
    while UnixStream::connect(socket).await.is_err() {
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn qemu_answers_what_the_agent_asks() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    let Some(mut child) = qemu(&socket).await else { return };
    soon(async {
        let client = QmpClient::connect(&socket).await.unwrap();
        let mut events = client.events();
        assert!(client.version().qemu.major >= 7);
        assert_eq!(client.execute(QueryVersion).await.unwrap(), client.version());
        let status = client.execute(QueryStatus).await.unwrap();
        assert_eq!(status, StatusInfo { status: RunState::Running, running: true });
        assert_eq!(client.execute(QueryMigrate).await.unwrap(), MigrationInfo::default());
        assert_eq!(client.execute(QueryName).await.unwrap().name, None);
        assert!(!client.execute(QueryKvm).await.unwrap().enabled);
        assert!(client.execute(QueryMachines).await.unwrap().iter().any(|machine| machine.name == "none"));
        assert!(client.execute(QueryPci).await.unwrap().is_array());
        assert!(client.execute(QueryBlock).await.unwrap().is_array());
        let peripherals = client.execute(QomList { path: "/machine/peripheral".to_owned() }).await.unwrap();
        assert!(peripherals.iter().all(|property| property.child_type().is_none()), "{peripherals:?}");
        let machine = QomGet { path: "/machine".to_owned(), property: "type".to_owned() };
        assert_eq!(client.execute(machine).await, Ok(Value::from("none-machine")));
        let model = CpuModel { name: "qemu64".to_owned(), props: None };
        let expansion = QueryCpuModelExpansion { expansion: CpuModelExpansionType::Full, model };
        assert!(client.execute(expansion).await.unwrap().model["props"]["sse2"].is_boolean());

        assert_eq!(client.execute(Stop).await, Ok(Done {}));
        assert_eq!(client.execute(Cont).await, Ok(Done {}));
        for kind in [EventKind::Stop, EventKind::Resume] {
            let Some(Notice::Event(event)) = events.next().await else { panic!("no event") };
            assert_eq!(event.kind, kind);
            assert!(event.timestamp.is_some());
        }

        let unknown = client.raw("daydream", Value::Null).await.unwrap_err();
        assert!(
            matches!(&unknown, QmpError::Refused { class, .. } if class == "CommandNotFound"),
            "{unknown}"
        );

        client.execute(Quit).await.unwrap();
        assert!(child.wait().await.unwrap().success());
        let reason = "host-qmp-quit".to_owned();
        let Some(Notice::Event(event)) = events.next().await else { panic!("no event") };
        assert_eq!(event.kind, EventKind::Shutdown { guest: false, reason });
        assert!(matches!(events.next().await, Some(Notice::Lost { .. })));
    })
    .await;
}

#[tokio::test]
async fn qemu_accepts_what_the_agent_sets_for_a_migration() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    let Some(mut child) = qemu(&socket).await else { return };
    soon(async {
        let client = QmpClient::connect(&socket).await.unwrap();
        let mut events = client.events();
        let capabilities =
            vec![MigrationCapability::on("events"), MigrationCapability::on("pause-before-switchover")];
        client.execute(MigrateSetCapabilities { capabilities: capabilities.clone() }).await.unwrap();
        let all = client.execute(QueryMigrateCapabilities).await.unwrap();
        assert!(capabilities.iter().all(|capability| all.contains(capability)));

        let parameters = MigrateSetParameters {
            downtime_limit_ms: Some(900),
            max_bandwidth: Some(1 << 32),
            avail_switchover_bandwidth: Some(1 << 33),
            multifd_channels: Some(4),
        };
        client.execute(parameters).await.unwrap();
        let all = client.execute(QueryMigrateParameters).await.unwrap();
        assert_eq!((all.downtime_limit_ms, all.max_bandwidth), (Some(900), Some(1 << 32)));
        assert_eq!((all.avail_switchover_bandwidth, all.multifd_channels), (Some(1 << 33), Some(4)));

        client.execute(MigrateCancel).await.unwrap();
        let early = client.execute(MigrateContinue::switch_over()).await.unwrap_err();
        assert!(matches!(early, QmpError::Refused { .. }), "{early}");
        client.execute(Migrate { uri: format!("unix:{}.none", socket.display()) }).await.unwrap();
        let failed = client
            .migration_status_until(|info| info.status.as_ref().is_some_and(MigrationStatus::is_over))
            .await
            .unwrap();
        assert_eq!(failed.status, Some(MigrationStatus::Failed));
        assert!(failed.error_desc.unwrap().contains("No such file or directory"));
        for status in [MigrationStatus::Setup, MigrationStatus::Failed] {
            let Some(Notice::Event(event)) = events.next().await else { panic!("no event") };
            assert_eq!(event.kind, EventKind::Migration { status });
        }
        child.kill().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn qemu_serves_one_client_and_then_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    let Some(mut child) = qemu(&socket).await else { return };
    soon(async {
        let holder = QmpClient::connect(&socket).await.unwrap();
        let hasty = Deadlines { greeting: Duration::from_millis(200), ..Deadlines::default() };
        // The first ones wait in the queue of connections, where they stay when they have given up; the last
        // finds it full.
        let mut seen = Vec::new();
        for _ in 0..4 {
            let error = QmpClient::connect_with(&socket, hasty).await.unwrap_err();
            assert!(error.to_string().contains("another client may hold the monitor"), "{error}");
            seen.push(matches!(error, QmpError::NoGreeting { .. }));
        }
        assert!(seen[0], "{seen:?}");
        assert!(!seen[3], "{seen:?}");
        holder.execute(QueryStatus).await.unwrap();
        drop(holder);
        let next = QmpClient::connect(&socket).await.unwrap();
        next.execute(QueryStatus).await.unwrap();
        child.kill().await.unwrap();
    })
    .await;
}
