//! The process: from its arguments to a served socket, and its end.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use rustix::fs::Mode;
use slackwater_proto::limits::vmm_server;
use slackwater_proto::server::{ServeError, bind_unix, serve_unix};
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::vmm::Device;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::bus::{PortBus, Registers};
use super::devices::{Devices, DevicesError, VfioDevice};
use super::guest::{MAX_DEVICES, MIN_RAM_BYTES};
use super::kvm::{KvmMachine, SetUpError};
use super::lifecycle::State;
use super::ram::GuestRam;
use super::service::{ReferenceVmm, Vm};
use super::vcpu::{Vcpu, VcpuError};

/// How to run a VMM.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Unix socket at which the VMM contract is served.
    #[arg(long)]
    pub socket: PathBuf,
    /// VFIO character device, as /dev/vfio/devices/vfio0; repeated, or with commas, for several, in the VM's
    /// order.
    #[arg(long = "device", value_name = "CDEV", value_delimiter = ',', required = true)]
    pub devices: Vec<PathBuf>,
    /// Guest RAM in MiB.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub ram_mib: u32,
    /// Microseconds for which the guest idles after each count. 0: it counts as fast as it can.
    #[arg(long, default_value_t = 10_000)]
    pub pace_us: u64,
    /// Take over a VM: wait for StartLoad, and do not reset the devices. Without this, reset them and start a
    /// fresh guest.
    #[arg(long)]
    pub incoming: bool,
}

/// Why a VMM ended, or did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// More devices than the guest can have.
    #[error("{found} devices, expected at most {MAX_DEVICES}")]
    TooManyDevices {
        /// The number of devices.
        found: usize,
    },
    /// Guest RAM could not be allocated.
    #[error("cannot allocate {bytes} bytes of guest RAM")]
    AllocateRam {
        /// The requested size.
        bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The devices could not be opened.
    #[error("cannot open the VM's devices")]
    OpenDevices(#[source] DevicesError),
    /// KVM did not set up the machine.
    #[error("cannot set up the machine")]
    SetUpMachine(#[source] SetUpError),
    /// SIGTERM and SIGINT cannot be watched.
    #[error("cannot watch for signals")]
    WatchSignals(#[source] io::Error),
    /// The thread, or its signal handler, could not be set up.
    #[error("cannot start the vCPU's thread")]
    StartVcpu(#[source] io::Error),
    /// The socket could not be bound.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Serving failed.
    #[error("cannot serve the contract")]
    Serve(#[source] ServeError),
    /// The vCPU could not continue.
    #[error("the VM has crashed")]
    Crash(#[source] VcpuError),
}

/// How long open calls may take when the VMM ends.
const DRAIN: Duration = Duration::from_secs(2);

/// Runs a VMM until Quit, SIGTERM or SIGINT.
///
/// # Errors
/// If the VMM cannot be set up, or the VM crashes.
pub async fn run(options: Options) -> Result<(), RunError> {
    // Only the owner may use the socket, from its creation on and not only after a chmod.
    rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::WatchSignals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::WatchSignals)?;

    let found = options.devices.len();
    let devices = u16::try_from(found)
        .ok()
        .filter(|_| found <= MAX_DEVICES)
        .ok_or(RunError::TooManyDevices { found })?;
    let bytes = u64::from(options.ram_mib) << 20;
    const { assert!(MIN_RAM_BYTES <= 1 << 20, "1 MiB is the smallest size that can be requested") };
    let ram = Arc::new(GuestRam::new(bytes).map_err(|source| RunError::AllocateRam { bytes, source })?);
    let assigned = Devices::open(&options.devices, &ram, !options.incoming).map_err(RunError::OpenDevices)?;
    let bus = assigned.list().iter().map(|device| Arc::clone(device) as Arc<dyn Registers>).collect();
    let mut machine = KvmMachine::new(Arc::clone(&ram), PortBus::new(bus)).map_err(RunError::SetUpMachine)?;
    if !options.incoming {
        machine.set_up_guest(devices).map_err(RunError::SetUpMachine)?;
    }
    let vcpu = Vcpu::spawn(machine, Duration::from_micros(options.pace_us)).map_err(RunError::StartVcpu)?;

    let listener = listen(&options.socket)
        .map_err(|source| RunError::Listen { path: options.socket.clone(), source })?;
    let state = if options.incoming {
        State::Incoming
    } else {
        vcpu.resume().await.map_err(RunError::Crash)?;
        State::Running
    };
    let quit = CancellationToken::new();
    let service = ReferenceVmm::new(Vm { vcpu, ram, devices: describe(&assigned) }, state, quit.clone());
    info!(socket = %options.socket.display(), ?state, devices, "serving");

    let until = async {
        tokio::select! {
            () = quit.cancelled() => {}
            _ = terminate.recv() => info!("SIGTERM"),
            _ = interrupt.recv() => info!("SIGINT"),
            // Its result is read again below.
            _ = service.vcpu().ended() => {}
        }
        // This also ends the stream of a save.
        quit.cancel();
    };
    let served = serve_unix(listener, Routes::new(vmm_server(service.clone())), until, DRAIN).await;
    service.vcpu().stop().await;
    // It may have been removed already.
    std::fs::remove_file(&options.socket).unwrap_or_default();
    served.map_err(RunError::Serve)?;
    service.vcpu().ended().await.map_err(RunError::Crash)
}

fn describe(devices: &Devices) -> Vec<Device> {
    let device = |(index, device): (usize, &Arc<VfioDevice>)| Device {
        name: device.name().to_owned(),
        descriptor: device.descriptor(),
        guest_address: PortBus::guest_address(index),
    };
    devices.list().iter().enumerate().map(device).collect()
}

/// Listens on `path`, and replaces a stale socket that an earlier VMM left there.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
        // In use, or not there: bind reports that.
        Ok(_) | Err(_) => {}
    }
    bind_unix(path)
}
