//! The checks: each a promise of the contract, or of the guest.

use anyhow::{Context, Result, ensure};
use futures::stream;
use serde::Serialize;
use slackwater_handover::state::MigrationState::{self, Resuming, Running, RunningP2p, Stop, StopCopy};
use slackwater_node_agent::vfio::device::{DataRead, Device, MAX_READ_BYTES};
use slackwater_node_agent::vfio::kernel::KernelDevice;
use slackwater_node_agent::vfio::probe;
use slackwater_proto::tonic::{Code, Status};
use slackwater_proto::vmm::{
    AbortSaveRequest, DescribeRequest, DirtyTracking, FinishLoadRequest, FinishSaveRequest, PauseRequest,
    RamRange, ResumeRequest, RunState, SaveProgressRequest, StartLoadRequest, StartSaveRequest,
};

use crate::process::{Vmm, cdev};

const SOCKET: &str = "/run/vmm-walk.sock";
const TWIN_SOCKET: &str = "/run/vmm-walk-twin.sock";

/// The devices of a VM and of its twin.
struct Devices<'a> {
    own: &'a [String],
    twins: &'a [String],
}

#[derive(Serialize)]
struct Line {
    check: &'static str,
    ok: bool,
    why: Option<String>,
}

/// Runs all checks, prints a line for each, and says whether all have passed.
pub(crate) async fn run(devices: &[String]) -> Result<bool> {
    let (own, twins) = devices.split_at_checked(2).context("two devices for the VM, two for its twin")?;
    let d = &Devices { own, twins };
    let lines = [
        line("a VM counts, and Describe names devices that can be borrowed", counts(d).await),
        line("Pause stops the count, and Resume continues it", pauses(d).await),
        line("calls out of order are refused with a reason", out_of_order(d).await),
        line("an invalid state is refused, and the twin can still be loaded", garbage(d).await),
        line("a VM that moves with its devices' state continues to count without an error", moves(d).await),
        line("a VM that moves without its devices' state notices it", moves_without_devices(d).await),
        line("a save that is aborted at slack water leaves a VM that can continue", rolls_back(d).await),
        line("Quit and SIGTERM end a VMM and free its devices", ends(d).await),
        line("a VMM whose device is in use reports it", in_use(d).await),
    ];
    for line in &lines {
        println!("{}", serde_json::to_string(line)?);
    }
    Ok(lines.iter().all(|line| line.ok))
}

fn line(check: &'static str, result: Result<()>) -> Line {
    Line { check, ok: result.is_ok(), why: result.err().map(|error| format!("{error:#}")) }
}

async fn counts(d: &Devices<'_>) -> Result<()> {
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    let report = vmm.counts(300).await?;
    ensure!(report.errors == 0 && report.devices.len() == 2, "{report:?}");

    let found = vmm.client.describe(DescribeRequest {}).await?.into_inner();
    ensure!(found.devices.iter().map(|device| &device.name).eq(d.own), "{:?}", found.devices);
    ensure!(found.ram == [RamRange { gpa: 0, iova: 0, bytes: 32 << 20 }], "{:?}", found.ram);
    ensure!(found.dirty_tracking() == DirtyTracking::None && found.run_state() == RunState::Running);
    for mut device in vmm.devices().await? {
        ensure!(device.state()? == Running);
    }
    vmm.quit().await
}

async fn pauses(d: &Devices<'_>) -> Result<()> {
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    // Often, so that the vCPU is paused at many places of its round.
    for _ in 0..20 {
        vmm.counts(3).await?;
        vmm.client.pause(PauseRequest {}).await?;
        let paused = vmm.guest()?;
        ensure!(vmm.run_state().await? == RunState::Paused);
        ensure!(vmm.guest()? == paused, "it continues to count: {paused:?}, {:?}", vmm.guest()?);
        vmm.client.resume(ResumeRequest {}).await?;
    }
    let report = vmm.counts(10).await?;
    ensure!(report.errors == 0, "{report:?}");
    vmm.quit().await
}

fn assert_refused<T>(result: Result<T, Status>, code: Code, words: &str) -> Result<()> {
    let status = result.err().with_context(|| format!("accepted, expected {words:?}"))?;
    ensure!(
        status.code() == code && status.message().contains(words),
        "{status}, expected {code:?} {words:?}"
    );
    Ok(())
}

async fn out_of_order(d: &Devices<'_>) -> Result<()> {
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    let running = "the VM is running and no save has begun; expected";
    let client = &mut vmm.client;
    let early = Code::FailedPrecondition;
    assert_refused(client.finish_save(FinishSaveRequest {}).await, early, running)?;
    assert_refused(client.save_progress(SaveProgressRequest {}).await, early, running)?;
    assert_refused(client.start_load(stream::empty()).await, early, running)?;
    assert_refused(client.finish_load(FinishLoadRequest {}).await, early, running)?;
    assert_refused(
        client.start_save(StartSaveRequest { live: true }).await,
        early,
        "live is true, expected false",
    )?;
    let save = client.start_save(StartSaveRequest { live: false }).await?;
    let saving = "a save has begun and the VM is running; expected";
    assert_refused(client.finish_save(FinishSaveRequest {}).await, early, saving)?;
    assert_refused(client.start_save(StartSaveRequest { live: false }).await, early, saving)?;
    assert_refused(client.resume(ResumeRequest {}).await, early, saving)?;
    drop(save);
    client.abort_save(AbortSaveRequest {}).await?;

    let mut twin = Vmm::start(TWIN_SOCKET, d.twins, true).await?;
    let empty = "the VMM was started to take over a VM, of which nothing has been received; expected";
    assert_refused(twin.client.pause(PauseRequest {}).await, early, empty)?;
    assert_refused(twin.client.resume(ResumeRequest {}).await, early, empty)?;
    assert_refused(twin.client.start_save(StartSaveRequest { live: false }).await, early, empty)?;
    ensure!(twin.run_state().await? == RunState::Incoming);
    let report = vmm.counts(10).await?;
    ensure!(report.errors == 0, "{report:?}");
    vmm.quit().await?;
    twin.quit().await
}

/// Pauses the VM, takes its devices to STOP_COPY, and saves it.
async fn save(vmm: &mut Vmm, devices: &mut [KernelDevice]) -> Result<Vec<u8>> {
    let mut pieces = vmm.client.start_save(StartSaveRequest { live: false }).await?.into_inner();
    vmm.client.pause(PauseRequest {}).await?;
    set_all(devices, &[RunningP2p, StopCopy])?;
    let mut client = vmm.client.clone();
    let finish = tokio::spawn(async move { client.finish_save(FinishSaveRequest {}).await });
    let mut bytes = vec![];
    while let Some(piece) = pieces.message().await? {
        bytes.extend_from_slice(&piece.data);
    }
    finish.await??;
    Ok(bytes)
}

async fn load(twin: &mut Vmm, bytes: &[u8]) -> Result<(), Status> {
    let pieces: Vec<_> =
        bytes.chunks(100_000).map(|piece| StartLoadRequest { data: piece.to_vec().into() }).collect();
    twin.client.start_load(stream::iter(pieces)).await.map(drop)
}

/// Takes all devices to each state in turn.
fn set_all(devices: &mut [KernelDevice], states: &[MigrationState]) -> Result<()> {
    for state in states {
        for device in &mut *devices {
            device.set_state(*state)?;
        }
    }
    Ok(())
}

fn copy_state(from: &mut KernelDevice, to: &mut KernelDevice) -> Result<()> {
    while let DataRead::Data(data) = from.read_data(MAX_READ_BYTES)? {
        to.write_data(&data)?;
    }
    Ok(())
}

async fn garbage(d: &Devices<'_>) -> Result<()> {
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    let mut twin = Vmm::start(TWIN_SOCKET, d.twins, true).await?;
    let mut devices = vmm.devices().await?;
    vmm.counts(10).await?;
    let bytes = save(&mut vmm, &mut devices).await?;
    let (_, truncated) = bytes.split_last().context("an empty VM")?;
    let wrong = Code::InvalidArgument;
    assert_refused(load(&mut twin, b"Not a VM.").await, wrong, r#"the magic is "Not a VM", expected"#)?;
    assert_refused(load(&mut twin, truncated).await, wrong, "the state ends after")?;
    assert_refused(load(&mut twin, &[&bytes, &b"!"[..]].concat()).await, wrong, "more data follows")?;
    assert_refused(
        twin.client.finish_load(FinishLoadRequest {}).await,
        Code::FailedPrecondition,
        "nothing has been received",
    )?;
    load(&mut twin, &bytes).await?;
    twin.client.finish_load(FinishLoadRequest {}).await?;
    ensure!(twin.guest()? == vmm.guest()?);
    drop(devices);
    vmm.quit().await?;
    twin.quit().await
}

async fn moves(d: &Devices<'_>) -> Result<()> {
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    let mut from = vmm.devices().await?;
    vmm.counts(50).await?;
    let mut counted = 0;
    // There and back again, and again.
    let back_and_forth = [(TWIN_SOCKET, d.twins), (SOCKET, d.own)];
    for (socket, devices) in back_and_forth.into_iter().cycle().take(4) {
        let mut twin = Vmm::start(socket, devices, true).await?;
        let mut to = twin.devices().await?;
        set_all(&mut to, &[Resuming])?;
        let bytes = save(&mut vmm, &mut from).await?;
        let left = vmm.guest()?;
        for (from, to) in from.iter_mut().zip(&mut to) {
            copy_state(from, to)?;
        }
        load(&mut twin, &bytes).await?;
        twin.client.finish_load(FinishLoadRequest {}).await?;
        ensure!(twin.run_state().await? == RunState::Paused);
        ensure!(twin.guest()? == left, "{:?}, expected {left:?}", twin.guest()?);
        set_all(&mut to, &[Stop, RunningP2p, Running])?;
        twin.client.resume(ResumeRequest {}).await?;
        drop(from);
        vmm.quit().await?;

        let report = twin.counts(300).await?;
        ensure!(report.errors == 0, "{report:?}");
        ensure!(left.count > counted && report.count >= left.count + 300);
        counted = left.count;
        (vmm, from) = (twin, to);
    }
    drop(from);
    vmm.quit().await
}

async fn moves_without_devices(d: &Devices<'_>) -> Result<()> {
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    let mut twin = Vmm::start(TWIN_SOCKET, d.twins, true).await?;
    let mut devices = vmm.devices().await?;
    vmm.counts(10).await?;
    let bytes = save(&mut vmm, &mut devices).await?;
    load(&mut twin, &bytes).await?;
    twin.client.finish_load(FinishLoadRequest {}).await?;
    twin.client.resume(ResumeRequest {}).await?;
    let report = twin.counts(10).await?;
    ensure!(report.errors >= 1 && report.ram_errors == 0, "it does not notice: {report:?}");
    drop(devices);
    vmm.quit().await?;
    twin.quit().await
}

async fn rolls_back(d: &Devices<'_>) -> Result<()> {
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    let mut devices = vmm.devices().await?;
    vmm.counts(10).await?;
    let mut pieces = vmm.client.start_save(StartSaveRequest { live: false }).await?.into_inner();
    vmm.client.pause(PauseRequest {}).await?;
    set_all(&mut devices, &[RunningP2p, StopCopy])?;
    vmm.client.abort_save(AbortSaveRequest {}).await?;
    assert_refused(pieces.message().await, Code::Aborted, "the save was aborted")?;
    ensure!(vmm.run_state().await? == RunState::Paused);
    set_all(&mut devices, &[Stop, RunningP2p, Running])?;
    vmm.client.resume(ResumeRequest {}).await?;
    let report = vmm.counts(50).await?;
    ensure!(report.errors == 0, "{report:?}");

    // And after a whole save, too.
    save(&mut vmm, &mut devices).await?;
    set_all(&mut devices, &[Stop, RunningP2p, Running])?;
    vmm.client.resume(ResumeRequest {}).await?;
    let report = vmm.counts(50).await?;
    ensure!(report.errors == 0, "{report:?}");
    drop(devices);
    vmm.quit().await
}

async fn ends(d: &Devices<'_>) -> Result<()> {
    let free =
        || d.own.iter().try_for_each(|device| probe::features(&cdev(device)?).map(drop).map_err(Into::into));
    let mut vmm = Vmm::start(SOCKET, d.own, false).await?;
    // An open save does not keep it.
    let save = vmm.client.start_save(StartSaveRequest { live: false }).await?;
    vmm.quit().await?;
    free()?;
    drop(save);
    let vmm = Vmm::start(SOCKET, d.own, false).await?;
    vmm.terminate().await?;
    free()
}

async fn in_use(d: &Devices<'_>) -> Result<()> {
    let vmm = Vmm::start(SOCKET, d.own, false).await?;
    let (device, _) = d.own.split_first().context("no device")?;
    let error = Vmm::start(TWIN_SOCKET, d.own, true).await.err().context("it has opened a device in use")?;
    let words = format!("cannot bind device {device} to the iommufd; is it in use?");
    ensure!(error.to_string().contains(&words), "{error:#}, expected {words:?}");
    vmm.quit().await
}
