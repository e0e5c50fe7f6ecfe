//! What the agent relies on at a real driver, besides the states: borrowing, the data stream, and refusals.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use rustix::io::{Errno, pread, pwrite};
use serde::Serialize;
use slackwater_handover::state::{Features, MigrationState};
use slackwater_node_agent::vfio::borrow::{BorrowError, VmmProcess};
use slackwater_node_agent::vfio::device::{DataRead, Device, MAX_READ_BYTES, PrecopyInfo};
use slackwater_node_agent::vfio::error::{DeviceError, Found, SetStateError};
use slackwater_node_agent::vfio::kernel::KernelDevice;
use slackwater_node_agent::vfio::os_error::OsError;
use slackwater_node_agent::vfio::probe::{self, ProbeError};
use slackwater_node_agent::vfio::worker::DeviceHandle;

use crate::node;
use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, Stop, StopCopy};

/// The devices to check with.
struct Devices<'a> {
    device: &'a str,
    like: &'a str,
    unlike: &'a str,
}

#[derive(Serialize)]
struct Line {
    check: &'static str,
    ok: bool,
    why: Option<String>,
}

/// Runs all checks, prints a line for each, and says whether all have passed.
pub(crate) async fn run(device: &str, like: &str, unlike: &str) -> Result<bool> {
    let devices = Devices { device, like, unlike };
    let d = &devices;
    let mut lines = vec![
        line("a free device shows its features and is left as it was", probing(d)),
        line("a device that is held is in use, and one that is not bound shows nothing", in_use(d)),
        line("PRE_COPY yields 24 bytes and drains, STOP_COPY the rest on the same descriptor", pre_copy(d)),
        line("a truncated load is refused at RESUMING -> STOP and only a reset leads out", truncated(d)),
        line("garbage is refused by write, and then the device is not asked to leave RESUMING", garbage(d)),
        line("a byte too many is refused by write", too_long(d)),
        line("the state of another type of device is refused by write", other_type(d)),
        line("a stream is closed with its session", stream_ends_with_session(d)),
    ];
    lines.push(line(
        "a register set on one device is read from the one that took over its state",
        moved(d).await,
    ));
    lines.push(line("a VMM's device is borrowed, driven and dropped without a change", borrowed(d)));
    lines.push(line(
        "a borrowed descriptor outlives its VMM and keeps the device bound until it is dropped",
        outlived(d).await,
    ));
    for line in &lines {
        println!("{}", serde_json::to_string(line)?);
    }
    Ok(lines.iter().all(|line| line.ok))
}

fn line(check: &'static str, result: Result<()>) -> Line {
    Line { check, ok: result.is_ok(), why: result.err().map(|error| format!("{error:#}")) }
}

/// `ensure!` for an error that matches a pattern.
macro_rules! ensure_err {
    ($result:expr, $($pattern:tt)+) => {{
        let result = $result;
        ensure!(matches!(&result, Err($($pattern)+)), "expected {}, found {result:?}", stringify!($($pattern)+));
    }};
}

fn probing(d: &Devices<'_>) -> Result<()> {
    let mut device = node::fresh(d.device)?;
    device.set_state(PreCopy)?;
    drop(device);
    ensure!(probe::features(&node::cdev(d.device)?)? == Features::ALL);
    let mut device = KernelDevice::new(d.device, node::open(d.device)?)?;
    ensure!(device.state()? == PreCopy, "it was left in PRE_COPY and is found in {}", device.state()?);
    Ok(())
}

fn in_use(d: &Devices<'_>) -> Result<()> {
    let cdev = node::cdev(d.device)?;
    let held = node::open(d.device)?;
    ensure_err!(probe::features(&cdev), ProbeError::InUse { .. });
    drop(held);
    probe::features(&cdev)?;
    let unbound = std::fs::OpenOptions::new().read(true).write(true).open(&cdev)?;
    ensure_err!(
        KernelDevice::new(d.device, unbound.into()),
        DeviceError::ReadFeatures { errno: OsError(Errno::INVAL), .. }
    );
    Ok(())
}

fn pre_copy(d: &Devices<'_>) -> Result<()> {
    let mut device = node::fresh(d.device)?;
    let estimate = device.estimate_bytes()?.context("mtty does not say how large its state is")?;
    device.set_state(PreCopy)?;
    ensure!(device.precopy_info()? == PrecopyInfo { initial_bytes: 24, dirty_bytes: 0 });
    // In two pieces, so that what is left can be seen to shrink.
    let DataRead::Data(first) = device.read_data(10)? else { anyhow::bail!("no data in PRE_COPY") };
    ensure!(device.precopy_info()?.initial_bytes == 14);
    let (second, end) = node::read_all(&mut device)?;
    ensure!((first.len(), second.len(), end) == (10, 14, DataRead::Drained));
    device.set_state(PreCopyP2p)?;
    ensure!(device.read_data(MAX_READ_BYTES)? == DataRead::Drained);
    ensure!(device.precopy_info()?.initial_bytes == 0);
    device.set_state(StopCopy)?;
    let (rest, end) = node::read_all(&mut device)?;
    ensure!((rest.len() as u64, end) == (estimate - 24, DataRead::End), "{} bytes of {estimate}", rest.len());
    ensure_err!(device.precopy_info(), DeviceError::PrecopyInfo { errno: OsError(Errno::INVAL), .. });
    let whole = [first.as_ref(), &second, &rest].concat();
    device.set_state(Running)?;
    ensure!(node::save(&mut device)? == whole, "a session with PRE_COPY yields other bytes than one without");
    Ok(())
}

fn truncated(d: &Devices<'_>) -> Result<()> {
    let mut device = node::fresh(d.device)?;
    let blob = node::save(&mut device)?;
    device.set_state(Resuming)?;
    let (_, part) = blob.split_last().context("an empty blob")?;
    device.write_data(part)?;
    let error = device.set_state(Stop).err().context("mtty has taken a truncated blob")?;
    let found = Found::State(Resuming);
    ensure!(
        matches!(&error, SetStateError::Refused { errno: OsError(Errno::INVAL), found: f, .. } if *f == found),
        "{error}"
    );
    ensure!(
        error.to_string()
            == format!(
                "{}: the driver refused RESUMING -> STOP: Invalid argument (EINVAL); the device is in RESUMING",
                d.device
            ),
        "{error}"
    );
    device.reset()?;
    Ok(())
}

fn garbage(d: &Devices<'_>) -> Result<()> {
    let mut device = node::fresh(d.device)?;
    let bytes = node::save(&mut device)?.len();
    device.set_state(Resuming)?;
    ensure_err!(
        device.write_data(&vec![0xa5; bytes]),
        DeviceError::WriteData { taken: 0, errno: OsError(Errno::FAULT), .. }
    );
    ensure_err!(device.set_state(Stop), SetStateError::LoadFailed { .. });
    ensure!(device.state()? == Resuming);
    // Why it is not asked: the driver says yes, and loads the garbage.
    ensure!(device.request(Stop) == Ok(()) && device.state()? == Stop, "this mtty has learnt to refuse");
    device.reset()?;
    Ok(())
}

fn too_long(d: &Devices<'_>) -> Result<()> {
    let mut device = node::fresh(d.device)?;
    let blob = node::save(&mut device)?;
    device.set_state(Resuming)?;
    device.write_data(&blob)?;
    ensure_err!(device.write_data(&[0]), DeviceError::WriteData { errno: OsError(Errno::NOMEM), .. });
    ensure_err!(device.set_state(Stop), SetStateError::LoadFailed { .. });
    device.reset()?;
    Ok(())
}

fn other_type(d: &Devices<'_>) -> Result<()> {
    let blob = node::save(&mut node::fresh(d.device)?)?;
    let mut unlike = node::fresh(d.unlike)?;
    unlike.set_state(Resuming)?;
    ensure_err!(unlike.write_data(&blob), DeviceError::WriteData { errno: OsError(Errno::FAULT), .. });
    unlike.reset()?;
    Ok(())
}

fn stream_ends_with_session(d: &Devices<'_>) -> Result<()> {
    let mut device = node::fresh(d.device)?;
    ensure_err!(device.read_data(1), DeviceError::NoDataStream { .. });
    for to in [Running, Stop] {
        device.set_state(StopCopy)?;
        ensure!(device.has_data_stream());
        device.set_state(to)?;
        ensure!(!device.has_data_stream(), "still open in {to}");
    }
    device.set_state(Resuming)?;
    ensure_err!(device.read_data(1), DeviceError::ReadData { errno: OsError(Errno::BADF), .. });
    device.reset()?;
    ensure_err!(device.write_data(&[0]), DeviceError::NoDataStream { .. });
    Ok(())
}

/// Where mtty has the scratch register of its first port: BAR 0 is at offset 0 of the descriptor.
const SCRATCH: u64 = 7;

async fn moved(d: &Devices<'_>) -> Result<()> {
    // The descriptors are duplicated only to get at the register.
    let (source_fd, target_fd) = (node::open(d.device)?, node::open(d.like)?);
    let source = KernelDevice::new(d.device, source_fd.try_clone()?)?;
    let target = KernelDevice::new(d.like, target_fd.try_clone()?)?;
    let (source, target) = (DeviceHandle::serve(Box::new(source))?, DeviceHandle::serve(Box::new(target))?);
    tokio::try_join!(source.reset(), target.reset())?;
    pwrite(&source_fd, &[0x5a], SCRATCH)?;
    pwrite(&target_fd, &[0], SCRATCH)?;
    let (stopped, resuming) = tokio::join!(source.set_state(StopCopy), target.set_state(Resuming));
    ensure!(stopped?.from == Running && resuming?.from == Running);
    let mut bytes = 0;
    while let DataRead::Data(data) = source.read_data(7).await? {
        bytes += data.len() as u64;
        target.write_data(data).await?;
    }
    ensure!(Some(bytes) == source.estimate_bytes().await?);
    target.set_state(Running).await?;
    let mut register = [0; 1];
    pread(&target_fd, &mut register, SCRATCH)?;
    ensure!(register == [0x5a], "{register:?}");
    // That nothing else made it so: an empty load does not pass.
    target.set_state(Resuming).await?;
    target.write_data(Bytes::new()).await?;
    ensure_err!(target.set_state(Running).await, SetStateError::Refused { .. });
    target.reset().await?;
    source.set_state(Running).await?;
    source.release().await;
    target.release().await;
    Ok(())
}

/// A VMM, as seen from outside, and the number of its descriptor.
fn vmm(device: &str) -> Result<(Child, i32)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["hold", device])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no standard output")?).read_line(&mut line)?;
    let descriptor = line.trim().parse().with_context(|| format!("it printed {line:?}"))?;
    Ok((child, descriptor))
}

fn end(mut vmm: Child) -> Result<()> {
    drop(vmm.stdin.take());
    ensure!(vmm.wait()?.success());
    Ok(())
}

fn borrowed(d: &Devices<'_>) -> Result<()> {
    node::fresh(d.device)?;
    let (vmm, descriptor) = vmm(d.device)?;
    let process = VmmProcess::open(vmm.id())?;
    ensure_err!(process.borrow(descriptor, d.like), BorrowError::OtherDevice { .. });
    ensure_err!(process.borrow(0, d.device), BorrowError::NotVfio { .. });
    let mut device = KernelDevice::new(d.device, process.borrow(descriptor, d.device)?)?;
    device.set_state(PreCopy)?;
    let (early, _) = node::read_all(&mut device)?;
    ensure!(early.len() == 24);
    drop(device);
    // Dropped with its session open: the device keeps its state, and the next borrower continues from there.
    let mut again = KernelDevice::new(d.device, process.borrow(descriptor, d.device)?)?;
    ensure!(again.state()? == PreCopy, "it was dropped in PRE_COPY and is found in {}", again.state()?);
    ensure_err!(again.read_data(1), DeviceError::NoDataStream { .. });
    again.set_state(Running)?;
    drop(again);
    end(vmm)
}

async fn outlived(d: &Devices<'_>) -> Result<()> {
    let cdev = node::cdev(d.device)?;
    let (vmm, descriptor) = vmm(d.device)?;
    let process = VmmProcess::open(vmm.id())?;
    let mut device = KernelDevice::new(d.device, process.borrow(descriptor, d.device)?)?;
    device.set_state(Stop)?;
    end(vmm)?;
    process.exited().await?;
    ensure_err!(process.borrow(descriptor, d.device), BorrowError::NoProcess { .. });
    ensure!(device.state()? == Stop);
    device.set_state(Running)?;
    ensure_err!(probe::open_bound(&cdev), ProbeError::InUse { .. });
    DeviceHandle::serve(Box::new(device))?.release().await;
    probe::open_bound(&cdev)?;
    Ok(())
}
