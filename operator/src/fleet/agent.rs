//! Following one agent: connect, watch, and begin again when it breaks.

use std::convert::Infallible;
use std::time::Duration;

use slackwater_proto::channel::{self, ConnectError, words};
use slackwater_proto::node::WatchRequest;
use slackwater_proto::node::node_agent_client::NodeAgentClient;
use slackwater_proto::tonic::Status;

use super::Fleet;
use crate::backoff::Pauses;
use crate::inventory::{NodeReport, ReportError};

/// Between two connections.
const CONNECT_PAUSES: Pauses = Pauses::new(Duration::from_millis(250), Duration::from_secs(5));

/// Why an agent cannot be followed any more. The message is for a person.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
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
        let Err(error) = watch(fleet, name, address, &mut answered).await;
        let error = error.to_string();
        tracing::warn!(node = name, address, error, "an agent does not answer");
        fleet.index.lost(name, address, error);
        if answered {
            backoff.reset();
        }
        tokio::time::sleep(backoff.next_pause()).await;
    }
}

/// Ends only with an error.
async fn watch(
    fleet: &Fleet,
    name: &str,
    address: &str,
    answered: &mut bool,
) -> Result<Infallible, WatchError> {
    let channel = channel::connect(&fleet.credentials, address, name).await?;
    let mut client = NodeAgentClient::new(channel.clone());
    let mut stream = client.watch(WatchRequest {}).await?.into_inner();
    while let Some(message) = stream.message().await? {
        let report = NodeReport::read(name, message.node)?;
        if !*answered {
            tracing::info!(node = name, address, agent = report.agent_version, "an agent answers");
        }
        *answered = true;
        for ignored in &report.ignored {
            tracing::warn!(node = name, "{ignored}");
        }
        fleet.index.report(name, address, Some(&channel), report);
    }
    Err(WatchError::Closed)
}
