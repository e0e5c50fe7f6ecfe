//! Builds a [`Trace`] from the probes' events.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{
    parse::{self, Event, ParseError, Record},
    state::State,
    trace::{Access, AccessKind, Change, DeviceTrace, Run, Trace, VcpuTrace},
};
use crate::node::ClockRelation;

impl Trace {
    /// Reads what `witness-collect` printed on a node.
    ///
    /// # Errors
    /// When it is incomplete or inconsistent.
    pub fn parse(node: &str, clock: ClockRelation, collected: &str) -> Result<Self, ParseError> {
        let collected = parse::collected(collected)?;
        let mut reader = Reader::default();
        for record in collected.devices {
            reader.take(record)?;
        }
        let vcpus =
            vcpus(collected.vcpu_first, &collected.first_full, collected.vcpu_last, &collected.last_full)?;
        Ok(Self { node: node.to_owned(), clock, devices: reader.devices, vcpus })
    }
}

/// A request to change a state, between its begin and its end.
struct Pending {
    device: String,
    wanted: State,
    /// When the driver asked for its next arc, and in which state it was then.
    steps: Vec<(u64, State)>,
}

#[derive(Default)]
struct Reader {
    devices: BTreeMap<String, DeviceTrace>,
    pending: HashMap<u32, Pending>,
    files: HashMap<u64, String>,
    /// Reads that have not returned: the device and the index of the access.
    reading: HashMap<u32, (String, usize)>,
}

impl Reader {
    fn take(&mut self, record: Record) -> Result<(), ParseError> {
        let Record { at_ns, thread, event, .. } = record;
        let inconsistent =
            |what: &str| ParseError::Inconsistent { at_ns, what: format!("thread {thread}: {what}") };
        let state =
            |number| State::from_number(number).ok_or_else(|| inconsistent(&format!("state {number}")));
        match event {
            Event::Set { device, new } => {
                let pending = Pending { device, wanted: state(new)?, steps: Vec::new() };
                if self.pending.insert(thread, pending).is_some() {
                    return Err(inconsistent("a second set before the first was done"));
                }
            }
            Event::Step { device, cur, new } => {
                let pending = self.pending.get_mut(&thread).filter(|pending| pending.device == device);
                let pending = pending.ok_or_else(|| inconsistent("a step without a set"))?;
                if pending.wanted != state(new)? {
                    return Err(inconsistent("a step to another end than the set's"));
                }
                pending.steps.push((at_ns, state(cur)?));
            }
            Event::Done { ret } => {
                let pending =
                    self.pending.remove(&thread).ok_or_else(|| inconsistent("done without a set"))?;
                self.done(pending, at_ns, ret);
            }
            Event::Read { file } => {
                let device = self
                    .access(file, AccessKind::Read, at_ns, 0)
                    .ok_or_else(|| inconsistent(&no_device(file)))?;
                self.reading.insert(thread, device);
            }
            Event::ReadDone { ret } => {
                let (device, index) = self
                    .reading
                    .remove(&thread)
                    .ok_or_else(|| inconsistent("a read's end without its begin"))?;
                let device = self.devices.entry(device).or_default();
                if let Some(access) = device.accesses.get_mut(index) {
                    access.bytes = u64::try_from(ret).unwrap_or(0);
                }
            }
            Event::Write { file, bytes } => {
                self.access(file, AccessKind::Write, at_ns, bytes)
                    .ok_or_else(|| inconsistent(&no_device(file)))?;
            }
            Event::Reset { device } => {
                // A reset ends in RUNNING (mtty, mlx5).
                let to = State::Running;
                let change =
                    Change { from: None, to: Some(to), wanted: to, began_ns: at_ns, ended_ns: at_ns };
                self.devices.entry(device).or_default().changes.push(change);
            }
            Event::Run { .. } | Event::Ran => return Err(inconsistent("a vCPU among the devices")),
        }
        Ok(())
    }

    fn done(&mut self, pending: Pending, at_ns: u64, ret: u64) {
        let failed = is_error(ret);
        let device = self.devices.entry(pending.device.clone()).or_default();
        let mut steps = pending.steps.iter().peekable();
        while let Some(&(began_ns, from)) = steps.next() {
            let (to, ended_ns) = match steps.peek() {
                Some(&&(next_ns, next)) => (Some(next), next_ns),
                None => ((!failed).then_some(pending.wanted), at_ns),
            };
            let change = Change { from: Some(from), to, wanted: pending.wanted, began_ns, ended_ns };
            device.changes.push(change);
        }
        if !failed && ret != 0 {
            // The kernel may reuse the address of a closed file: the latest counts.
            self.files.insert(ret, pending.device);
        }
    }

    /// Records an access. Returns its device and its index there; none: the file is of no device.
    fn access(&mut self, file: u64, kind: AccessKind, at_ns: u64, bytes: u64) -> Option<(String, usize)> {
        let device = self.files.get(&file)?.clone();
        let accesses = &mut self.devices.entry(device.clone()).or_default().accesses;
        accesses.push(Access { kind, at_ns, bytes });
        Some((device, accesses.len() - 1))
    }
}

fn no_device(file: u64) -> String {
    format!("file {file:#x} belongs to no device")
}

/// Whether a pointer is an error number (IS_ERR in include/linux/err.h).
fn is_error(pointer: u64) -> bool {
    pointer >= u64::MAX - 4094
}

/// Joins the first runs and the last ones. A buffer that has all of them is used alone.
fn vcpus(
    mut first: Vec<Record>,
    first_full: &BTreeSet<u32>,
    mut last: Vec<Record>,
    last_full: &BTreeSet<u32>,
) -> Result<VcpuTrace, ParseError> {
    if last_full.is_empty() {
        return Ok(VcpuTrace { runs: runs(last)?, gap_ns: None });
    }
    if first_full.is_empty() {
        return Ok(VcpuTrace { runs: runs(first)?, gap_ns: None });
    }
    // Each CPU has a buffer of its own: the first are complete up to where the first of them was full, the
    // last from where the last of them begins.
    let times = |records: &[Record], cpu: u32| {
        records.iter().filter(move |record| record.cpu == cpu).map(|record| record.at_ns).collect::<Vec<_>>()
    };
    let known_to =
        first_full.iter().filter_map(|cpu| times(&first, *cpu).into_iter().max()).min().unwrap_or(0);
    let known_from =
        last_full.iter().filter_map(|cpu| times(&last, *cpu).into_iter().min()).max().unwrap_or(u64::MAX);
    first.retain(|record| record.at_ns <= known_to && record.at_ns < known_from);
    last.retain(|record| record.at_ns >= known_from);
    let mut all = runs(first)?;
    all.extend(runs(last)?);
    Ok(VcpuTrace { runs: all, gap_ns: (known_to < known_from).then_some((known_to, known_from)) })
}

/// Pairs begins and ends. A missing begin at the front is set to the first record.
fn runs(records: Vec<Record>) -> Result<Vec<Run>, ParseError> {
    let mut runs: Vec<Run> = Vec::new();
    let mut open: HashMap<u32, usize> = HashMap::new();
    let begin_ns = records.first().map_or(0, |record| record.at_ns);
    for Record { at_ns, thread, event, .. } in records {
        match event {
            Event::Run { vcpu } => {
                open.insert(thread, runs.len());
                runs.push(Run { thread, vcpu, began_ns: at_ns, ended_ns: None });
            }
            Event::Ran => match open.remove(&thread).and_then(|index| runs.get_mut(index)) {
                Some(run) => run.ended_ns = Some(at_ns),
                None => runs.push(Run { thread, vcpu: 0, began_ns: begin_ns, ended_ns: Some(at_ns) }),
            },
            _ => {
                return Err(ParseError::Inconsistent { at_ns, what: "a device among the vCPUs".to_owned() });
            }
        }
    }
    runs.sort_by_key(|run| run.began_ns);
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaa";

    fn line(cpu: u32, micros: u64, thread: u32, event: &str) -> String {
        let (name, arguments) = event.split_once(' ').unwrap_or((event, ""));
        format!("  x-{thread}  [{cpu:03}] ..... 1.{micros:06}: {name}: (f+0x0/0x1 [m]) {arguments}")
    }

    fn collection(
        devices: &[String],
        first: &[String],
        first_full: bool,
        last: &[String],
        last_full: bool,
    ) -> String {
        let lost = |full: bool| format!("0 overrun: {}", u32::from(full));
        [
            "@@ devices".to_owned(),
            devices.join("\n"),
            "@@ devices.lost\n@@ vcpu_first".to_owned(),
            first.join("\n"),
            "@@ vcpu_first.lost".to_owned(),
            lost(first_full),
            "@@ vcpu_last".to_owned(),
            last.join("\n"),
            "@@ vcpu_last.lost".to_owned(),
            lost(last_full),
            "@@ missed".to_owned(),
        ]
        .join("\n")
    }

    fn devices(lines: &[String]) -> Result<Trace, ParseError> {
        Trace::parse("n", ClockRelation::exact(), &collection(lines, &[], false, &[], false))
    }

    fn set(micros: u64, thread: u32, new: u32) -> String {
        line(0, micros, thread, &format!("set name=\"{A}\" new={new}"))
    }

    fn step(micros: u64, thread: u32, cur: u32, new: u32) -> String {
        line(0, micros, thread, &format!("step name=\"{A}\" cur={cur} new={new}"))
    }

    fn done(micros: u64, thread: u32, ret: &str) -> String {
        line(0, micros, thread, &format!("done ret={ret}"))
    }

    #[test]
    fn a_path_is_split_into_its_arcs() {
        let trace = devices(&[
            set(1, 7, 3),
            step(2, 7, 2, 3),
            step(4, 7, 5, 3),
            step(6, 7, 1, 3),
            done(9, 7, "0xff00"),
        ]);
        let trace = trace.unwrap();
        let arcs: Vec<_> =
            trace.devices[A].changes.iter().map(|c| (c.from.unwrap(), c.to.unwrap(), c.ended_ns)).collect();
        use State::*;
        let at = |micros: u64| 1_000_000_000 + micros * 1000;
        assert_eq!(arcs, [(Running, RunningP2p, at(4)), (RunningP2p, Stop, at(6)), (Stop, StopCopy, at(9))]);
        assert_eq!(trace.final_state(A), Some(StopCopy));
        assert_eq!(trace.devices[A].state_at(at(0)), Some(Running));
        assert_eq!(trace.devices[A].state_at(at(3)), None, "between two states it is in neither");
        assert_eq!(trace.devices[A].state_at(at(6)), None, "the next arc has begun");
        assert_eq!(trace.states_of(A), [(RunningP2p, at(4)), (Stop, at(6)), (StopCopy, at(9))]);
    }

    #[test]
    fn an_arc_that_fails_leaves_the_device_where_it_was() {
        let trace = devices(&[set(1, 7, 1), step(2, 7, 4, 1), done(9, 7, "0xffffffffffffffea")]).unwrap();
        assert_eq!(trace.devices[A].changes[0].to, None);
        assert_eq!(trace.final_state(A), Some(State::Resuming));
    }

    #[test]
    fn reads_and_writes_belong_to_the_device_whose_file_was_opened_last_at_that_address() {
        let other = line(0, 20, 8, "set name=\"bbbb\" new=4");
        let other_step = line(0, 21, 8, "step name=\"bbbb\" cur=1 new=4");
        let trace = devices(&[
            set(1, 7, 3),
            step(2, 7, 1, 3),
            done(3, 7, "0xff00"),
            line(0, 4, 9, "read file=0xff00 n=100"),
            line(0, 5, 9, "readn ret=36"),
            other,
            other_step,
            done(22, 8, "0xff00"),
            line(0, 23, 9, "write file=0xff00 n=12"),
        ])
        .unwrap();
        let only = |device: &str| {
            trace.devices[device].accesses.iter().map(|a| (a.kind, a.bytes)).collect::<Vec<_>>()
        };
        assert_eq!(only(A), [(AccessKind::Read, 36)]);
        assert_eq!(only("bbbb"), [(AccessKind::Write, 12)]);
    }

    #[test]
    fn inconsistent_events_are_an_error() {
        for lines in [
            vec![step(1, 7, 1, 3)],
            vec![done(1, 7, "0x0")],
            vec![set(1, 7, 3), set(2, 7, 3)],
            vec![set(1, 7, 3), step(2, 7, 2, 1)],
            vec![line(0, 1, 7, "read file=0xff00 n=1")],
            vec![set(1, 7, 99)],
        ] {
            assert!(matches!(devices(&lines), Err(ParseError::Inconsistent { .. })), "{lines:?}");
        }
    }

    #[test]
    fn a_reset_ends_in_running() {
        let reset = line(0, 5, 7, &format!("reset name=\"{A}\""));
        let trace = devices(&[set(1, 7, 4), step(2, 7, 1, 4), done(3, 7, "0xff00"), reset]).unwrap();
        assert_eq!(trace.final_state(A), Some(State::Running));
    }

    fn vcpus(first: &[String], first_full: bool, last: &[String], last_full: bool) -> VcpuTrace {
        let text = collection(&[], first, first_full, last, last_full);
        Trace::parse("n", ClockRelation::exact(), &text).unwrap().vcpus
    }

    fn ran(from: u64, to: u64) -> [String; 2] {
        [line(0, from, 7, "run vcpu=0xaa"), line(0, to, 7, "ran ret=0")]
    }

    #[test]
    fn a_vcpus_runs_are_known_from_one_buffer_that_lost_nothing() {
        let all = [ran(1, 2), ran(3, 4)].concat();
        let trace = vcpus(&all[..2], true, &all, false);
        assert_eq!((trace.runs.len(), trace.gap_ns), (2, None));
    }

    #[test]
    fn between_the_first_runs_and_the_last_ones_is_a_gap() {
        let trace = vcpus(&[ran(1, 2), ran(3, 4)].concat(), true, &[ran(50, 51), ran(60, 61)].concat(), true);
        assert_eq!(trace.runs.len(), 4);
        assert_eq!(trace.gap_ns, Some((1_000_004_000, 1_000_050_000)));
    }

    #[test]
    fn buffers_that_overlap_leave_no_gap_and_count_nothing_twice() {
        let all = [ran(1, 2), ran(3, 4), ran(5, 6)].concat();
        let trace = vcpus(&all[..4], true, &all[2..], true);
        assert_eq!((trace.runs.len(), trace.gap_ns), (3, None));
        assert_eq!(trace.runs[1].ended_ns, Some(1_000_004_000));
    }

    #[test]
    fn a_vcpu_that_is_still_in_has_no_end() {
        let trace = vcpus(&[], false, &ran(1, 2)[..1], false);
        assert_eq!(trace.runs[0].ended_ns, None);
        assert!(trace.runs[0].overlaps(2_000_000_000, 3_000_000_000));
    }
}
