//! Kubernetes events.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Resource};

use super::Cluster;
use super::apply::MANAGER;
use crate::conditions::{cut, plain};
use crate::notice::Notice;

/// What the API server takes as a note, as a name before the suffix, and as a reporter.
const NOTE_LIMIT_BYTES: usize = 1024;
const NAME_LIMIT_BYTES: usize = 200;
const REPORTER_LIMIT_BYTES: usize = 128;
/// Where events about objects without a namespace go. API servers before 1.22 take them nowhere else.
const CLUSTER_NAMESPACE: &str = "kube-system";

impl Cluster {
    /// Reports something to the user. An event that cannot be written is logged: nothing depends on it.
    pub async fn report<K: Resource<DynamicType = ()>>(&self, about: &K, action: &str, notice: &Notice) {
        let about = about.object_ref(&());
        let namespace = about.namespace.clone().unwrap_or_else(|| CLUSTER_NAMESPACE.to_owned());
        let event = event(about, &namespace, action, notice, Timestamp::now());
        let events: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        if let Err(error) = self.request(events.create(&PostParams::default(), &event)).await {
            tracing::warn!(reason = notice.reason, note = notice.note, %error, "an event could not be written");
        }
    }
}

fn event(about: ObjectReference, namespace: &str, action: &str, notice: &Notice, now: Timestamp) -> Event {
    let name: String = about.name.iter().flat_map(|name| name.chars()).take(NAME_LIMIT_BYTES).collect();
    let instance = std::env::var("HOSTNAME").unwrap_or_else(|_| MANAGER.to_owned());
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:x}", now.as_nanosecond())),
            namespace: Some(namespace.to_owned()),
            ..Default::default()
        },
        type_: Some(if notice.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(notice.reason.to_owned()),
        note: Some(cut(&plain(&notice.note), NOTE_LIMIT_BYTES)),
        action: Some(action.to_owned()),
        event_time: Some(MicroTime(now)),
        regarding: Some(about),
        reporting_controller: Some(format!("slackwater.dev/{MANAGER}")),
        reporting_instance: Some(cut(&instance, REPORTER_LIMIT_BYTES)),
        ..Default::default()
    }
}
