//! The pause between two attempts.

use std::time::Duration;

use jiff::Timestamp;

use super::run::Run;

impl Run {
    /// Plans the next attempt when it is time; returns earlier if something about the object has changed.
    pub(super) async fn retry(&mut self) {
        let time = self.draft.status.next_attempt_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
        let left = Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO);
        let left = left.min(Duration::from_secs(60));
        if left.is_zero() {
            return self.plan().await;
        }
        tokio::select! {
            () = tokio::time::sleep(left) => {}
            _ = self.around.migrations.changed() => {}
        }
    }
}
