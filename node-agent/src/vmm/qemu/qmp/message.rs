//! What a line from QEMU means.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::commands::Version;
use super::error::QmpError;
use super::events::Event;

/// How much of a line that means nothing is quoted.
const QUOTED_CHARS: usize = 80;

/// What became of a command, before it is known which one it was.
pub(super) type Outcome = Result<Value, Failure>;

/// Why a command brought nothing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// QEMU refused it.
    Refused { class: String, desc: String },
    /// The error that QEMU answered cannot be understood.
    Unintelligible { reason: String },
    /// The connection broke.
    Lost { reason: String },
}

impl Failure {
    /// The same, with the command's name.
    pub(super) fn of(self, command: &str) -> QmpError {
        let command = command.to_owned();
        match self {
            Self::Refused { class, desc } => QmpError::Refused { command, class, desc },
            Self::Unintelligible { reason } => QmpError::Answer { command, reason },
            Self::Lost { reason } => QmpError::Lost { command, reason },
        }
    }
}

/// A line from QEMU.
#[derive(Debug)]
pub(super) enum Message {
    /// The first one.
    Greeting(Result<Version, String>),
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
    /// Makes sense of a line.
    ///
    /// # Errors
    /// In words, if it is not a JSON object: whoever wrote it does not speak QMP.
    pub(super) fn of(line: &[u8]) -> Result<Self, String> {
        let mut object: Map<String, Value> = serde_json::from_slice(line)
            .map_err(|_| format!("a line is not a JSON object: `{}`", quote(line)))?;
        if let Some(Value::String(name)) = object.remove("event") {
            let mut take = |field| object.remove(field).unwrap_or_default();
            let (data, timestamp) = (take("data"), take("timestamp"));
            return Ok(Self::Event(Event::of(name, data, timestamp, line.len())));
        }
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(error) = object.get("error") {
            let failure = match understand(error) {
                Ok(Refusal { class, desc }) => Failure::Refused { class, desc },
                Err(reason) => Failure::Unintelligible { reason: format!("in `error`, {reason}") },
            };
            return Ok(Self::Answer { id, outcome: Err(failure) });
        }
        if let Some(value) = object.remove("return") {
            return Ok(Self::Answer { id, outcome: Ok(value) });
        }
        Ok(match object.get("QMP") {
            Some(greeting) => {
                let version = understand(greeting).map(|Greeting { version }| version);
                Self::Greeting(version.map_err(|reason| format!("in `QMP`, {reason}")))
            }
            None => Self::Unknown,
        })
    }
}

/// Reads a value as what it should be, or says which field is wrong.
pub(super) fn understand<'de, T: Deserialize<'de>>(value: &'de Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." => error.into_inner().to_string(),
            _ => format!("field `{path}`: {}", error.into_inner()),
        }
    })
}

/// The beginning of a line, for people.
fn quote(line: &[u8]) -> String {
    let beginning = line.get(..QUOTED_CHARS * 4).unwrap_or(line);
    let text = String::from_utf8_lossy(beginning);
    text.trim_end().chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(QUOTED_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_eighty_characters_of_garbage_are_quoted() {
        let quoted = |line: &[u8]| Message::of(line).unwrap_err();
        assert_eq!(quoted(b"SSH-2.0\r"), "a line is not a JSON object: `SSH-2.0`");
        assert_eq!(quoted(b"[1]"), "a line is not a JSON object: `[1]`");
        assert_eq!(quoted("ü".repeat(500).as_bytes()).matches('ü').count(), 80);
        assert_eq!(quoted(b"\x1b[2J"), "a line is not a JSON object: `\u{fffd}[2J`");
        assert!(quoted(&[0xff; 500]).chars().count() < 120);
    }

    #[test]
    fn an_error_without_its_words_names_what_is_missing() {
        let Ok(Message::Answer { id: Some(3), outcome: Err(failure) }) =
            Message::of(br#"{"id": 3, "error": {"class": "GenericError"}}"#)
        else {
            panic!("not an answer");
        };
        assert_eq!(
            failure.of("stop").to_string(),
            "QEMU's answer to stop cannot be understood: in `error`, missing field `desc`"
        );
    }

    #[test]
    fn an_answer_deep_within_names_its_field() {
        let value =
            serde_json::json!({"version": {"qemu": {"major": "ten", "minor": 0, "micro": 2}, "package": ""}});
        let reason = understand::<Greeting>(&value).map(|_| ()).unwrap_err();
        assert_eq!(reason, "field `version.qemu.major`: invalid type: string \"ten\", expected u32");
    }
}
