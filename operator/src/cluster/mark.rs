//! The condition Readable: that an object cannot be read, on the object itself.

use std::fmt::Debug;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use slackwater_api::condition::READABLE;

use super::apply::{Cluster, WriteError, identity, merge};
use super::guard::Guarded;
use crate::conditions::{cut, plain};
use crate::notice::Notice;

/// The field manager of the condition Readable.
const MARK_MANAGER: &str = "slackwater-operator-readable";
/// The reason of that condition, and of the event.
const UNKNOWN_CONTENT: &str = "UnknownContent";
/// The message of both. An event takes no more.
const MARK_LIMIT_BYTES: usize = 1024;

impl Cluster {
    /// Shows on an object that it cannot be read. A condition says it as long as it is so, by a field manager
    /// of its own: nothing else of the object is touched.
    pub(super) async fn mark_unreadable<K>(&self, object: &Guarded<K>, error: &str)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let message = format!(
            "This version of the operator ({}) cannot read the object, and leaves it alone: {error}. Run the version \
             that wrote it, or give the field a value that this one knows.",
            env!("CARGO_PKG_VERSION")
        );
        let message = cut(&plain(&message), MARK_LIMIT_BYTES);
        if object.mark.as_ref().is_none_or(|mark| mark.message != message) {
            let condition = json!({
                "type": READABLE,
                "status": "False",
                "reason": UNKNOWN_CONTENT,
                "message": message,
                "lastTransitionTime": Time(Timestamp::now()),
            });
            let mut body = identity(object);
            merge(&mut body, json!({"status": {"conditions": [condition]}}));
            let params = PatchParams::apply(MARK_MANAGER).force();
            // The API server takes no object that it could not have taken as a whole.
            if let Err(error) = self.patch_mark(object, &params, &Patch::Apply(body)).await {
                let name = object.name_any();
                tracing::warn!(kind = %K::kind(&()), name, %error, "the condition Readable could not be written");
            }
        }
        let notice = Notice { warning: true, reason: UNKNOWN_CONTENT, note: message };
        self.report(object, "Read", &notice).await;
    }

    /// Takes away what [`mark_unreadable`](Self::mark_unreadable) has written.
    pub(super) async fn take_mark<K>(&self, object: &Guarded<K>)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let Some(mark) = &object.mark else { return };
        // Not by server-side apply: an API server before 1.21 may have forgotten whose the condition is.
        let path = format!("/status/conditions/{}", mark.position);
        let removal = serde_json::from_value(json!([
            {"op": "test", "path": format!("{path}/type"), "value": READABLE},
            {"op": "remove", "path": path},
        ]));
        let params = PatchParams { field_manager: Some(MARK_MANAGER.to_owned()), ..Default::default() };
        let taken = match removal {
            Ok(removal) => self.patch_mark(object, &params, &Patch::<()>::Json(removal)).await,
            Err(error) => Err(WriteError::Write(Box::new(kube::Error::SerdeError(error)))),
        };
        if let Err(error) = taken {
            // The next change of the object brings another try.
            let name = object.name_any();
            tracing::debug!(kind = %K::kind(&()), name, %error, "the condition Readable could not be taken away");
        }
    }

    async fn patch_mark<K, P>(
        &self,
        object: &Guarded<K>,
        params: &PatchParams,
        patch: &Patch<P>,
    ) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
        P: Serialize + Debug,
    {
        // `Api::namespaced` takes no kind that may be without namespaces.
        let requests = Request::new(K::url_path(&(), object.namespace().as_deref()));
        let request = requests.patch_subresource("status", &object.name_any(), params, patch);
        let request =
            request.map_err(|error| WriteError::Write(Box::new(kube::Error::BuildRequest(error))))?;
        self.request(self.client.request::<Guarded<K>>(request)).await.map(drop)
    }
}
