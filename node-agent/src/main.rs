//! The node agent's program.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum, value_parser};
use slackwater_node_agent::host::identity::NoIdentity;
use slackwater_node_agent::host::twin_logs;
use slackwater_node_agent::host::twin_users::{DEFAULT_RANGE, TwinUsers, UserRange};
use slackwater_node_agent::host::vms::VmWatch;
use slackwater_node_agent::journal::{Journal, forget_epoch};
use slackwater_node_agent::process::exec::{TWIN_EXEC, TwinExec};
use slackwater_node_agent::process::sandbox::check::check;
use slackwater_node_agent::process::sandbox::{Sandbox, Shown};
use slackwater_node_agent::service::NodeConfig;
use slackwater_node_agent::service::attempts::{Attempts, NodeResources};
use slackwater_node_agent::service::inventory::Inventory;
use slackwater_node_agent::service::node::NodeService;
use slackwater_node_agent::service::registry::Registry;
use slackwater_node_agent::service::transfer::TransferService;
use slackwater_node_agent::transfer::channel::MAX_CHANNELS;
use slackwater_node_agent::vmm::budget::DEFAULT_BANDWIDTH;
use slackwater_node_agent::vmm::confinement::{Confinement, twin_path};
use slackwater_node_agent::vmm::contract::Deadlines;
use slackwater_node_agent::vmm::twin::LOG_FILE;
use slackwater_node_agent::vmm::twin::launcher;
use slackwater_proto::identity::Role;
use slackwater_proto::limits::{node_server, transfer_server};
use slackwater_proto::server;
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::service::Routes;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;
use tracing_subscriber::EnvFilter;

/// Moves VMs with their VFIO devices from this node to others, and receives them.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the node's gRPC services until SIGTERM.
    Serve(Serve),
    /// Forgets the highest operator epoch that this node's agent has seen, if that is wrong. The agent must be
    /// stopped, and no migration open here.
    ForgetEpoch {
        /// As given to `serve`.
        #[arg(long, default_value = "/var/lib/slackwater")]
        state_dir: PathBuf,
    },
    /// Becomes a VMM in a cgroup and a session of its own; the agent starts twins with it.
    #[command(hide = true, name = TWIN_EXEC)]
    TwinExec(TwinExec),
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// The node's name: the DNS name and the agent's name in its certificate.
    #[arg(long)]
    node_name: String,
    /// Address to listen on for the operator and for other agents.
    #[arg(long, default_value = "[::]:7443")]
    listen: String,
    /// VMs register in <RUN_DIR>/vms/<namespace>.<name>/vm.json.
    #[arg(long, default_value = "/run/slackwater")]
    run_dir: PathBuf,
    /// Directory of the journal of migrations, which must survive a reboot. One agent at a time.
    #[arg(long, default_value = "/var/lib/slackwater")]
    state_dir: PathBuf,
    /// The agent's certificate, PEM.
    #[arg(long)]
    tls_cert: PathBuf,
    /// Its key, PEM.
    #[arg(long)]
    tls_key: PathBuf,
    /// The CA that has issued the certificates of the operator and of all agents, PEM.
    #[arg(long)]
    tls_ca: PathBuf,
    /// A program that may be started as a twin. Can be repeated.
    #[arg(long = "twin-program", required = true)]
    twin_programs: Vec<PathBuf>,
    /// A folder or file that twins see, and may write to as far as their users may: disks, firmware. With
    /// `:ro` behind it, for reading only. What is mounted below it is not shown with it. Can be repeated.
    #[arg(long = "twin-path", value_name = "PATH[:ro]")]
    twin_paths: Vec<String>,
    /// The users that twins run as, one for each. Nothing else on the node may use them.
    #[arg(long, value_name = "FIRST-LAST", default_value = DEFAULT_RANGE)]
    twin_uid_range: UserRange,
    /// Which network twins have: one of their own, with nothing in it, or the node's.
    #[arg(long, value_enum, default_value_t = TwinNetwork::None)]
    twin_network: TwinNetwork,
    /// Bytes of memory that a twin may lock, for DMA, if its RAM is not known: that of a VMM that serves the
    /// contract. By default the node's RAM. A QEMU may lock the RAM of its arguments, and 1 GiB.
    #[arg(long, value_name = "BYTES")]
    twin_locked_memory: Option<u64>,
    /// Where cgroup v2 is mounted.
    #[arg(long, default_value = "/sys/fs/cgroup")]
    cgroup_root: PathBuf,
    /// Seconds that a twin may take to answer, at most 1800. The operator waits accordingly.
    #[arg(long, default_value_t = 30, value_parser = value_parser!(u64).range(1..=1800))]
    twin_start_seconds: u64,
    /// Bytes per second that the migration of a QEMU VM may use of the network, and that QEMU assumes for the
    /// blackout. At least 1000.
    #[arg(long, value_name = "BYTES_PER_SECOND", default_value_t = DEFAULT_BANDWIDTH)]
    #[arg(value_parser = value_parser!(u64).range(1000..))]
    migration_bandwidth: u64,
    /// Connections for the RAM of a QEMU VM besides the main one (QEMU: multifd). 0 to 16; with 0, all RAM
    /// uses the main one.
    #[arg(long, value_name = "CONNECTIONS", default_value_t = 0)]
    #[arg(value_parser = value_parser!(u8).range(0..=i64::from(MAX_CHANNELS)))]
    migration_channels: u8,
    /// Seconds that running calls may take after SIGTERM.
    #[arg(long, default_value_t = 20)]
    drain_seconds: u64,
}

/// The network of twins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TwinNetwork {
    /// One of its own for each, with nothing in it.
    None,
    /// The node's, with all its addresses and all abstract sockets.
    Host,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Serve(serve) => run(serve),
        Command::ForgetEpoch { state_dir } => forget(&state_dir),
        Command::TwinExec(twin) => twin.run().map_err(Into::into),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("slackwater-node-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A path without links, of a directory that is made if it does not exist: in a VM's folder no link is
/// followed, whether the administrator or a tenant has made it.
fn without_links(directory: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::canonicalize(directory))
        .with_context(|| format!("cannot make the directory {}", directory.display()))
}

/// What twins see besides their programs and folders: nothing of the agent's own.
fn twin_paths(serve: &Serve, run_dir: &Path) -> anyhow::Result<Vec<Shown>> {
    let state = without_links(&serve.state_dir)?;
    let key = std::fs::canonicalize(&serve.tls_key)?;
    let kept = [run_dir, &state, &key];
    Ok(serve.twin_paths.iter().map(|text| twin_path(text, &kept)).collect::<Result<_, _>>()?)
}

/// An agent that could start no twin in a sandbox says so before it serves.
async fn require_sandbox(run_dir: &Path, users: UserRange) -> anyhow::Result<()> {
    let directory = without_links(&run_dir.join("empty"))?;
    let sandbox = Sandbox {
        user: users.first(),
        directory,
        shown: Vec::new(),
        links: Vec::new(),
        devices: Vec::new(),
        host_network: false,
        locked_memory_bytes: u64::MAX,
    };
    let checked = check(&launcher(), &sandbox, &[]).await;
    checked.map(drop).context(
        "twins cannot be started in a sandbox: the agent must run as root, with all capabilities and without a \
         seccomp filter against mount(2), unshare(2) and mknod(2)",
    )
}

fn forget(state_dir: &Path) -> anyhow::Result<()> {
    match forget_epoch(state_dir)? {
        Some(epoch) => println!("the operator epoch {epoch} is forgotten; start the agent again"),
        None => println!("the operator epoch, which could not be read, is forgotten; start the agent again"),
    }
    Ok(())
}

#[tokio::main]
async fn run(serve: Serve) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let agent = Role::Agent { node: serve.node_name.clone() };
    let credentials = Credentials::read_for(&agent, &serve.tls_cert, &serve.tls_key, &serve.tls_ca)?;
    let credentials = Arc::new(credentials);
    let run_dir = without_links(&serve.run_dir)?;
    require_sandbox(&run_dir, serve.twin_uid_range).await?;
    let config = NodeConfig {
        node: serve.node_name.clone(),
        confinement: Confinement {
            shown: twin_paths(&serve, &run_dir)?,
            host_network: serve.twin_network == TwinNetwork::Host,
            locked_memory_bytes: serve.twin_locked_memory,
        },
        run_dir,
        cgroup_root: serve.cgroup_root.clone(),
        twin_programs: serve.twin_programs.clone(),
        twin_start_limit: Duration::from_secs(serve.twin_start_seconds),
        deadlines: Deadlines::default(),
        migration_bandwidth_bytes_per_second: serve.migration_bandwidth,
        migration_channels: serve.migration_channels,
    };
    let journal = Arc::new(Journal::open(&serve.state_dir)?);
    let registry = Arc::new(Registry::default());
    let vms = VmWatch::start(&config.run_dir)?;
    tokio::spawn(twin_logs::keep_short(config.run_dir.join("vms"), LOG_FILE));
    let following = Arc::clone(&credentials);
    tokio::spawn(async move { following.follow_files().await });
    let inventory = Inventory::new(config.clone(), Arc::clone(&registry), vms).showing(credentials.status());
    let inventory = Arc::new(inventory);
    let attempts = Attempts::new(NodeResources {
        config: config.clone(),
        credentials: Arc::clone(&credentials),
        inventory: Arc::clone(&inventory),
        registry: Arc::clone(&registry),
        journal,
        twin_users: TwinUsers::new(serve.twin_uid_range),
        vf_identity: Arc::new(NoIdentity),
    });
    attempts.take_up_all().await?;
    let node = NodeService::new(inventory, attempts);
    let routes = Routes::new(node_server(node)).add_service(transfer_server(TransferService::new(registry)));
    let listener = TcpListener::bind(&serve.listen)
        .await
        .with_context(|| format!("cannot listen on {}", serve.listen))?;
    info!(node = config.node, address = %listener.local_addr()?, "serving");
    let mut terminated = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let shutdown = async move {
        terminated.recv().await;
        info!("SIGTERM: draining");
    };
    server::serve(listener, &credentials, routes, shutdown, Duration::from_secs(serve.drain_seconds)).await;
    Ok(())
}
