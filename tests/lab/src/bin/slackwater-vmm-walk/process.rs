//! A VMM of the lab as a process: started, talked to, looked at from outside, and ended.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use slackwater_node_agent::vfio::borrow::VmmProcess;
use slackwater_node_agent::vfio::kernel::KernelDevice;
use slackwater_proto::channel::connect_unix;
use slackwater_proto::limits::vmm_client;
use slackwater_proto::tonic::transport::Channel;
use slackwater_proto::vmm::vmm_client::VmmClient;
use slackwater_proto::vmm::{DescribeRequest, QuitRequest, RunState};
use slackwater_reference_vmm::guest::Report;
use slackwater_reference_vmm::outside;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::{interval, timeout};

/// The limit for an action that is slow on an emulated CPU.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A VMM that serves. It is killed when dropped.
pub(crate) struct Vmm {
    pub(crate) client: VmmClient<Channel>,
    pub(crate) pid: u32,
    process: Child,
    log: Lines<BufReader<ChildStderr>>,
    socket: PathBuf,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // A check that failed leaves it running. Its devices must be free for the next check: wait for its
        // end. What there is to say about it has been said.
        if self.process.id().is_some() {
            self.process.start_kill().unwrap_or_default();
            let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                let exited = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
                waitid(WaitId::Pid(pid), exited).unwrap_or_default();
            }
        }
    }
}

/// The character device of a mediated device.
pub(crate) fn cdev(device: &str) -> Result<PathBuf> {
    let folder = format!("/sys/bus/mdev/devices/{device}/vfio-dev");
    let entry = std::fs::read_dir(&folder)?.next().with_context(|| format!("{folder} is empty"))??;
    Ok(Path::new("/dev/vfio/devices").join(entry.file_name()))
}

impl Vmm {
    /// Starts a VMM with these devices, and returns when it serves: with a VM that counts, or as a twin that
    /// waits for one.
    pub(crate) async fn start(socket: &str, devices: &[String], incoming: bool) -> Result<Self> {
        let mut command = Command::new("slackwater-reference-vmm");
        command.args(["run", "--socket", socket, "--pace-us", "1000"]);
        for device in devices {
            command.arg("--device").arg(cdev(device)?);
        }
        if incoming {
            command.arg("--incoming");
        }
        let mut process = command.stderr(Stdio::piped()).kill_on_drop(true).spawn()?;
        let pid = process.id().context("it has ended")?;
        let mut log = BufReader::new(process.stderr.take().context("no standard error")?).lines();
        let mut said = vec![];
        let serving = async {
            while let Some(line) = log.next_line().await? {
                if line.contains("serving") {
                    return Ok(());
                }
                said.push(line);
            }
            bail!("the VMM has ended: {}", said.join(" "))
        };
        timeout(TIMEOUT, serving).await.context("the VMM does not serve")??;
        let socket = PathBuf::from(socket);
        let mode = std::fs::metadata(&socket)?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "the socket has mode {mode:o}");
        let client = vmm_client(connect_unix(&socket).await?);
        Ok(Self { client, pid, process, log, socket })
    }

    /// What the guest has written down, read from outside.
    pub(crate) fn guest(&self) -> Result<Report> {
        Ok(outside::report(self.pid)?)
    }

    /// Waits until the guest has counted `rounds` further. There is no event for what a guest writes into its
    /// memory.
    pub(crate) async fn counts(&self, rounds: u64) -> Result<Report> {
        let goal = self.guest()?.count + rounds;
        let mut ticks = interval(Duration::from_millis(10));
        let counted = async {
            loop {
                ticks.tick().await;
                let report = self.guest()?;
                if report.count >= goal {
                    return anyhow::Ok(report);
                }
            }
        };
        match timeout(TIMEOUT, counted).await {
            Ok(report) => report,
            Err(_) => bail!("it does not count up to {goal}: {:?}", self.guest()?),
        }
    }

    pub(crate) async fn run_state(&mut self) -> Result<RunState> {
        Ok(self.client.describe(DescribeRequest {}).await?.into_inner().run_state())
    }

    /// All devices, borrowed by the descriptors from Describe.
    pub(crate) async fn devices(&mut self) -> Result<Vec<KernelDevice>> {
        let process = VmmProcess::open(self.pid)?;
        let described = self.client.describe(DescribeRequest {}).await?.into_inner().devices;
        let borrow = |device: slackwater_proto::vmm::Device| {
            let descriptor = process.borrow(device.descriptor, &device.name)?;
            Ok(KernelDevice::new(device.name, descriptor)?)
        };
        described.into_iter().map(borrow).collect()
    }

    /// Asks it to quit, and returns when the process has ended well.
    pub(crate) async fn quit(mut self) -> Result<()> {
        self.client.quit(QuitRequest {}).await?;
        self.ended().await
    }

    /// Sends SIGTERM, and returns when the process has ended well.
    pub(crate) async fn terminate(mut self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid)?).context("pid 0")?;
        kill_process(pid, Signal::TERM)?;
        self.ended().await
    }

    async fn ended(&mut self) -> Result<()> {
        let ending = timeout(TIMEOUT, self.process.wait()).await.context("it does not end")??;
        let mut log = vec![];
        while let Some(line) = self.log.next_line().await? {
            eprintln!("{line}");
            log.push(line);
        }
        ensure!(ending.success(), "{ending}: {}", log.join(" "));
        ensure!(!self.socket.exists(), "its socket is still there");
        Ok(())
    }
}
