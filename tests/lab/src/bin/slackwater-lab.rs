//! A lab from the command line: boots nodes, runs commands in them, and ends, or stays until it is
//! interrupted.
//!
//! ```text
//! slackwater-lab --node node-a=mtty-1,mtty-1 --run node-a='ls /dev/vfio/devices'
//! slackwater-lab --node node-a=mtty-1 --node node-b=mtty-1 --program target/debug/mine --stay
//! slackwater-lab in PORT sh -c 'dmesg | tail'        # PORT as --stay printed it
//! ```

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Parser;
use slackwater_lab::{
    Image, Lab, LabConfig, NodeConfig,
    node::protocol::{self, Ending, Request, Response},
};

#[derive(Parser)]
#[command(about = "Boots nodes with VFIO devices and runs commands in them")]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    /// A node: its name and the types of its devices (NAME=mtty-1,mtty-2). Repeatable.
    #[arg(long = "node")]
    nodes: Vec<String>,
    /// A program to put into the nodes' /bin, with the libraries it needs. Repeatable.
    #[arg(long = "program")]
    programs: Vec<PathBuf>,
    /// A shell command to run in a node (NODE=COMMAND), in order. The first that fails ends it. Repeatable.
    #[arg(long = "run")]
    commands: Vec<String>,
    /// How long each command may take, in seconds.
    #[arg(long, default_value_t = 120)]
    limit_seconds: u64,
    /// Stay until interrupted.
    #[arg(long)]
    stay: bool,
    #[command(subcommand)]
    inside: Option<Inside>,
}

#[derive(clap::Subcommand)]
enum Inside {
    /// Runs a program in a node of a lab that stays.
    In {
        /// The node's control port.
        port: u16,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let limit = Duration::from_secs(arguments.limit_seconds);
    if let Some(Inside::In { port, argv }) = arguments.inside {
        return run_inside(port, argv, limit);
    }
    let begin = Instant::now();
    let nodes = arguments.nodes.iter().map(|text| node_from(text)).collect::<anyhow::Result<Vec<_>>>()?;
    if nodes.is_empty() {
        bail!("name a node: --node node-a=mtty-1,mtty-1");
    }
    let image = Image { programs: arguments.programs, ..Image::default() };
    let lab = Lab::start(LabConfig { image, ..LabConfig::nodes(nodes) }).await?;
    eprintln!("up after {:.1} s, files in {}", begin.elapsed().as_secs_f64(), lab.folder().display());
    for node in lab.nodes() {
        eprintln!(
            "{}: control port {}, agent {} (on the link {}), console {}",
            node.name(),
            node.control_address().port(),
            node.agent_address()?,
            node.link_address(),
            node.console().display(),
        );
        for device in node.devices() {
            eprintln!("  device {device}");
        }
    }
    for command in &arguments.commands {
        let (name, command) = command.split_once('=').context("--run takes NODE=COMMAND")?;
        let executed = lab.node(name)?.exec_for(&["sh", "-c", command], b"", limit).await?;
        let ending = show(&executed.stdout, &executed.stderr, executed.ending)?;
        if ending != ExitCode::SUCCESS {
            return Ok(ending);
        }
    }
    if arguments.stay {
        tokio::signal::ctrl_c().await?;
    }
    Ok(ExitCode::SUCCESS)
}

fn node_from(text: &str) -> anyhow::Result<NodeConfig> {
    let (name, devices) = text.split_once('=').unwrap_or((text, ""));
    Ok(NodeConfig::new(name, devices.split(',').filter(|device| !device.is_empty())))
}

fn run_inside(port: u16, argv: Vec<String>, limit: Duration) -> anyhow::Result<ExitCode> {
    let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    let timeout_ms = u64::try_from(limit.as_millis())?;
    protocol::write(&mut stream, &Request::Exec { argv, timeout_ms }, b"")?;
    let answer = protocol::read::<Response>(&mut std::io::BufReader::new(stream))?;
    match answer.context("the node closed the connection")? {
        (Response::Exec { ending, stdout_bytes }, payload) => {
            let at = usize::try_from(stdout_bytes)?.min(payload.len());
            let (stdout, stderr) = payload.split_at(at);
            show(stdout, stderr, ending)
        }
        (Response::Failed { message }, _) => bail!("{message}"),
        (other, _) => bail!("unexpected answer: {other:?}"),
    }
}

fn show(stdout: &[u8], stderr: &[u8], ending: Option<Ending>) -> anyhow::Result<ExitCode> {
    std::io::stdout().write_all(stdout)?;
    std::io::stderr().write_all(stderr)?;
    Ok(match ending {
        Some(Ending::Status(status)) => ExitCode::from(u8::try_from(status)?),
        Some(other) => {
            eprintln!("ended: {other:?}");
            ExitCode::FAILURE
        }
        None => {
            eprintln!("it took too long and was killed");
            ExitCode::from(124)
        }
    })
}
