//! What a line from QEMU means.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::commands::Version;
use super::error::QmpError;
use super::events::Event;

/// How much of a line that is not JSON is quoted.
const QUOTED_CHARS: usize = 80;

/// A line is not a JSON object: its writer does not speak QMP.
#[derive(Debug, thiserror::Error)]
#[error("a line is not a JSON object: `{quoted}`")]
pub(super) struct NotAnObject {
    /// Its beginning.
    quoted: String,
}

/// A value has another shape than the protocol says.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ShapeError {
    #[error("{reason}")]
    Value { reason: String },
    #[error("field `{field}`: {reason}")]
    Field { field: String, reason: String },
}

/// The result of a command, without its name.
pub(super) type Outcome = Result<Value, Failure>;

/// Why a command has no result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// QEMU refused it.
    Refused { class: String, desc: String },
    /// The error that QEMU answered cannot be parsed.
    Unparsable { reason: String },
    /// The connection broke.
    Lost { reason: String },
}

impl Failure {
    /// The error of the command with this name.
    pub(super) fn into_error(self, command: &str) -> QmpError {
        let command = command.to_owned();
        match self {
            Self::Refused { class, desc } => QmpError::Refused { command, class, desc },
            Self::Unparsable { reason } => QmpError::Answer { command, reason },
            Self::Lost { reason } => QmpError::Lost { command, reason },
        }
    }
}

/// A line from QEMU.
#[derive(Debug)]
pub(super) enum Message {
    /// The first one.
    Greeting(Result<Version, ShapeError>),
    /// An answer. Without an id it is one to something that QEMU could not read.
    Answer { id: Option<u64>, outcome: Outcome },
    /// An event.
    Event(Event),
    /// An object that is none of these.
    Unknown,
}

#[derive(Deserialize)]
struct Greeting {
    version: Version,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

impl Message {
    /// Parses a line.
    ///
    /// # Errors
    /// If it is not a JSON object.
    pub(super) fn parse(line: &[u8]) -> Result<Self, NotAnObject> {
        let mut object: Map<String, Value> =
            serde_json::from_slice(line).map_err(|_| NotAnObject { quoted: quote(line) })?;
        if let Some(Value::String(name)) = object.remove("event") {
            let mut take = |field| object.remove(field).unwrap_or_default();
            let (data, timestamp) = (take("data"), take("timestamp"));
            return Ok(Self::Event(Event::parse(name, data, timestamp, line.len())));
        }
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(error) = object.get("error") {
            let failure = match parse(error) {
                Ok(Refusal { class, desc }) => Failure::Refused { class, desc },
                Err(error) => Failure::Unparsable { reason: format!("in `error`, {error}") },
            };
            return Ok(Self::Answer { id, outcome: Err(failure) });
        }
        if let Some(value) = object.remove("return") {
            return Ok(Self::Answer { id, outcome: Ok(value) });
        }
        Ok(match object.get("QMP") {
            Some(greeting) => Self::Greeting(parse(greeting).map(|Greeting { version }| version)),
            None => Self::Unknown,
        })
    }
}

/// Parses a value.
///
/// # Errors
/// The first field that has another shape.
pub(super) fn parse<'de, T: Deserialize<'de>>(value: &'de Value) -> Result<T, ShapeError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        let reason = error.into_inner().to_string();
        if field == "." { ShapeError::Value { reason } } else { ShapeError::Field { field, reason } }
    })
}

/// The beginning of a line, printable.
fn quote(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .trim_end()
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .take(QUOTED_CHARS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_eighty_characters_of_garbage_are_quoted() {
        let quoted = |line: &[u8]| Message::parse(line).unwrap_err().to_string();
        assert_eq!(quoted(b"SSH-2.0\r"), "a line is not a JSON object: `SSH-2.0`");
        assert_eq!(quoted(b"[1]"), "a line is not a JSON object: `[1]`");
        assert_eq!(quoted("ü".repeat(500).as_bytes()).matches('ü').count(), 80);
        assert_eq!(quoted(b"\x1b[2J"), "a line is not a JSON object: `\u{fffd}[2J`");
        assert!(quoted(&[0xff; 500]).chars().count() < 120);
    }

    #[test]
    fn an_error_without_a_message_names_the_missing_field() {
        let Ok(Message::Answer { id: Some(3), outcome: Err(failure) }) =
            Message::parse(br#"{"id": 3, "error": {"class": "GenericError"}}"#)
        else {
            panic!("not an answer");
        };
        assert_eq!(
            failure.into_error("stop").to_string(),
            "QEMU's answer to stop cannot be understood: in `error`, missing field `desc`"
        );
    }

    #[test]
    fn a_nested_field_of_an_answer_is_named_by_its_path() {
        let value =
            serde_json::json!({"version": {"qemu": {"major": "ten", "minor": 0, "micro": 2}, "package": ""}});
        let error = parse::<Greeting>(&value).map(|_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "field `version.qemu.major`: invalid type: string \"ten\", expected u32"
        );
    }
}
