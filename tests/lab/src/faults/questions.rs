//! The three questions after each cell. Did it end as expected, by the kernels' traces? Is everything where
//! it belongs, with nothing leaked or reserved? Is the status true?

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use kube::{Api, ResourceExt};
use slackwater_api::{AssignedVM, MigrationPhase, VMMigration, VMMigrationStatus, VmState};
use slackwater_proto::node::JournalRecord;
use tokio::time::{Instant, interval, timeout};

use super::matrix::{Cell, End, Expected, Fault, Phase, Side};
use super::report::Outcome;
use super::scene::{DEVICES, Ends, Played};
use crate::cluster::{Cluster, NAMESPACE, TIMEOUT, Watching, has_condition};
use crate::witness::{
    PeerToPeer, State, Trace, Violation, Waking, captured_at_slack_water, never_ran, one_runner,
    quiesced_together, woke_together,
};
use slackwater_reference_vmm::guest::Report;

/// A guest that runs counts within this time.
const A_ROUND: Duration = Duration::from_secs(5);

/// Where the VM runs, and what the status says.
#[derive(Clone, Debug)]
struct Observed {
    at: Option<Side>,
    guest: Option<Report>,
    succeeded: bool,
    reason: String,
    message: String,
    in_doubt: bool,
}

/// Asks all three about a migration that has ended.
///
/// # Errors
/// When they cannot be answered. Wrong answers are in the outcome.
pub async fn ask(cluster: &Cluster, cell: &Cell, ends: Ends, played: &Played) -> anyhow::Result<Outcome> {
    let expected = match cell.expected {
        Expected::Ends(end) | Expected::InDoubtUntil(_, end) => end,
        Expected::CannotOccur(why) => bail!("{cell} cannot occur: {why}"),
    };
    let seen = look(cluster, ends, played).await?;
    let mut problems = Vec::new();
    let mut note = |what: &str, answer: anyhow::Result<()>| {
        if let Err(error) = answer {
            problems.push(format!("{what}: {error:#}"));
        }
    };
    note("the end", is_expected(expected, &seen));
    note("the guest", guest_is_sound(&seen, &played.watching.before));
    note("the trace", judged_by_trace(cluster, expected, ends, played).await);
    note("the doubt", doubt_was_reported(cell, &seen, played));
    let home = seen.at.map(|side| ends.at(side));
    if let Some(home) = home {
        note("the status of the VM", cluster.until_vm_at(home).await.map(drop));
        note("what is left", is_clean(cluster, ends, home, &played.migration).await);
    } else {
        note("the status of the VM", is_reported_lost(cluster).await);
    }
    note("the status", status_is_true(expected, cluster, played).await);
    Ok(Outcome {
        cell: *cell,
        seen: seen.to_string(),
        problems,
        home,
        took: Duration::ZERO,
        evidence: String::new(),
    })
}

impl std::fmt::Display for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.in_doubt {
            f.write_str("in doubt, then ")?;
        }
        match (self.at, self.succeeded) {
            (Some(Side::Source), false) => write!(f, "runs at the source ({})", self.reason),
            (Some(Side::Destination), true) => f.write_str("runs at the destination"),
            (None, false) => write!(f, "lost ({})", self.reason),
            (None, true) => f.write_str("arrived, and died there"),
            (Some(side), _) => write!(f, "runs at the {}, but the status says {}", side.name(), self.reason),
        }
    }
}

/// The end at which the guest counts. `None`: nowhere.
///
/// # Errors
/// When it counts at both ends.
pub async fn runner(cluster: &Cluster, ends: Ends) -> anyhow::Result<Option<(Side, Report)>> {
    let mut running = Vec::new();
    for side in [Side::Source, Side::Destination] {
        if let Some(guest) = counting_guest(cluster, ends.at(side)).await {
            running.push((side, guest));
        }
    }
    ensure!(running.len() < 2, "the VM runs on both nodes: {running:?}");
    Ok(running.pop())
}

/// Checks by the kernels' traces that only the end at which the VM runs now has run it, or the source before
/// the destination.
///
/// # Errors
/// With the first event that contradicts it.
pub async fn only_one_ran(cluster: &Cluster, home: Side, watching: &Watching) -> anyhow::Result<()> {
    let (source, destination) = cluster.traces(watching).await?;
    match home {
        Side::Source => never_ran(&destination)?,
        Side::Destination => drop(one_runner(&source, &destination)?),
    }
    Ok(())
}

async fn look(cluster: &Cluster, ends: Ends, played: &Played) -> anyhow::Result<Observed> {
    let (at, guest) =
        runner(cluster, ends).await?.map_or((None, None), |(side, guest)| (Some(side), Some(guest)));
    let status = status(played)?;
    let succeeded = status.conditions.iter().find(|condition| condition.type_ == "Succeeded");
    let succeeded = succeeded.context("no condition Succeeded")?;
    let doubted =
        cluster.event_reasons(&played.migration.name_any()).await?.iter().any(|reason| reason == "InDoubt");
    let in_doubt =
        |status: &VMMigrationStatus| has_condition(&status.conditions, "InDoubt", "True") == Some(true);
    Ok(Observed {
        at,
        guest,
        succeeded: succeeded.status == "True",
        reason: succeeded.reason.clone(),
        message: succeeded.message.clone(),
        in_doubt: doubted || played.decided.status.as_ref().is_some_and(in_doubt),
    })
}

fn status(played: &Played) -> anyhow::Result<&VMMigrationStatus> {
    played.migration.status.as_ref().context("no status")
}

/// The guest of the only VMM of a node, if it counts on.
async fn counting_guest(cluster: &Cluster, node: &str) -> Option<Report> {
    let first = cluster.guest(node).await.ok()?;
    let deadline = Instant::now() + A_ROUND;
    while Instant::now() < deadline {
        let now = cluster.guest(node).await.ok()?;
        if now.count > first.count {
            return Some(now);
        }
    }
    None
}

fn is_expected(expected: End, seen: &Observed) -> anyhow::Result<()> {
    let given = |reasons: &[&str]| reasons.contains(&seen.reason.as_str());
    let is = match expected {
        End::AtSource(reasons) => seen.at == Some(Side::Source) && !seen.succeeded && given(reasons),
        End::AtDestination => seen.at == Some(Side::Destination) && seen.succeeded,
        End::Lost(reasons) => seen.at.is_none() && !seen.succeeded && given(reasons),
        End::DiedAtDestination => seen.at.is_none() && seen.succeeded,
    };
    ensure!(is, "expected: {expected}; seen: {seen}; the status says {}: {}", seen.reason, seen.message);
    Ok(())
}

fn guest_is_sound(seen: &Observed, before: &Report) -> anyhow::Result<()> {
    let Some(guest) = &seen.guest else { return Ok(()) };
    ensure!(guest.count > before.count, "it has gone back from {} to {}", before.count, guest.count);
    ensure!(guest.errors == before.errors, "it found errors: {guest:?}, before {before:?}");
    Ok(())
}

/// Judges by the kernels' traces. A gap in the record of the vCPUs is no violation here; only what was seen
/// is.
async fn judged_by_trace(
    cluster: &Cluster,
    expected: End,
    ends: Ends,
    played: &Played,
) -> anyhow::Result<()> {
    let (source, destination) = cluster.traces(&played.watching).await?;
    let seen = |judged: Result<usize, Violation>| match judged {
        Err(violation) if violation.at_ns.is_some() => Err(violation),
        _ => Ok(()),
    };
    let policy = PeerToPeer::Required;
    match expected {
        End::AtSource(_) => {
            never_ran(&destination)?;
            seen(quiesced_together(&source, policy))?;
            seen(captured_at_slack_water(&source))?;
            seen(woke_together(&source, Waking::AfterRollback, policy))?;
            all_run(&source, ends.source)?;
        }
        End::AtDestination | End::DiedAtDestination => {
            one_runner(&source, &destination)?;
            seen(quiesced_together(&source, policy))?;
            seen(captured_at_slack_water(&source))?;
            seen(woke_together(&destination, Waking::AfterLoad, policy))?;
        }
        // If the destination started to run it, the source had ended before.
        End::Lost(_) => {
            if never_ran(&destination).is_err() {
                one_runner(&source, &destination)?;
            }
        }
    }
    Ok(())
}

/// All devices are in RUNNING, as far as the trace knows: an untouched device has no state in it.
fn all_run(trace: &Trace, node: &str) -> anyhow::Result<()> {
    for device in trace.devices.keys() {
        let state = trace.final_state(device);
        ensure!(matches!(state, None | Some(State::Running)), "{device} of {node} is in {state:?}");
    }
    Ok(())
}

fn doubt_was_reported(cell: &Cell, seen: &Observed, played: &Played) -> anyhow::Result<()> {
    if cell.must_be_in_doubt() {
        ensure!(seen.in_doubt, "it was never reported to be in doubt");
    } else if cell.phase < Phase::Loaded {
        ensure!(!seen.in_doubt, "it was reported to be in doubt before a commit was possible");
    }
    // An administrator who has to see to a device must learn which one it is.
    if cell.fault == Fault::DeviceHangsForGood && cell.must_be_in_doubt() {
        let decided = played.decided.status.as_ref().context("no status")?;
        let doubt = decided.conditions.iter().find(|c| c.type_ == "InDoubt" && c.status == "True");
        let doubt = doubt.context("it was not in doubt while the device hung")?;
        ensure!(doubt.reason == "DeviceHangs", "the doubt's reason is {}: {}", doubt.reason, doubt.message);
        ensure!(doubt.message.contains("device"), "the doubt names no device: {}", doubt.message);
    }
    // An administrator who has to restore a journal must learn which file it is.
    let decided = played.decided.status.as_ref().context("no status")?;
    let doubt = decided.conditions.iter().find(|c| c.type_ == "InDoubt" && c.status == "True");
    if let (Some(doubt), Some(file)) = (doubt, played.damaged.first()) {
        let name = file.path.rsplit('/').next().unwrap_or_default();
        ensure!(doubt.message.contains(name), "the doubt does not name {name}: {}", doubt.message);
    }
    Ok(())
}

async fn status_is_true(expected: End, cluster: &Cluster, played: &Played) -> anyhow::Result<()> {
    let name = played.migration.name_any();
    let now = cluster.migrations().get(&name).await?.status.context("no status")?;
    ensure!(
        has_condition(&now.conditions, "InDoubt", "True") != Some(true),
        "it is still reported to be in doubt: {now:#?}"
    );
    ensure!(now.completion_time.is_some(), "it has no completionTime");
    let message = |type_: &str| {
        now.conditions.iter().find(|c| c.type_ == type_).map(|c| c.message.clone()).unwrap_or_default()
    };
    let phases: &[MigrationPhase] = match expected {
        End::AtSource(_) => &[MigrationPhase::RolledBack, MigrationPhase::Refused],
        End::AtDestination | End::DiedAtDestination => &[MigrationPhase::Succeeded],
        End::Lost(_) => {
            let text = message("Succeeded");
            ensure!(
                !text.contains("runs on") && !text.contains("runs at"),
                "it is lost, and the status says {text}"
            );
            &[MigrationPhase::Lost, MigrationPhase::RolledBack, MigrationPhase::Refused]
        }
    };
    ensure!(now.phase.is_some_and(|phase| phases.contains(&phase)), "the phase is {:?}", now.phase);
    Ok(())
}

/// The AssignedVM of a VM that runs nowhere must not say that it runs.
async fn is_reported_lost(cluster: &Cluster) -> anyhow::Result<()> {
    let api: Api<AssignedVM> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let lost = |vm: Option<&AssignedVM>| {
        let state = vm.and_then(|vm| vm.status.as_ref()?.state);
        !matches!(state, Some(VmState::Running))
    };
    let waiting = kube::runtime::wait::await_condition(api.clone(), "counter", lost);
    if timeout(TIMEOUT, waiting).await.is_err() {
        bail!(
            "the AssignedVM says that it runs: {:#?}",
            api.get_opt("counter").await?.and_then(|vm| vm.status)
        );
    }
    Ok(())
}

/// Waits until everything is where it belongs.
///
/// # Errors
/// With everything that is not.
pub async fn is_clean(
    cluster: &Cluster,
    ends: Ends,
    home: &str,
    migration: &VMMigration,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    let mut polls = interval(Duration::from_millis(500));
    loop {
        polls.tick().await;
        let mut left = Vec::new();
        for node in [ends.source, ends.destination] {
            left.extend(leftovers_at(cluster, node, node == home, migration).await?);
        }
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{}", left.join("; "));
    }
}

/// What is at a node and must not be, or is missing.
async fn leftovers_at(
    cluster: &Cluster,
    node: &str,
    is_home: bool,
    migration: &VMMigration,
) -> anyhow::Result<Vec<String>> {
    let mut left = Vec::new();
    let mut expect = |what: &str, found: String, wanted: String| {
        if found != wanted {
            left.push(format!("{node}: {what}: {found}, expected {wanted}"));
        }
    };
    let number = |is: usize| if is_home { is } else { 0 }.to_string();

    // By the agent's answers.
    let described = cluster.describe(node).await?;
    let of_vm = described.devices.iter().filter(|d| d.holder == format!("VM {NAMESPACE}/counter")).count();
    let free = described.devices.iter().filter(|device| device.free).count();
    expect("devices of the VM", of_vm.to_string(), number(DEVICES));
    expect("free devices", free.to_string(), (DEVICES - if is_home { DEVICES } else { 0 }).to_string());
    expect("VMs that the agent knows", described.vms.len().to_string(), number(1));
    let held: Vec<&str> =
        described.vms.iter().map(|vm| vm.migration_id.as_str()).filter(|id| !id.is_empty()).collect();
    expect("migrations that hold a VM", held.join(" "), String::new());
    let journal = cluster.journal_state(node, migration).await?;
    let open = !journal.ended && journal.record() != JournalRecord::Unspecified;
    expect(
        "the journal",
        if open { journal.record().as_str_name() } else { "closed" }.to_owned(),
        "closed".to_owned(),
    );

    // By the node's kernel.
    let counted = count_leftovers(cluster, node).await?;
    let count = |what: &str| counted.get(what).copied().unwrap_or(0);
    expect("VMMs", count("vmms").to_string(), number(1));
    expect("cgroups of VMs without a process", count("empty-cgroups").to_string(), "0".to_owned());
    if !is_home {
        expect("cgroups of VMs", count("cgroups").to_string(), "0".to_owned());
    }
    expect("directories of VMs", count("directories").to_string(), number(1));
    expect("devices that are open in a VMM", count("open-in-vmm").to_string(), number(DEVICES));
    expect("devices that are open elsewhere", count("open-elsewhere").to_string(), "0".to_owned());
    Ok(left)
}

/// Counts what a node's /proc and /sys show.
async fn count_leftovers(cluster: &Cluster, node: &str) -> anyhow::Result<BTreeMap<String, usize>> {
    const COUNT: &str = r#"
        vmms=$(pidof slackwater-reference-vmm qemu-system-x86_64 | wc -w)
        cgroups=0; empty=0
        for group in /sys/fs/cgroup/slackwater/*/; do
            [ -d "$group" ] || continue
            cgroups=$((cgroups + 1))
            grep -q 'populated 1' "$group/cgroup.events" || empty=$((empty + 1))
        done
        vmm=0; elsewhere=0
        for process in /proc/[0-9]*; do
            opened=$(ls -l "$process/fd" 2>/dev/null | grep -c '/dev/vfio/devices/')
            [ "$opened" -gt 0 ] || continue
            case $(cat "$process/comm") in
                # The kernel keeps 15 characters of a program's name.
                slackwater-refe | qemu-system-*) vmm=$((vmm + opened)) ;;
                *) elsewhere=$((elsewhere + opened)) ;;
            esac
        done
        echo vmms $vmms; echo cgroups $cgroups; echo empty-cgroups $empty
        echo directories $(ls /run/slackwater/vms | wc -l)
        echo open-in-vmm $vmm; echo open-elsewhere $elsewhere
    "#;
    let text = cluster.lab.node(node)?.shell(COUNT).await?;
    let line = |line: &str| {
        let (what, count) = line.split_once(' ').with_context(|| format!("{line:?}"))?;
        Ok((what.to_owned(), count.trim().parse()?))
    };
    text.lines().map(line).collect()
}
