//! Following one agent: connect, watch, and begin again when it breaks.

use std::convert::Infallible;
use std::time::Duration;

use futures::StreamExt;
use slackwater_proto::channel::{self, ConnectError, words};
use slackwater_proto::limits::node_client;
use slackwater_proto::node::WatchRequest;
use slackwater_proto::tonic::Status;
use slackwater_proto::tonic::transport::Channel;
use tokio::time::{sleep, timeout};

use super::Fleet;
use crate::backoff::Pauses;
use crate::inventory::{Link, NodeReport, ReportError};
use crate::reason::{AGENT_SILENT, AGENT_UNREACHABLE};

/// Between two connections.
const CONNECT_PAUSES: Pauses = Pauses::new(Duration::from_millis(250), Duration::from_secs(5));
/// At most this many reports are passed over for a newer one at a time.
const PASSED_OVER: usize = 64;

/// Why an agent cannot be followed any more. The message is for a person.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// There is a connection, and nothing comes.
    #[error("it is connected and has reported nothing within {} s", limit.as_secs_f64())]
    Silent {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The call failed.
    #[error("{}", words(.0))]
    Watch(#[from] Status),
    /// The report cannot be used.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The agent has ended the stream.
    #[error("the agent has closed the connection")]
    Closed,
}

/// Follows an agent for ever; the caller drops the future to end it.
pub(super) async fn follow(fleet: &Fleet, name: &str, address: &str) {
    let mut backoff = CONNECT_PAUSES.begin();
    loop {
        let mut answered = false;
        let channel = match channel::connect(&fleet.credentials, address, name).await {
            Ok(channel) => channel,
            Err(error) => {
                lost(fleet, name, address, &error.into(), None);
                sleep(backoff.next_pause()).await;
                continue;
            }
        };
        let Err(error) = watch(fleet, name, address, &channel, &mut answered).await;
        // An agent that does not report may still do what it is asked: give up, give back, or say what it has
        // journalled.
        let still_connected = matches!(error, WatchError::Silent { .. }).then_some(&channel);
        lost(fleet, name, address, &error, still_connected);
        if answered {
            backoff.reset();
        }
        sleep(backoff.next_pause()).await;
    }
}

fn lost(fleet: &Fleet, name: &str, address: &str, error: &WatchError, channel: Option<&Channel>) {
    let reason = match error {
        WatchError::Silent { .. } => AGENT_SILENT,
        WatchError::Connect(_) | WatchError::Watch(_) | WatchError::Report(_) | WatchError::Closed => {
            AGENT_UNREACHABLE
        }
    };
    let error = error.to_string();
    tracing::warn!(node = name, address, error, "an agent does not answer");
    fleet.index.lost(name, address, Link::Down { reason, error }, channel);
}

/// Ends only with an error.
async fn watch(
    fleet: &Fleet,
    name: &str,
    address: &str,
    channel: &Channel,
    answered: &mut bool,
) -> Result<Infallible, WatchError> {
    let limit = fleet.limits.first_report;
    let mut client = node_client(channel.clone());
    let first = async {
        let mut stream = client.watch(WatchRequest {}).await?.into_inner();
        Ok::<_, WatchError>((stream.message().await?.ok_or(WatchError::Closed)?, stream))
    };
    let (first, stream) = timeout(limit, first).await.map_err(|_| WatchError::Silent { limit })??;
    let mut ignored = Vec::new();
    let mut batches = stream.ready_chunks(PASSED_OVER);
    let mut newest = first;
    loop {
        let report = NodeReport::read(name, newest.node)?;
        if !*answered {
            tracing::info!(node = name, address, agent = report.agent_version, "an agent answers");
        }
        *answered = true;
        if report.ignored != ignored {
            report.ignored.iter().for_each(|ignored| tracing::warn!(node = name, "{ignored}"));
            ignored.clone_from(&report.ignored);
        }
        fleet.index.report(name, address, Some(channel), report, &fleet.epoch);
        sleep(fleet.limits.report_pause).await;
        newest = loop {
            let batch = batches.next().await.ok_or(WatchError::Closed)?;
            let newest = batch.into_iter().collect::<Result<Vec<_>, _>>()?.pop();
            // A batch is never empty.
            if let Some(newest) = newest {
                break newest;
            }
        };
    }
}
