//! Conditions as Kubernetes wants them: the time of a condition is that of its last change of status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use strum::IntoStaticStr;

/// Longer messages are cut: a status must stay readable, and an agent's message is input.
const MESSAGE_LIMIT_BYTES: usize = 4096;

/// When something became known, and about which generation of the spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The generation of the spec.
    pub generation: Option<i64>,
    /// The time.
    pub now: Timestamp,
}

/// The status of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr)]
pub enum Status {
    /// It is so.
    True,
    /// It is not so.
    False,
    /// It is not known, or not decided yet.
    Unknown,
}

impl Status {
    /// As the API writes it.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// What a condition says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Whether it is so.
    pub status: Status,
    /// Why, in CamelCase, for programs.
    pub reason: String,
    /// Why, for a person.
    pub message: String,
}

impl Finding {
    /// A finding with its reason and message.
    pub fn new(status: Status, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), message: message.into() }
    }
}

/// Sets a condition. `true`: its status has changed (a new condition counts as changed).
pub fn set(conditions: &mut Vec<Condition>, type_: &str, finding: &Finding, stamp: Stamp) -> bool {
    let status = finding.status.as_str();
    let previous = conditions.iter_mut().find(|condition| condition.type_ == type_);
    let changed = previous.as_ref().is_none_or(|previous| previous.status != status);
    let time = match &previous {
        Some(previous) if !changed => previous.last_transition_time.clone(),
        _ => Time(stamp.now),
    };
    let condition = Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: finding.reason.clone(),
        message: printable(cut(&finding.message, MESSAGE_LIMIT_BYTES)),
        observed_generation: stamp.generation,
        last_transition_time: time,
    };
    match previous {
        Some(previous) => *previous = condition,
        None => conditions.push(condition),
    }
    changed
}

/// The condition of a type.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Whether the condition of a type is there and has that status.
pub fn is(conditions: &[Condition], type_: &str, status: Status) -> bool {
    find(conditions, type_).is_some_and(|condition| condition.status == status.as_str())
}

/// Whether the condition of a type is there and has that reason.
pub fn has_reason(conditions: &[Condition], type_: &str, reason: &str) -> bool {
    find(conditions, type_).is_some_and(|condition| condition.reason == reason)
}

/// Cuts a text to at most `limit` bytes, between characters, and shows that it did.
pub fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_owned();
    }
    let mut end = limit.saturating_sub(3);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", text.get(..end).unwrap_or_default())
}

/// A message may quote an agent, and a terminal may show it: what would steer the terminal is replaced.
fn printable(message: String) -> String {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    // One byte for one or two: the message does not grow.
    if message.contains(steers) { message.replace(steers, "?") } else { message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_gets_into_a_condition() {
        let mut conditions = Vec::new();
        let message = "said:\n\u{1b}[2Jü\u{9b}1mx\ty";
        set(&mut conditions, "Ready", &Finding::new(Status::True, "A", message), at(1));
        assert_eq!(conditions[0].message, "said:\n?[2Jü?1mx\ty");
    }

    fn at(second: i64) -> Stamp {
        Stamp { generation: Some(second), now: Timestamp::from_second(second).unwrap() }
    }

    #[test]
    fn the_time_is_that_of_the_last_change_of_status() {
        let mut conditions = Vec::new();
        let mut ready = |status, reason, second| {
            let changed = set(&mut conditions, "Ready", &Finding::new(status, reason, "x"), at(second));
            (changed, conditions.clone())
        };
        assert!(ready(Status::False, "A", 1).0);
        let (changed, conditions) = ready(Status::False, "B", 2);
        assert!(!changed);
        assert_eq!(conditions[0].last_transition_time, Time(at(1).now));
        assert_eq!((conditions[0].reason.as_str(), conditions[0].observed_generation), ("B", Some(2)));
        let (changed, conditions) = ready(Status::True, "B", 3);
        assert!(changed);
        assert_eq!(conditions[0].last_transition_time, Time(at(3).now));
        assert_eq!(conditions.len(), 1);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(cut("short", 5), "short");
        assert_eq!(cut("äääää", 8), "ää...");
    }
}
