//! Conditions as Kubernetes wants them: the time of a condition is that of its last change of status.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use strum::IntoStaticStr;

use crate::notice::Notice;

/// Longer messages are cut: a status must stay readable, and an agent's message is input.
const MESSAGE_LIMIT_BYTES: usize = 4096;
/// How long after an event about a condition its next change is not reported by another one.
const REPORT_AGAIN_SECONDS: i64 = 60;

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
        message: cut(&plain(&finding.message), MESSAGE_LIMIT_BYTES),
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

/// A condition that a user hears of by an event when it comes to a status with a reason.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// Its type.
    pub type_: &'static str,
    /// The status.
    pub status: Status,
    /// The reason.
    pub reason: &'static str,
}

/// Which objects' conditions have been reported lately.
#[derive(Debug, Default)]
pub struct Reported(BTreeMap<String, Timestamp>);

impl Reported {
    /// What to report when the conditions of the object of this name have changed. `None`: the condition has
    /// not come to that status, or that was reported within the last minute: what comes and goes is not
    /// reported each time.
    pub fn turned(
        &mut self,
        about: &str,
        before: &[Condition],
        after: &[Condition],
        turn: Turn,
        now: Timestamp,
    ) -> Option<Notice> {
        let Turn { type_, status, reason } = turn;
        let is_so =
            |condition: &&Condition| condition.status == status.as_str() && condition.reason == reason;
        let condition = find(after, type_).filter(is_so)?;
        let again = SignedDuration::from_secs(REPORT_AGAIN_SECONDS);
        self.0.retain(|_, reported| now.duration_since(*reported) < again);
        if find(before, type_).is_some_and(|before| is_so(&before)) || self.0.contains_key(about) {
            return None;
        }
        self.0.insert(about.to_owned(), now);
        Some(Notice { warning: true, reason, note: condition.message.clone() })
    }
}

/// A character that moves a terminal's cursor, or hides what is written.
pub fn is_hidden(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A text in which others have a part, without such characters. Lines and tabs stay.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if is_hidden(c) && !matches!(c, '\n' | '\t') { '?' } else { c }).collect()
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
    fn a_message_moves_no_cursor() {
        let mut conditions = Vec::new();
        let finding = Finding::new(Status::True, "R", "a\u{1b}[2J\r\u{202e}\nlast lines:\tb");
        set(&mut conditions, "Ready", &finding, at(1));
        assert_eq!(conditions[0].message, "a?[2J??\nlast lines:\tb");
    }

    #[test]
    fn a_condition_that_comes_and_goes_is_reported_once_in_a_while() {
        let (mut conditions, mut events) = (Vec::new(), Reported::default());
        let turn = Turn { type_: "Contested", status: Status::True, reason: "R" };
        let mut reported = |status, second| {
            let before = conditions.clone();
            set(&mut conditions, "Contested", &Finding::new(status, "R", "m"), at(second));
            events.turned("demo/web", &before, &conditions, turn, at(second).now).is_some()
        };
        let series = [
            (Status::False, 9, false),
            (Status::True, 10, true),
            (Status::True, 20, false),
            (Status::False, 30, false),
            (Status::True, 31, false),
            (Status::False, 32, false),
            (Status::True, 92, true),
        ];
        for (status, second, wanted) in series {
            assert_eq!(reported(status, second), wanted, "{second}");
        }
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
