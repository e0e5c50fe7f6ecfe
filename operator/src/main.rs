//! The operator's command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use slackwater_api::parse_duration;
use slackwater_operator::leadership::Terms;
use slackwater_operator::plan::Checks;
use slackwater_operator::{Policy, crds};
use slackwater_proto::identity::Role;
use slackwater_proto::tls::Credentials;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Migrates VMs with their assigned devices from node to node.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the operator, for the cluster of KUBECONFIG or the one that it runs in.
    Run(Run),
    /// Write the CRDs as YAML.
    Crds {
        /// A folder for one file per CRD. Without it they go to the standard output.
        #[arg(long)]
        out: Option<PathBuf>,
    },
}

#[derive(Parser)]
struct Run {
    /// The operator's certificate (PEM), with the role `operator` in its URI SAN.
    #[arg(long, env = "SLACKWATER_TLS_CERT")]
    tls_cert: PathBuf,
    /// Its private key (PEM).
    #[arg(long, env = "SLACKWATER_TLS_KEY")]
    tls_key: PathBuf,
    /// The CA that issued the agents' certificates (PEM).
    #[arg(long, env = "SLACKWATER_TLS_CA")]
    tls_ca: PathBuf,
    /// The namespace of the Lease by which one of several operators leads. Without it, the namespace of the
    /// kubeconfig's context, or of the pod.
    #[arg(long, env = "SLACKWATER_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// The name of that Lease.
    #[arg(long, env = "SLACKWATER_LEASE_NAME", default_value = "slackwater-operator")]
    lease_name: String,
    /// How long other operators wait after the leader's last renewal, in whole seconds.
    #[arg(long, default_value = "15s", value_parser = parse_duration)]
    lease_duration: Duration,
    /// How long the leader goes on without a renewal. Shorter than the duration.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    lease_renew_deadline: Duration,
    /// The pause between two renewals, and between two looks of an operator that waits.
    #[arg(long, default_value = "2s", value_parser = parse_duration)]
    lease_retry: Duration,
    /// How long a source may be silent before the migration ends without it, where the target has given its
    /// reservation back.
    #[arg(long, default_value = "5m", value_parser = parse_duration)]
    source_patience: Duration,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Run(run) => run_operator(run).await,
        Command::Crds { out: Some(folder) } => {
            crds::write(&folder)?;
            Ok(())
        }
        Command::Crds { out: None } => {
            let files = crds::files()?;
            let yaml: Vec<String> = files.into_iter().map(|(_, yaml)| yaml).collect();
            print!("{}", yaml.join("---\n"));
            Ok(())
        }
    }
}

async fn run_operator(run: Run) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    let credentials = Credentials::read_for(&Role::Operator, &run.tls_cert, &run.tls_key, &run.tls_ca)?;
    let following = credentials.clone();
    tokio::spawn(async move { following.follow_files().await });
    let config = kube::Config::infer().await.context("there is no configuration of an API server")?;
    let terms = Terms {
        namespace: run.lease_namespace.unwrap_or_else(|| config.default_namespace.clone()),
        name: run.lease_name,
        duration: run.lease_duration,
        renew_deadline: run.lease_renew_deadline,
        retry: run.lease_retry,
    };
    terms.check()?;
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; migrations under way go on at the agents");
        stopping.cancel();
    });
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "the operator starts");
    let policy = Policy { checks: checks(), source_patience: run.source_patience };
    slackwater_operator::run(config, credentials, terms, policy, stop).await?;
    Ok(())
}

/// The planner's checks, all on.
#[cfg(not(feature = "faults"))]
fn checks() -> Checks {
    Checks::default()
}

/// The planner's checks, without those that a test has switched off.
#[cfg(feature = "faults")]
fn checks() -> Checks {
    let faults = std::env::var("SLACKWATER_FAULTS").unwrap_or_default();
    let device_model = !faults.split(',').any(|fault| fault.trim() == "ignore-device-model");
    if !device_model {
        tracing::warn!("SLACKWATER_FAULTS: devices of any model match");
    }
    Checks { device_model }
}
