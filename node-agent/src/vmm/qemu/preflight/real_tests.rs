//! With the QEMU of this machine, emulating: what a VM says about itself and what a QEMU offers are of one
//! kind.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use super::probe::Prober;
use super::{Accelerator, Facts, Kind, Verdict, compare, facts};
use crate::process::cgroup::Cgroup;
use crate::vmm::qemu::qmp::QmpClient;

const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// A prober for one test; None where there is no cgroup v2, or no QEMU.
struct Place {
    run: TempDir,
    prober: Prober,
}

impl Place {
    fn new() -> Option<Self> {
        static COUNTED: AtomicUsize = AtomicUsize::new(0);
        let name = format!("test-probe-{}-{}", std::process::id(), COUNTED.fetch_add(1, Ordering::Relaxed));
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from).into_iter().find(|root| {
            Cgroup::make(root, &name).is_ok_and(|group| std::fs::remove_dir(group.path()).is_ok())
        });
        let (Some(cgroup_root), true) = (root, Path::new(PROGRAM).exists()) else {
            println!("not run: no {PROGRAM}, or no cgroup v2 that this user may write");
            return None;
        };
        let run = tempfile::tempdir().unwrap();
        // The twin's launcher, as its tests have it.
        let this = std::env::current_exe().unwrap();
        let play = ["--exact", "vmm::twin::tests::act", "--nocapture", "--"].map(OsString::from);
        let prober = Prober {
            launcher: std::iter::once(this.into()).chain(play).collect(),
            cgroup_root,
            cgroup_name: name,
            run_dir: run.path().to_owned(),
            limit: Duration::from_secs(60),
        };
        Some(Self { run, prober })
    }

    fn assert_nothing_left(&self) {
        let group = Cgroup::with_name(&self.prober.cgroup_root, &self.prober.cgroup_name).unwrap();
        assert!(!group.path().exists(), "the cgroup is left");
        assert_eq!(
            std::fs::read_dir(self.run.path())
                .unwrap()
                .filter(|e| e.as_ref().unwrap().file_name() == "probe")
                .count(),
            0
        );
    }

    /// A program that is no QEMU.
    fn script(&self, content: &str) -> PathBuf {
        let path = self.run.path().join("script");
        std::fs::write(&path, format!("#!/bin/sh\n{content}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

/// What a VM with these arguments says about itself.
async fn vm(arguments: &str) -> Facts {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp.sock");
    let mut child: Child = Command::new(PROGRAM)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-m", "32", "-S"])
        .args(arguments.split_whitespace())
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let found = async {
        let qmp = loop {
            match QmpClient::connect(&socket).await {
                Ok(qmp) => break qmp,
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        };
        facts::collect(&qmp).await.unwrap()
    };
    let found = timeout(Duration::from_secs(60), found).await.expect("QEMU does not answer");
    child.kill().await.unwrap();
    found
}

#[tokio::test]
async fn a_qemu_offers_every_feature_of_a_vm_of_the_same_qemu_whatever_its_cpu_and_machine() {
    let Some(place) = Place::new() else { return };
    let offer = place.prober.ask(Path::new(PROGRAM), Accelerator::Tcg).await.unwrap();
    place.assert_nothing_left();
    assert!(super::version::release(&offer.version) >= Some((7, 0)), "{}", offer.version);
    assert!(offer.machines.iter().any(|machine| machine.alias.as_deref() == Some("q35")), "{offer:?}");
    for arguments in [
        "-machine pc,accel=tcg -cpu max",
        "-machine q35,accel=tcg -cpu max -smp 4",
        "-machine pc-q35-7.2,accel=tcg -cpu EPYC-Milan,+topoext -smp 4,threads=2",
        "-machine pc,accel=tcg -cpu Cascadelake-Server,+invtsc",
        "-machine microvm,accel=tcg -cpu qemu64,hv-relaxed=on",
    ] {
        let facts = vm(arguments).await;
        let words: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        assert_eq!(compare(&facts, Ok(&offer), PROGRAM, &words, None), Verdict::default(), "{facts:?}");
        assert!(
            facts.cpu_features.contains("sse2") && facts.accelerator == Some(Accelerator::Tcg),
            "{facts:?}"
        );
    }
}

#[tokio::test]
async fn a_feature_that_was_switched_off_is_not_among_the_guests_features() {
    if Place::new().is_none() {
        return;
    }
    let with = vm("-machine pc,accel=tcg -cpu max").await;
    let without = vm("-machine pc,accel=tcg -cpu max,-avx2,-sse4.1").await;
    let difference: Vec<&String> = with.cpu_features.difference(&without.cpu_features).collect();
    assert_eq!(difference, ["avx2", "sse4-1"]);
    assert!(with.machine_type.starts_with("pc-i440fx-"), "{}", with.machine_type);
    // One VM's features as an offer for the other one.
    let offer = super::Offer { cpu_features: Some(without.cpu_features), ..super::Offer::default() };
    let verdict = compare(&with, Ok(&offer), PROGRAM, &[], None);
    let finding = &verdict.findings[0];
    assert_eq!(finding.kind, Kind::CpuFeaturesMissing);
    assert!(finding.message.contains("under tcg: avx2, sse4-1. "), "{}", finding.message);
}

#[tokio::test]
async fn nothing_is_left_of_a_program_that_does_not_answer_and_its_last_output_is_quoted() {
    let Some(mut place) = Place::new() else { return };
    let silent = place.script("echo I will not >&2; sleep 1000 & sleep 1000");
    place.prober.limit = Duration::from_millis(1500);
    let error = place.prober.ask(&silent, Accelerator::Tcg).await.unwrap_err().to_string();
    // The launcher is a test program here, and says something, too.
    assert!(error.contains("it did not answer within 1500 ms; it said: "), "{error}");
    assert!(error.ends_with("I will not"), "{error}");
    place.assert_nothing_left();
    let dying = place.script("echo no such accelerator >&2; exit 3");
    place.prober.limit = Duration::from_secs(60);
    let error = place.prober.ask(&dying, Accelerator::Tcg).await.unwrap_err().to_string();
    assert!(error.contains("it ended before it had answered: exit status: 3; it said: "), "{error}");
    assert!(error.ends_with("no such accelerator"), "{error}");
    place.assert_nothing_left();
}
