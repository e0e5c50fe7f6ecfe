//! Parses the text of the kernel's trace, line by line. [`super::trace`] interprets the events.

use std::collections::BTreeSet;

/// Nothing is skipped silently: a trace with an unknown line proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// A line is not one of our events.
    #[error("unknown line: {line}")]
    Line {
        /// The line.
        line: String,
    },
    /// A buffer overflowed, or a probe was missed: something is not in the trace.
    #[error("events are missing: {what}")]
    Lost {
        /// Which, as the kernel reports it.
        what: String,
    },
    /// Events that do not fit together.
    #[error("at {}: {what}", seconds(*.at_ns))]
    Inconsistent {
        /// When, on the node's clock.
        at_ns: u64,
        /// What.
        what: String,
    },
}

/// One line of the trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) at_ns: u64,
    pub(super) cpu: u32,
    pub(super) thread: u32,
    pub(super) event: Event,
}

/// A probe's hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Set { device: String, new: u32 },
    Step { device: String, cur: u32, new: u32 },
    Done { ret: u64 },
    Read { file: u64 },
    ReadDone { ret: i64 },
    Write { file: u64, bytes: u64 },
    Reset { device: String },
    Run { vcpu: u64 },
    Ran,
}

/// The parts of what `witness-collect` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Collected {
    pub(super) devices: Vec<Record>,
    pub(super) vcpu_first: Vec<Record>,
    pub(super) vcpu_last: Vec<Record>,
    /// The CPUs whose part of the buffer has lost what came later.
    pub(super) first_full: BTreeSet<u32>,
    /// The CPUs whose part of the buffer has lost what came earlier.
    pub(super) last_full: BTreeSet<u32>,
}

pub(super) fn collected(text: &str) -> Result<Collected, ParseError> {
    let records = |name: &str| {
        part(text, name)?
            .into_iter()
            .filter(|line| !is_comment(line))
            .map(record)
            .collect::<Result<Vec<_>, _>>()
    };
    let full = |name: &str| {
        Ok::<_, ParseError>(part(text, name)?.into_iter().filter_map(loss).collect::<BTreeSet<u32>>())
    };
    if let Some(cpu) = full("devices.lost")?.first() {
        return Err(ParseError::Lost { what: format!("the buffer of CPU {cpu} for the devices was full") });
    }
    // "  witness/set   HITS   MISSES"
    let missed = |line: &&str| line.split_whitespace().nth(2).is_none_or(|misses| misses != "0");
    if let Some(what) = part(text, "missed")?.into_iter().find(missed) {
        return Err(ParseError::Lost { what: what.to_owned() });
    }
    Ok(Collected {
        devices: records("devices")?,
        vcpu_first: records("vcpu_first")?,
        vcpu_last: records("vcpu_last")?,
        first_full: full("vcpu_first.lost")?,
        last_full: full("vcpu_last.lost")?,
    })
}

/// The lines of a part. Every part must be there, even if empty: otherwise the collection was interrupted.
fn part<'a>(text: &'a str, name: &str) -> Result<Vec<&'a str>, ParseError> {
    let mut lines = text.lines().skip_while(|line| line.strip_prefix("@@ ") != Some(name));
    match lines.next() {
        Some(_) => Ok(lines.take_while(|line| !line.starts_with("@@ ")).collect()),
        None => Err(ParseError::Lost { what: format!("the collection has no part {name}") }),
    }
}

/// Comments, and the mark at which a buffer of another CPU begins ("##### CPU 1 buffer started ####").
fn is_comment(line: &str) -> bool {
    line.starts_with('#') || line.trim().is_empty()
}

/// The CPU of a line of a buffer's statistics ("CPU overrun: 12") that reports a loss.
fn loss(line: &str) -> Option<u32> {
    let (cpu, line) = line.split_once(' ')?;
    let (what, count) = line.split_once(": ")?;
    let lost = matches!(what, "overrun" | "commit overrun" | "dropped events") && count.trim() != "0";
    lost.then(|| cpu.parse().ok()).flatten()
}

/// `  COMM-THREAD   [CPU] FLAGS SECONDS.MICROSECONDS: EVENT: (PLACE) KEY=VALUE ...`
fn record(line: &str) -> Result<Record, ParseError> {
    parse_record(line).ok_or_else(|| ParseError::Line { line: line.to_owned() })
}

fn parse_record(line: &str) -> Option<Record> {
    // A thread's name may contain anything, so the line is split at texts that cannot occur in it.
    let (head, tail) = line.split_once(": (")?;
    let (head, event) = head.rsplit_once(": ")?;
    let (head, time) = head.rsplit_once(' ')?;
    let (thread, cpu_and_flags) = head.rsplit_once(" [")?;
    let (cpu, _flags) = cpu_and_flags.split_once(']')?;
    let (_comm, thread) = thread.trim_end().rsplit_once('-')?;
    let (seconds, fraction) = time.split_once('.')?;
    let at_ns = seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?
        + format!("{fraction:0<9}").get(..9)?.parse::<u64>().ok()?;
    let (_place, arguments) = tail.split_once(')')?;
    let event = parse_event(event, arguments)?;
    Some(Record { at_ns, cpu: cpu.parse().ok()?, thread: thread.parse().ok()?, event })
}

fn parse_event(event: &str, arguments: &str) -> Option<Event> {
    let argument = |key: &str| {
        arguments
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
            .map(str::to_owned)
    };
    let number = |key: &str| argument(key)?.parse::<u32>().ok();
    let address = |key: &str| u64::from_str_radix(argument(key)?.strip_prefix("0x")?, 16).ok();
    // A name that the kernel could not read is "(fault)", without quotes.
    let device = || Some(argument("name")?.strip_prefix('"')?.strip_suffix('"')?.to_owned());
    Some(match event {
        "set" => Event::Set { device: device()?, new: number("new")? },
        "step" => Event::Step { device: device()?, cur: number("cur")?, new: number("new")? },
        "done" => Event::Done { ret: address("ret")? },
        "read" => Event::Read { file: address("file")? },
        "readn" => Event::ReadDone { ret: argument("ret")?.parse().ok()? },
        "write" => Event::Write { file: address("file")?, bytes: argument("n")?.parse().ok()? },
        "reset" => Event::Reset { device: device()? },
        "run" => Event::Run { vcpu: address("vcpu")? },
        "ran" => Event::Ran,
        _ => return None,
    })
}

/// A time for messages: seconds with microseconds.
pub(super) fn seconds(ns: u64) -> String {
    format!("{}.{:06} s", ns / 1_000_000_000, ns / 1000 % 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: &str = concat!(
        "   vfio: worker-3-117     [001] .....   105.000250: ",
        r#"set: (mtty_set_state+0x0/0x120 [mtty]) name="5a1ac0de-0001" new=3"#
    );

    #[test]
    fn a_line_is_parsed_with_any_name_of_its_thread() {
        let event = Event::Set { device: "5a1ac0de-0001".into(), new: 3 };
        assert_eq!(record(SET), Ok(Record { at_ns: 105_000_250_000, cpu: 1, thread: 117, event }));
    }

    #[test]
    fn a_return_has_the_function_that_it_left() {
        let line = "  vmm-9   [000] d..2.  1.5: done: \
                    (vfio_ioctl_device_feature+0x2/0x9 [vfio] <- mtty_set_state) ret=0xffff8880045e6a00";
        let expected = Record {
            at_ns: 1_500_000_000,
            cpu: 0,
            thread: 9,
            event: Event::Done { ret: 0xffff_8880_045e_6a00 },
        };
        assert_eq!(record(line), Ok(expected));
    }

    fn collection(devices: &str, stats: &str, misses: &str) -> String {
        format!(
            "@@ devices\n# tracer: nop\n{devices}\n@@ devices.lost\n0 entries: 3\n1 {stats}\n\
             @@ vcpu_first\n@@ vcpu_first.lost\n0 overrun: 0\n1 dropped events: 7\n\
             @@ vcpu_last\n@@ vcpu_last.lost\n0 overrun: 0\n@@ missed\n  witness/set  12  {misses}\n"
        )
    }

    #[test]
    fn a_whole_collection_is_read() {
        let collected = collected(&collection(SET, "overrun: 0", "0")).unwrap();
        assert_eq!(collected.devices.len(), 1);
        assert_eq!((collected.first_full, collected.last_full), (BTreeSet::from([1]), BTreeSet::new()));
    }

    #[test]
    fn a_lost_event_a_missed_probe_a_strange_line_and_a_missing_part_are_errors() {
        assert!(matches!(collected(&collection(SET, "overrun: 2", "0")), Err(ParseError::Lost { .. })));
        assert!(matches!(
            collected(&collection(SET, "dropped events: 1", "0")),
            Err(ParseError::Lost { .. })
        ));
        assert!(matches!(collected(&collection(SET, "overrun: 0", "1")), Err(ParseError::Lost { .. })));
        assert!(matches!(collected(&collection("strange", "overrun: 0", "0")), Err(ParseError::Line { .. })));
        let faulty = SET.replace("\"5a1ac0de-0001\"", "(fault)");
        assert!(matches!(collected(&collection(&faulty, "overrun: 0", "0")), Err(ParseError::Line { .. })));
        let text = collection(SET, "overrun: 0", "0");
        let broken_off = text.split("@@ missed").next().unwrap();
        assert!(matches!(collected(broken_off), Err(ParseError::Lost { .. })));
    }
}
