//! What the model knows: two nodes with their agents, journals, VMMs and devices, one stream between the
//! agents, all that was ever said outside it, and what an earlier migration of the same VM has left open.

use std::collections::BTreeSet;

use slackwater_handover::destination::{self, Destination};
use slackwater_handover::policy::{Driver, StopPlan};
use slackwater_handover::source::{self, Source};
use slackwater_handover::state::{Features, MigrationState};
use slackwater_handover::{Blob, Record};

use crate::mutants::Mutant;
use crate::operator::{Operator, Statements};
use crate::properties::Rule;

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// How large the world is, and how much may go wrong in it.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Of each device of the VM.
    pub features: Vec<Features>,
    pub plan: StopPlan,
    pub driver: Driver,
    /// Crashes, processes that end, steps and writes that fail, together. Broken streams, deadlines and
    /// silence come on top.
    pub faults: u8,
    /// Calls to a VMM, the connection, reads and a saved VMM's last byte may fail, too. They count as faults.
    pub calls_fail: bool,
    /// The VMM says some time after its last byte that its save has ended; else at once.
    pub late_save: bool,
    pub attempts: u32,
    /// Whether the VM is migrated once more while the first migration is still open in one of its journals.
    pub again: Again,
    /// Words that settle nothing are delivered, too, as are silence and delay of the peer: they change only
    /// what is shown.
    pub doubts: bool,
    /// The ends have one stream, and nothing else: what settles it comes by the operator's resolver.
    pub relayed: bool,
    /// How often a node loses its power.
    pub power: u8,
    /// A call to a device may take longer than it should, and may never return. That counts as a fault.
    pub hangs: bool,
    /// The guest resets a device whose initial data is being read, or has been. That counts as a fault.
    pub resets: bool,
    /// What an administrator may state then.
    pub statements: Statements,
    pub mutant: Option<Mutant>,
}

/// A second migration of the same VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    Never,
    /// It begins at any time after the first.
    Later,
    /// The world begins with it, and with what the first has left open: a destination, or a source.
    FromTheStart,
    /// The world begins when it has committed, and the end of the first is not in the journal of the source:
    /// only a broken protocol comes there.
    BeforeTheEnd,
}

impl Config {
    /// How many blobs make up the VM's state.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = Blob> {
        slackwater_handover::blobs(self.driver.device_blobs(self.features.len()))
    }

    pub(crate) fn new_source(&self) -> Source {
        Source::new(&self.features, self.plan, self.driver)
    }

    pub(crate) fn new_destination(&self) -> Destination {
        Destination::new(&self.features, self.driver)
    }
}

/// What a journal's file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Line {
    pub attempt: u32,
    pub record: Record,
    /// How it ended, if it has. (At the destination: Stuck is STARTING that has ended.)
    pub ended: Option<Ended>,
}

impl Line {
    /// The attempt goes on.
    pub(crate) fn is_open(line: &Option<Self>) -> bool {
        line.is_some_and(|line| line.ended.is_none())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ended {
    /// The source is released, the destination runs.
    Succeeded,
    /// Source: nothing had been touched.
    Refused,
    RolledBack,
    Discarded,
    /// Source: the VM runs nowhere. Destination: it could not be started.
    Lost,
}

/// The VMM at the source, or the twin at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Process {
    /// None has been started, or it was ended in order.
    None,
    Alive,
    Died,
}

/// The save of the source's VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Save {
    /// Not begun, or given up.
    None,
    Active,
    /// Its last byte has been sent. The VMM has not said that the save has ended, and may still give it up.
    Draining,
    Finished,
}

/// A device as the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device {
    pub at: MigrationState,
    /// It has been in a P2P state since it last ran.
    pub quiesced: bool,
    /// It has been in STOP since it last ran.
    pub stopped: bool,
    /// It failed on its way back: it takes no part in the barriers any more, and is reset.
    pub refused: bool,
    /// It has not returned in its time from a call that takes it to this state, or only reads it.
    pub hangs: Option<MigrationState>,
    /// It has hung, and got to STOP_COPY when the others were on their way back already.
    pub late: bool,
    /// It had been asked for RUNNING already when another one hung.
    pub sent_to_run: bool,
    /// What has been sent of it came from a session that a reset has ended.
    pub two_sessions: bool,
}

impl Device {
    pub(crate) const RUNNING: Self = Self {
        at: MigrationState::Running,
        quiesced: false,
        stopped: false,
        refused: false,
        hangs: None,
        late: false,
        sent_to_run: false,
        two_sessions: false,
    };

    /// It has got to `to`.
    pub(crate) fn moved(self, to: MigrationState) -> Self {
        match to {
            MigrationState::Running => {
                Self { refused: self.refused, two_sessions: self.two_sessions, ..Self::RUNNING }
            }
            at => Self {
                at,
                quiesced: self.quiesced || at.is_p2p(),
                stopped: self.stopped || at == MigrationState::Stop,
                refused: self.refused,
                hangs: None,
                late: self.late && at == MigrationState::StopCopy,
                sent_to_run: false,
                two_sessions: self.two_sessions,
            },
        }
    }
}

/// One end.
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
    /// What is on the disk. The agent shows this, or what it knew before a write that failed: see
    /// [`Self::word`].
    pub journal: Option<Line>,
    /// A write has failed although the disk holds what it wrote: until the agent restarts it shows this
    /// instead.
    pub shown: Option<Line>,
    /// The attempt has ended, and that could not be written yet. The VM and its devices stay held.
    pub unrecorded: Option<Ended>,
    /// An open journal of an earlier migration of the same VM on this node.
    pub forgotten: Option<Line>,
    pub vmm: Process,
    /// vCPUs run.
    pub runs: bool,
    pub devices: Vec<Device>,
}

impl<Machine, Effect> End<Machine, Effect> {
    /// A node without a process of the VM.
    pub(crate) fn without_vm(devices: usize) -> Self {
        Self {
            up: true,
            off: false,
            attempt: 0,
            machine: None,
            todo: Vec::new(),
            journal: None,
            shown: None,
            unrecorded: None,
            forgotten: None,
            vmm: Process::None,
            runs: false,
            devices: vec![Device::RUNNING; devices],
        }
    }

    /// What the agent says that its journal holds.
    pub(crate) fn word(&self) -> Option<Line> {
        self.shown.or(self.journal)
    }

    pub(crate) fn has_recorded(&self, attempt: u32, record: Record) -> bool {
        self.journal.is_some_and(|line| line.attempt == attempt && line.record == record)
    }

    /// Every device is in RUNNING.
    pub(crate) fn devices_run(&self) -> bool {
        self.devices.iter().all(|device| device.at == MigrationState::Running)
    }

    /// Journals the end of an attempt, if the journal has anything of it.
    pub(crate) fn finish(&mut self, ended: Ended) {
        let attempt = self.attempt;
        if let Some(line) = self.journal.as_mut().filter(|line| line.attempt == attempt) {
            line.ended = Some(ended);
            self.shown = None;
        }
        self.unrecorded = None;
    }

    /// The end cannot be written for now. The agent says all the same that the attempt has ended.
    pub(crate) fn fail_to_finish(&mut self, ended: Ended) {
        let attempt = self.attempt;
        if let Some(line) = self.journal.filter(|line| line.attempt == attempt) {
            self.shown = Some(Line { ended: Some(ended), ..self.shown.unwrap_or(line) });
            self.unrecorded = Some(ended);
        }
    }

    /// Cuts the node's power. See [`Self::crash`].
    pub(crate) fn power_off(&mut self) {
        self.off = true;
        if self.vmm == Process::Alive {
            self.vmm = Process::Died;
        }
        self.runs = false;
        self.devices.fill(Device::RUNNING);
    }

    /// Ends the agent's process, and with it all that it alone knew.
    pub(crate) fn crash(&mut self) {
        self.up = false;
        self.machine = None;
        self.todo.clear();
        self.shown = None;
        self.unrecorded = None;
    }
}

pub(crate) type SourceEnd = End<Source, source::Effect>;
pub(crate) type DestinationEnd = End<Destination, destination::Effect>;

/// The end that an earlier migration of the same VM has left open, on a node that the new one does not use.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LeftOver {
    /// It has committed and does not know yet that the VM runs at its destination.
    Source(SourceEnd),
    /// It holds a reservation, or a whole copy, that its source has taken back.
    Destination { end: DestinationEnd, verified: BTreeSet<Blob>, loaded: bool },
}

impl LeftOver {
    pub(crate) fn side(&self) -> Side {
        match self {
            Self::Source(_) => Side::Source,
            Self::Destination { .. } => Side::Destination,
        }
    }

    pub(crate) fn runs(&self) -> bool {
        match self {
            Self::Source(end) => end.runs,
            Self::Destination { end, .. } => end.runs,
        }
    }

    pub(crate) fn journal(&self) -> Option<Line> {
        match self {
            Self::Source(end) => end.journal,
            Self::Destination { end, .. } => end.journal,
        }
    }
}

/// From the source to the destination, on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Forth {
    Hello,
    /// A whole blob, and whether its digest will be found right.
    Blob(Blob, bool),
    Commit,
    Abort,
}

/// From the destination to the source, on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Back {
    Ready,
    Verified(Blob),
    Loaded,
    Starting,
    Started,
    /// The destination gives up, or could not start.
    Failed {
        started: bool,
    },
}

/// What is between the agents, in order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stream {
    pub attempt: u32,
    /// Broken: what is on its way may still arrive, or be lost with all that follows.
    pub cut: bool,
    /// None: the reader has noticed that it is broken, or is gone.
    pub forth: Option<Vec<Forth>>,
    pub back: Option<Vec<Back>>,
}

/// Something said outside the stream: a question of the source, the destination's answer, or either relayed
/// by the operator. Once it could have been said it may arrive at any time, late, again, or never. The
/// attempt stands for the migration and its attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Said {
    /// To the source: what the destination has journalled.
    ToSource { attempt: u32, record: Record, ended: bool },
    /// To the destination: what the source has journalled.
    ToDestination { attempt: u32, record: Record },
    /// To the destination, by the operator: the source has reported that the attempt is over and the VM stays
    /// there.
    Release { attempt: u32 },
}

/// All there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    /// The operator's, written to the status before it is used.
    pub attempt: u32,
    /// The last attempt of which the operator has heard that the destination holds everything ready.
    pub reserved: u32,
    pub source: SourceEnd,
    pub destination: DestinationEnd,
    pub left_over: Option<LeftOver>,
    pub save: Save,
    pub stream: Option<Stream>,
    pub said: BTreeSet<Said>,
    /// There can be no stream between the agents any more.
    pub link_down: bool,
    pub operator: Operator,
    /// Blobs that the destination has found whole, in this attempt.
    pub verified: BTreeSet<Blob>,
    /// LOADED has been durable at the destination in this attempt.
    pub loaded: bool,
    /// The last attempt in which the source woke something; 0: none.
    pub woken: u32,
    /// The attempts in which STARTING was recorded, or something was started, at the destination.
    pub started: BTreeSet<u32>,
    pub faults_left: u8,
    pub power_left: u8,
    /// The device whose call hangs: one at most.
    pub stuck: Option<(Side, usize)>,
    /// A twin's process has ended by itself.
    pub twin_died: bool,
    /// Where a device step has failed.
    pub device_fault: Option<Side>,
    /// Where a write has failed.
    pub write_fault: Option<Side>,
    /// Where a call has failed.
    pub call_fault: Option<Side>,
    /// The rules that have been broken on the way here.
    pub broken: BTreeSet<Rule>,
}

impl World {
    /// The VM runs at the source, and nothing has been asked of either agent.
    pub(crate) fn new(config: &Config) -> Self {
        let devices = config.features.len();
        Self {
            attempt: 1,
            reserved: 0,
            source: End { vmm: Process::Alive, runs: true, ..End::without_vm(devices) },
            destination: End::without_vm(devices),
            left_over: None,
            save: Save::None,
            stream: None,
            said: BTreeSet::new(),
            link_down: false,
            operator: Operator::default(),
            verified: BTreeSet::new(),
            loaded: false,
            woken: 0,
            started: BTreeSet::new(),
            faults_left: config.faults,
            power_left: config.power,
            stuck: None,
            twin_died: false,
            device_fault: None,
            write_fault: None,
            call_fault: None,
            broken: BTreeSet::new(),
        }
    }

    /// How many copies of the VM run.
    pub(crate) fn runners(&self) -> usize {
        [self.source.runs, self.destination.runs, self.left_over.as_ref().is_some_and(LeftOver::runs)]
            .into_iter()
            .filter(|runs| *runs)
            .count()
    }

    /// The destination has started the VM in the attempt of the source, or in a later one: the source's copy
    /// is dead.
    pub(crate) fn source_is_dead(&self) -> bool {
        self.started.last().is_some_and(|started| *started >= self.source.attempt)
    }

    /// The left-over end takes the place of the current end of its side, or gives it back.
    pub(crate) fn swap_left_over(&mut self) {
        match &mut self.left_over {
            Some(LeftOver::Source(end)) => std::mem::swap(end, &mut self.source),
            Some(LeftOver::Destination { end, verified, loaded }) => {
                std::mem::swap(end, &mut self.destination);
                std::mem::swap(verified, &mut self.verified);
                std::mem::swap(loaded, &mut self.loaded);
            }
            None => {}
        }
    }

    /// The call to the device that hangs returns, or ends with whoever made it.
    pub(crate) fn unstick(&mut self, side: Side) {
        if let Some((at, index)) = self.stuck
            && at == side
        {
            self.stuck = None;
            let devices = match side {
                Side::Source => &mut self.source.devices,
                Side::Destination => &mut self.destination.devices,
            };
            devices[index].hangs = None;
        }
    }

    /// Cuts the stream, if there is one.
    pub(crate) fn cut(&mut self) {
        if let Some(stream) = &mut self.stream {
            stream.cut = true;
        }
    }

    /// The reader at this side stops reading.
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
