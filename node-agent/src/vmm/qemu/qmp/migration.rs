//! Waiting for a migration to reach a point.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::timeout;

use super::commands::{MigrationInfo, QueryMigrate};
use super::events::{EventKind, Events, Notice};
use super::{QmpClient, QmpError};

/// The pause between two queries doubles from the shortest to the longest while there is no event.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

impl QmpClient {
    /// Returns the first state of the migration that `want` accepts. It uses events and, as they may be
    /// missing, queries every 20 to 200 ms. It has no deadline, also not for its queries: QEMU's main loop is
    /// blocked while devices are saved. A state that lasts for less than a query may be missed: want
    /// `Completed` as well as what comes before it.
    ///
    /// # Errors
    /// When the connection breaks and cannot be made again, or breaks again at once; [`QmpError::Answer`] and
    /// [`QmpError::Refused`] as they come.
    pub async fn migration_status_until(
        &self,
        mut want: impl FnMut(&MigrationInfo) -> bool,
    ) -> Result<MigrationInfo, QmpError> {
        let mut events = self.events();
        let pauses = ExponentialBuilder::new()
            .with_min_delay(SHORTEST_PAUSE)
            .with_max_delay(LONGEST_PAUSE)
            .without_max_times();
        let mut pause = pauses.build();
        let mut lost = false;
        loop {
            // The events so far are older than the answer to this query.
            events.skip();
            match self.execute_within(QueryMigrate, Duration::MAX).await {
                Ok(info) if want(&info) => return Ok(info),
                Ok(_) => lost = false,
                Err(QmpError::Lost { .. }) if !lost => {
                    // A query may be repeated.
                    lost = true;
                    continue;
                }
                Err(error) => return Err(error),
            }
            let within = pause.next().unwrap_or(LONGEST_PAUSE);
            if timeout(within, migration_event(&mut events)).await.is_ok() {
                pause = pauses.build();
            }
        }
    }
}

/// Returns after an event that may be about a migration.
async fn migration_event(events: &mut Events) {
    while let Some(Notice::Event(event)) = events.next().await {
        match event.kind {
            EventKind::Migration { .. }
            | EventKind::MigrationPass { .. }
            | EventKind::Stop
            | EventKind::Resume
            | EventKind::Shutdown { .. }
            | EventKind::VfioMigration { .. } => return,
            EventKind::Other { .. } => {}
        }
    }
}
