//! What the model knows of: two nodes with their agents, journals, VMMs and devices, one stream between the agents, and all that was
//! ever said outside it.

use std::collections::BTreeSet;

use slackwater_handover::destination::{self, Destination};
use slackwater_handover::policy::StopPlan;
use slackwater_handover::source::{self, Source};
use slackwater_handover::state::{Features, MigrationState};
use slackwater_handover::{Blob, Record};

use crate::mutants::Mutant;
use crate::operator::{Operator, Statements};
use crate::properties::Rule;

/// Which node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// How large the world is, and how much may go wrong in it.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub devices: usize,
    /// Crashes, processes that end, steps and writes that fail, together. Broken streams, deadlines and silence come on top.
    pub faults: u8,
    pub attempts: u32,
    /// Words that settle nothing are delivered, too, as are silence and delay of the peer: they only change what is told.
    pub doubts: bool,
    /// S and D have one stream, and nothing else: what settles it comes by the operator's resolver.
    pub relayed: bool,
    /// How often a node loses its power.
    pub power: u8,
    /// What an administrator may state then.
    pub statements: Statements,
    pub mutant: Option<Mutant>,
}

impl Config {
    pub(crate) fn features(&self) -> Vec<Features> {
        vec![Features::ALL; self.devices]
    }

    pub(crate) fn plan() -> StopPlan {
        StopPlan::QuiesceFirst
    }
}

/// What stands in a journal's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Line {
    pub attempt: u32,
    pub record: Record,
    /// How it ended, where nothing goes on any more. (At D: Stuck is STARTING that has ended.)
    pub ended: Option<Ended>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ended {
    /// S is released, D runs.
    Succeeded,
    /// S: nothing had been touched.
    Refused,
    RolledBack,
    Discarded,
    /// S: the VM runs nowhere. D: it could not be started.
    Lost,
}

/// The VMM at S, or the twin at D.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Process {
    /// None has been started, or it was ended in order.
    None,
    Alive,
    Died,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct End<Machine, Effect> {
    /// The agent's process is there.
    pub up: bool,
    /// The node is.
    pub off: bool,
    /// The attempt of the machine.
    pub attempt: u32,
    pub machine: Option<Machine>,
    /// Effects that have begun and not ended.
    pub todo: Vec<Effect>,
    /// What is on the disk. The agent tells this, or what it knew before a write that failed: see [`Self::told`].
    pub journal: Option<Line>,
    /// A write has failed, and what it should have written stands all the same: until the agent begins again it tells this.
    pub told: Option<Line>,
    pub vmm: Process,
    /// vCPUs run.
    pub runs: bool,
    pub devices: Vec<MigrationState>,
}

impl<Machine, Effect> End<Machine, Effect> {
    /// What the agent says stands in its journal.
    pub(crate) fn word(&self) -> Option<Line> {
        self.told.or(self.journal)
    }

    pub(crate) fn has_recorded(&self, attempt: u32, record: Record) -> bool {
        self.journal.is_some_and(|line| line.attempt == attempt && line.record == record)
    }

    /// The end of an attempt is journalled, where anything of it is.
    pub(crate) fn finish(&mut self, ended: Ended) {
        let attempt = self.attempt;
        if let Some(line) = self.journal.as_mut().filter(|line| line.attempt == attempt) {
            line.ended = Some(ended);
            self.told = None;
        }
    }

    /// The node's power is cut. See [`Self::crash`].
    pub(crate) fn power_off(&mut self) {
        self.off = true;
        if self.vmm == Process::Alive {
            self.vmm = Process::Died;
        }
        self.runs = false;
        self.devices.fill(MigrationState::Running);
    }

    /// The agent's process ends, and all that it alone knew.
    pub(crate) fn crash(&mut self) {
        self.up = false;
        self.machine = None;
        self.todo.clear();
        self.told = None;
    }
}

pub(crate) type SourceEnd = End<Source, source::Effect>;
pub(crate) type DestinationEnd = End<Destination, destination::Effect>;

/// From S to D, on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Forth {
    Hello,
    /// A whole blob, and whether its digest will be found right.
    Blob(Blob, bool),
    Commit,
    Abort,
}

/// From D to S, on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Back {
    Ready,
    Verified(Blob),
    Loaded,
    Starting,
    Started,
    /// D gives up, or could not start.
    Failed {
        started: bool,
    },
}

/// What lies between the agents, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stream {
    pub attempt: u32,
    /// Broken: what is on its way may still arrive, or be lost with all that follows.
    pub cut: bool,
    /// None: who reads here has heard that it is broken, or is gone.
    pub forth: Option<Vec<Forth>>,
    pub back: Option<Vec<Back>>,
}

/// Something said outside the stream: a question of S, D's answer, or either relayed by the operator. Once it could have been said it
/// may arrive at any time, late, again, or never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Said {
    /// To S: what D has journalled.
    ToSource { attempt: u32, record: Record, ended: bool },
    /// To D: what S has journalled.
    ToDestination { attempt: u32, record: Record },
    /// To D, by the operator: S has reported that the attempt is over and the VM stays there.
    Release { attempt: u32 },
}

/// All there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    /// The operator's, written to the status before it is used.
    pub attempt: u32,
    /// The last attempt of which the operator has heard that D holds everything ready.
    pub reserved: u32,
    pub source: SourceEnd,
    pub destination: DestinationEnd,
    pub stream: Option<Stream>,
    pub said: BTreeSet<Said>,
    /// There can be no stream between the agents any more.
    pub link_down: bool,
    pub operator: Operator,
    /// Blobs that D has found whole, in this attempt.
    pub verified: BTreeSet<Blob>,
    /// LOADED has been durable at D in this attempt.
    pub loaded: bool,
    /// The last attempt in which S woke something; 0: none.
    pub woken: u32,
    /// STARTING has been recorded at D, or something has been started there.
    pub has_started: bool,
    pub faults_left: u8,
    pub power_left: u8,
    /// A twin's process has ended by itself.
    pub twin_died: bool,
    /// Where a device step has failed.
    pub device_fault: Option<Side>,
    /// Where a write has failed.
    pub write_fault: Option<Side>,
    /// The rules that have been broken on the way here.
    pub broken: BTreeSet<Rule>,
}

impl World {
    /// The VM runs at S, and nothing has been asked of anybody.
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            attempt: 1,
            reserved: 0,
            source: End {
                up: true,
                off: false,
                attempt: 0,
                machine: None,
                todo: Vec::new(),
                journal: None,
                told: None,
                vmm: Process::Alive,
                runs: true,
                devices: vec![MigrationState::Running; config.devices],
            },
            destination: End {
                up: true,
                off: false,
                attempt: 0,
                machine: None,
                todo: Vec::new(),
                journal: None,
                told: None,
                vmm: Process::None,
                runs: false,
                devices: vec![MigrationState::Running; config.devices],
            },
            stream: None,
            said: BTreeSet::new(),
            link_down: false,
            operator: Operator::default(),
            verified: BTreeSet::new(),
            loaded: false,
            woken: 0,
            has_started: false,
            faults_left: config.faults,
            power_left: config.power,
            twin_died: false,
            device_fault: None,
            write_fault: None,
            broken: BTreeSet::new(),
        }
    }

    /// Cuts the stream, if there is one.
    pub(crate) fn cut(&mut self) {
        if let Some(stream) = &mut self.stream {
            stream.cut = true;
        }
    }

    /// Who reads here does not any more.
    pub(crate) fn hang_up(&mut self, side: Side) {
        if let Some(stream) = &mut self.stream {
            stream.cut = true;
            match side {
                Side::Source => stream.back = None,
                Side::Destination => stream.forth = None,
            }
            if stream.back.is_none() && stream.forth.is_none() {
                self.stream = None;
            }
        }
    }

    pub(crate) fn send_forth(&mut self, attempt: u32, message: Forth) {
        if let Some(Stream { cut: false, forth: Some(queue), attempt: of, .. }) = &mut self.stream
            && *of == attempt
        {
            queue.push(message);
        }
    }

    pub(crate) fn send_back(&mut self, attempt: u32, message: Back) {
        if let Some(Stream { cut: false, back: Some(queue), attempt: of, .. }) = &mut self.stream
            && *of == attempt
        {
            queue.push(message);
        }
    }
}
