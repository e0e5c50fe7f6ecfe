//! Following one agent: connect, watch, and begin again when it breaks.

use std::time::Duration;

use slackwater_proto::channel::{self, words};
use slackwater_proto::node::WatchRequest;
use slackwater_proto::node::node_agent_client::NodeAgentClient;

use super::Fleet;
use crate::inventory::NodeReport;

/// The first and the longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Follows an agent for ever; the caller drops the future to end it.
pub(super) async fn follow(fleet: &Fleet, name: &str, address: &str) {
    let mut pause = PAUSES.0;
    loop {
        let mut answered = false;
        let error = match watch(fleet, name, address, &mut answered).await {
            Ok(()) => "the agent has closed the connection".to_owned(),
            Err(error) => error,
        };
        tracing::warn!(node = name, address, error, "an agent does not answer");
        fleet.index.lost(name, address, error);
        if answered {
            pause = PAUSES.0;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn watch(fleet: &Fleet, name: &str, address: &str, answered: &mut bool) -> Result<(), String> {
    let channel =
        channel::connect(&fleet.credentials, address, name).await.map_err(|error| error.to_string())?;
    let mut client = NodeAgentClient::new(channel.clone());
    let mut stream = client.watch(WatchRequest {}).await.map_err(|status| words(&status))?.into_inner();
    while let Some(message) = stream.message().await.map_err(|status| words(&status))? {
        let report = NodeReport::read(name, message.node).map_err(|error| error.to_string())?;
        if !*answered {
            tracing::info!(node = name, address, agent = report.agent_version, "an agent answers");
        }
        *answered = true;
        for ignored in &report.ignored {
            tracing::warn!(node = name, "{ignored}");
        }
        fleet.index.report(name, address, Some(&channel), report);
    }
    Ok(())
}
