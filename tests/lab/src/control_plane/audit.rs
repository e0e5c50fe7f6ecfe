//! The API server's audit log: who requested what, with which result.

use serde::Deserialize;

/// One request, as the API server recorded it (audit.k8s.io/v1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditEvent {
    /// `system:serviceaccount:NAMESPACE:NAME` for a service account.
    pub user: String,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, ...
    pub verb: String,
    /// API group; empty for the core's.
    pub group: String,
    /// `RESOURCE`, or `RESOURCE/SUBRESOURCE`; empty for a path that is no resource (`/readyz`).
    pub resource: String,
    /// Namespace, where there is one.
    pub namespace: Option<String>,
    /// The object's name, where there is one.
    pub name: Option<String>,
    /// HTTP status; 403 is what RBAC refused.
    pub status: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    stage: String,
    verb: String,
    user: User,
    #[serde(default)]
    object_ref: ObjectRef,
    #[serde(default)]
    response_status: Status,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ObjectRef {
    resource: String,
    subresource: Option<String>,
    api_group: String,
    namespace: Option<String>,
    name: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
}

/// Reads the log. A watch is recorded when its answer begins and again when it ends; only the first record is
/// used, so that an open watch is seen, too. A last line that is still being written is left out.
pub(crate) fn parse(log: &str) -> Result<Vec<AuditEvent>, serde_json::Error> {
    let whole = log.rfind('\n').map_or("", |end| log.get(..end).unwrap_or_default());
    let mut events = Vec::new();
    for line in whole.lines() {
        let line: Line = serde_json::from_str(line)?;
        // Other requests are recorded once, complete.
        if (line.verb == "watch") == (line.stage == "ResponseStarted") {
            events.push(line.into());
        }
    }
    Ok(events)
}

impl From<Line> for AuditEvent {
    fn from(line: Line) -> Self {
        let object = line.object_ref;
        let resource = match object.subresource {
            Some(subresource) => format!("{}/{subresource}", object.resource),
            None => object.resource,
        };
        Self {
            user: line.user.username,
            verb: line.verb,
            group: object.api_group,
            resource,
            namespace: object.namespace,
            name: object.name,
            status: line.response_status.code,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_event_and_an_unfinished_line_is_none() {
        let log = concat!(
            r#"{"stage":"ResponseComplete","verb":"patch","user":{"username":"u"},"#,
            r#""objectRef":{"resource":"vmmigrations","#,
            r#""subresource":"status","apiGroup":"slackwater.dev","namespace":"demo","name":"m"},"#,
            r#""responseStatus":{"code":403}}"#,
            "\n",
            r#"{"stage":"ResponseStarted","verb":"watch","user":{"username":"u"},"#,
            r#""objectRef":{"resource":"pods"},"responseStatus":{"code":200}}"#,
            "\n",
            r#"{"stage":"ResponseComplete","verb":"watch","user":{"username":"u"},"#,
            r#""objectRef":{"resource":"pods"},"responseStatus":{"code":200}}"#,
            "\n",
            r#"{"stage":"Respon"#,
        );
        let events = parse(log).unwrap();
        assert_eq!(events.len(), 2);
        assert_eq!(events[0].resource, "vmmigrations/status");
        assert_eq!((events[0].group.as_str(), events[0].status), ("slackwater.dev", 403));
        assert_eq!(events[1].verb, "watch");
    }
}
