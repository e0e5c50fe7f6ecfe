//! Kubernetes events.

use kube::Resource;
use kube::runtime::events::{Event, EventType};

use super::Cluster;
use crate::conditions::cut;
use crate::migration::fact::Notice;

/// What the API server takes as a note: 1 kB.
const NOTE_LIMIT_BYTES: usize = 1024;

impl Cluster {
    /// Tells the user. An event that cannot be written is logged: it is news, and nothing depends on it.
    pub async fn tell<K: Resource<DynamicType = ()>>(&self, about: &K, action: &str, notice: &Notice) {
        let event = Event {
            type_: if notice.warning { EventType::Warning } else { EventType::Normal },
            reason: notice.reason.to_owned(),
            note: Some(cut(&notice.note, NOTE_LIMIT_BYTES)),
            action: action.to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, &about.object_ref(&())).await {
            tracing::warn!(reason = notice.reason, note = notice.note, %error, "an event could not be written");
        }
    }
}
