//! Waiting for a migration to reach a point.

use std::time::Duration;

use tokio::time::timeout;

use super::commands::{MigrationInfo, QueryMigrate};
use super::events::{EventKind, Events, Notice};
use super::{QmpClient, QmpError};

/// Pauses between two queries: they double from the one to the other while nothing is told.
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(200);

impl QmpClient {
    /// Returns the first state of the migration that is wanted. It goes by events and, as they may be missing, by queries every
    /// 20 to 200 ms. It has no deadline, also not for its queries: QEMU's main loop stands still for as long as devices are saved.
    /// A state that lasts for less than a query may be missed: want `Completed` as well as what comes before it.
    ///
    /// # Errors
    /// When the connection breaks and cannot be made again, or breaks again at once; [`QmpError::Answer`] and
    /// [`QmpError::Refused`] as they come.
    pub async fn migration_status_until(
        &self,
        mut want: impl FnMut(&MigrationInfo) -> bool,
    ) -> Result<MigrationInfo, QmpError> {
        let mut events = self.events();
        let mut pause = SHORTEST;
        let mut lost = false;
        loop {
            // What has been told so far is older than what is asked now.
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
            pause = match timeout(pause, told(&mut events)).await {
                Ok(()) => SHORTEST,
                Err(_) => pause.saturating_mul(2).min(LONGEST),
            };
        }
    }
}

/// Returns when something was told that may be about a migration.
async fn told(events: &mut Events) {
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
