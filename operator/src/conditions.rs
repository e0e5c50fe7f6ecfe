//! Conditions as Kubernetes wants them: the time of a condition is that of its last change of status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Longer messages are cut: a status must stay readable, and an agent's words are input.
const MESSAGE_LIMIT_BYTES: usize = 4096;

/// When, and about which generation of the spec, something is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The generation of the spec.
    pub generation: Option<i64>,
    /// The time.
    pub now: Timestamp,
}

/// The status of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is so.
    True,
    /// It is not so.
    False,
    /// Nobody can tell, or it is not decided yet.
    Unknown,
}

impl Status {
    /// As the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Sets a condition. The answer is whether its status has changed (a new one counts as changed).
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: Status,
    reason: &str,
    message: &str,
    stamp: Stamp,
) -> bool {
    let previous = conditions.iter_mut().find(|condition| condition.type_ == type_);
    let changed = previous.as_ref().is_none_or(|previous| previous.status != status.as_str());
    let time = match &previous {
        Some(previous) if !changed => previous.last_transition_time.clone(),
        _ => Time(stamp.now),
    };
    let condition = Condition {
        type_: type_.to_owned(),
        status: status.as_str().to_owned(),
        reason: reason.to_owned(),
        message: cut(message, MESSAGE_LIMIT_BYTES),
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

/// The status of a condition is `status`.
pub fn is(conditions: &[Condition], type_: &str, status: Status) -> bool {
    find(conditions, type_).is_some_and(|condition| condition.status == status.as_str())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Stamp {
        Stamp { generation: Some(second), now: Timestamp::from_second(second).unwrap() }
    }

    #[test]
    fn the_time_is_that_of_the_last_change_of_status() {
        let mut conditions = Vec::new();
        assert!(set(&mut conditions, "Ready", Status::False, "A", "a", at(1)));
        assert!(!set(&mut conditions, "Ready", Status::False, "B", "b", at(2)));
        assert_eq!(conditions[0].last_transition_time, Time(at(1).now));
        assert_eq!((conditions[0].reason.as_str(), conditions[0].observed_generation), ("B", Some(2)));
        assert!(set(&mut conditions, "Ready", Status::True, "B", "b", at(3)));
        assert_eq!(conditions[0].last_transition_time, Time(at(3).now));
        assert_eq!(conditions.len(), 1);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(cut("short", 5), "short");
        assert_eq!(cut("äääää", 8), "ää...");
    }
}
