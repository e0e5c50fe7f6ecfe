//! Traces written by hand, for the tests of the invariants. Times are nanoseconds; an arc takes one.

use std::collections::BTreeMap;

use crate::{
    node::{ClockReading, ClockRelation},
    witness::{
        state::State,
        trace::{Access, AccessKind, Change, Run, Trace, VcpuTrace},
    },
};

/// Builds a trace for a test.
pub(super) struct TraceBuilder {
    trace: Trace,
    now_ns: u64,
}

impl TraceBuilder {
    pub(super) fn new(node: &str) -> Self {
        let trace = Trace {
            node: node.to_owned(),
            clock: ClockRelation::exact(),
            devices: BTreeMap::new(),
            vcpus: VcpuTrace::default(),
        };
        Self { trace, now_ns: 0 }
    }

    /// When the next arcs begin.
    pub(super) fn at(mut self, ns: u64) -> Self {
        self.now_ns = ns;
        self
    }

    /// Leads each of the devices, all at the same time, through the states.
    pub(super) fn arcs(mut self, devices: &[&str], path: &[State]) -> Self {
        for device in devices {
            for (index, pair) in path.windows(2).enumerate() {
                let began_ns = self.now_ns + index as u64;
                self = self.arc(device, pair[0], Some(pair[1]), began_ns, began_ns + 1);
            }
        }
        self
    }

    /// One arc, or (without `to`) an attempt to stop that fails.
    pub(super) fn arc(
        mut self,
        device: &str,
        from: State,
        to: Option<State>,
        began_ns: u64,
        ended_ns: u64,
    ) -> Self {
        let wanted = to.unwrap_or(State::Stop);
        self.change(device, Change { from: Some(from), to, wanted, began_ns, ended_ns });
        self
    }

    /// An arc that fails.
    pub(super) fn attempt(
        mut self,
        device: &str,
        from: State,
        wanted: State,
        began_ns: u64,
        ended_ns: u64,
    ) -> Self {
        self.change(device, Change { from: Some(from), to: None, wanted, began_ns, ended_ns });
        self
    }

    pub(super) fn reset(mut self, device: &str, at_ns: u64) -> Self {
        let wanted = State::Running;
        self.change(
            device,
            Change { from: None, to: Some(wanted), wanted, began_ns: at_ns, ended_ns: at_ns },
        );
        self
    }

    fn change(&mut self, device: &str, change: Change) {
        let changes = &mut self.trace.devices.entry(device.to_owned()).or_default().changes;
        changes.push(change);
        changes.sort_by_key(|change| change.began_ns);
    }

    pub(super) fn read(mut self, device: &str, at_ns: u64, bytes: u64) -> Self {
        let accesses = &mut self.trace.devices.entry(device.to_owned()).or_default().accesses;
        accesses.push(Access { kind: AccessKind::Read, at_ns, bytes });
        self
    }

    /// A vCPU in KVM_RUN.
    pub(super) fn run(mut self, began_ns: u64, ended_ns: u64) -> Self {
        self.trace.vcpus.runs.push(Run { thread: 7, vcpu: 1, began_ns, ended_ns: Some(ended_ns) });
        self
    }

    /// A vCPU that does not come back.
    pub(super) fn run_on(mut self, began_ns: u64) -> Self {
        self.trace.vcpus.runs.push(Run { thread: 7, vcpu: 1, began_ns, ended_ns: None });
        self
    }

    pub(super) fn gap(mut self, from_ns: u64, to_ns: u64) -> Self {
        self.trace.vcpus.gap_ns = Some((from_ns, to_ns));
        self
    }

    pub(super) fn clock_error(mut self, error_ns: i64) -> Self {
        let reading = ClockReading { host_ns: 0, offset_ns: 0, error_ns };
        self.trace.clock = ClockRelation::between(reading, reading);
        self
    }

    pub(super) fn trace(&self) -> Trace {
        self.trace.clone()
    }
}
