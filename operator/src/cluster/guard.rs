//! Objects whose content this version may not be able to read.
//!
//! A list or a watch of a plain type fails as a whole by one such object. [`Guarded`] never fails: it keeps
//! what is needed to name the object, to say what is wrong with it, and to leave it alone.

use std::borrow::Cow;
use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::PartialObjectMeta;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use slackwater_api::condition::READABLE;

/// An object, or what can be said of one that cannot be read.
#[derive(Debug, Clone)]
pub(super) struct Guarded<K> {
    pub(super) content: Result<K, Unreadable<K>>,
    /// Its condition Readable=False, if it has one. The content is without that condition.
    pub(super) mark: Option<Mark>,
}

/// The condition Readable=False of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark {
    /// Where it is among the conditions.
    pub(super) position: usize,
    pub(super) message: String,
}

/// An object that this version cannot read.
#[derive(Debug, Clone)]
pub(super) struct Unreadable<K> {
    /// Its metadata.
    pub(super) metadata: ObjectMeta,
    /// Which field, which value, and what would be right.
    pub(super) error: String,
    /// The object without its status, if it is only that.
    pub(super) without_status: Option<K>,
}

impl<'de, K: Resource + DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        // Who has written which field is of no interest here, and may be longer than the object itself.
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
        let mark = take_mark(&mut value);
        let error = match serde_path_to_error::deserialize::<_, K>(&value) {
            Ok(object) => return Ok(Self { content: Ok(object), mark }),
            Err(error) => error.to_string(),
        };
        let PartialObjectMeta { metadata, .. } =
            PartialObjectMeta::<K>::deserialize(&value).map_err(Error::custom)?;
        if let Some(object) = value.as_object_mut() {
            object.remove("status");
        }
        let without_status = K::deserialize(value).ok();
        Ok(Self { content: Err(Unreadable { metadata, error, without_status }), mark })
    }
}

/// Takes the condition Readable=False out of an object.
fn take_mark(object: &mut Value) -> Option<Mark> {
    let conditions = object.get_mut("status")?.get_mut("conditions")?.as_array_mut()?;
    let is_mark = |condition: &Value| condition.get("type").and_then(Value::as_str) == Some(READABLE);
    let position = conditions.iter().position(is_mark)?;
    let mark = conditions.remove(position);
    let message = mark.get("message").and_then(Value::as_str).unwrap_or_default().to_owned();
    Some(Mark { position, message })
}

impl<K: Resource> Resource for Guarded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dynamic: &K::DynamicType) -> Cow<'_, str> {
        K::kind(dynamic)
    }

    fn group(dynamic: &K::DynamicType) -> Cow<'_, str> {
        K::group(dynamic)
    }

    fn version(dynamic: &K::DynamicType) -> Cow<'_, str> {
        K::version(dynamic)
    }

    fn plural(dynamic: &K::DynamicType) -> Cow<'_, str> {
        K::plural(dynamic)
    }

    fn meta(&self) -> &ObjectMeta {
        self.content.as_ref().map_or_else(|unreadable| &unreadable.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match &mut self.content {
            Ok(object) => object.meta_mut(),
            Err(unreadable) => &mut unreadable.metadata,
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::core::ObjectList;
    use serde_json::json;
    use slackwater_api::{MigrationNode, VMMigration};

    use super::*;

    fn migration(name: &str, phase: &str) -> Value {
        json!({
            "apiVersion": "slackwater.dev/v1alpha1",
            "kind": "VMMigration",
            "metadata": {"name": name, "namespace": "demo", "managedFields": [{"manager": "x"}]},
            "spec": {"vmRef": {"name": "counter"}},
            "status": {"phase": phase},
        })
    }

    #[test]
    fn one_object_with_an_unknown_value_hides_no_other_and_names_the_field_the_value_and_what_is_known() {
        let list = json!({
            "apiVersion": "slackwater.dev/v1alpha1",
            "kind": "VMMigrationList",
            "metadata": {},
            "items": [migration("good", "Copying"), migration("bad", "Teleporting"), migration("fine", "Refused")],
        });
        assert!(serde_json::from_value::<ObjectList<VMMigration>>(list.clone()).is_err());
        let list: ObjectList<Guarded<VMMigration>> = serde_json::from_value(list).unwrap();
        let names: Vec<_> = list.items.iter().map(|item| item.meta().name.as_deref().unwrap()).collect();
        assert_eq!(names, ["good", "bad", "fine"]);
        let readable: Vec<_> = list.items.iter().map(|item| item.content.is_ok()).collect();
        assert_eq!(readable, [true, false, true]);
        assert!(list.items[0].meta().managed_fields.is_none());
        let error = &list.items[1].content.as_ref().unwrap_err().error;
        assert!(error.starts_with("status.phase: unknown variant `Teleporting`, expected"), "{error}");
        assert!(error.contains("Copying"), "{error}");
    }

    #[test]
    fn the_mark_of_an_object_that_could_not_be_read_is_seen_and_is_no_part_of_its_conditions() {
        let mut object = migration("mended", "Copying");
        let condition = |type_: &str| {
            json!({
                "type": type_, "status": "False", "reason": "X", "message": type_,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            })
        };
        object["status"]["conditions"] = json!([condition("Accepted"), condition("Readable")]);
        let guarded: Guarded<VMMigration> = serde_json::from_value(object).unwrap();
        assert_eq!(guarded.mark, Some(Mark { position: 1, message: "Readable".into() }));
        let conditions = guarded.content.unwrap().status.unwrap().conditions;
        assert_eq!(conditions.iter().map(|c| c.type_.as_str()).collect::<Vec<_>>(), ["Accepted"]);
    }

    #[test]
    fn a_spec_is_known_if_only_the_status_cannot_be_read() {
        let node = |address: Value| {
            let node = json!({
                "apiVersion": "slackwater.dev/v1alpha1",
                "kind": "MigrationNode",
                "metadata": {"name": "node-a"},
                "spec": {"address": address},
                "status": {"vmCount": "many"},
            });
            serde_json::from_value::<Guarded<MigrationNode>>(node).unwrap().content.unwrap_err()
        };
        let unreadable = node(json!("node-a:7443"));
        assert!(unreadable.error.starts_with("status.vmCount: "), "{}", unreadable.error);
        assert_eq!(unreadable.without_status.unwrap().spec.address, "node-a:7443");
        assert!(node(json!(7443)).without_status.is_none());
    }
}
