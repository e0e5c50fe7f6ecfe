//! Processes that end, nodes that lose their power, and agents that begin again.

use slackwater_handover::Reason;
use slackwater_handover::destination::{self, Destination};
use slackwater_handover::policy::Driver;
use slackwater_handover::source::{self, Source};
use slackwater_handover::state::MigrationState;

use crate::carry::failure;
use crate::world::{Config, Process, Side, World};

impl World {
    pub(crate) fn crash(&mut self, side: Side) {
        self.hang_up(side);
        match side {
            Side::Source => self.source.crash(),
            Side::Destination => self.destination.crash(),
        }
    }

    /// An agent begins again, from its journal and from what it finds.
    pub(crate) fn restart(&mut self, config: &Config, side: Side) {
        let restarted = failure(Reason::AgentRestarted);
        self.say(side);
        match side {
            Side::Source => {
                self.source.up = true;
                let Some(line) = self.source.journal.filter(|line| line.ended.is_none()) else { return };
                let gone = self.source.vmm != Process::Alive;
                let found = if gone { Vec::new() } else { found(&self.source.devices) };
                self.source.attempt = line.attempt;
                let found =
                    source::Found { record: line.record, devices: found, vmm_gone: gone, failure: restarted };
                let machine = Source::recover(&config.features(), Config::plan(), Driver::Agent, found);
                self.source.machine = Some(machine);
                self.tell_source(config, source::Event::Start);
            }
            Side::Destination => {
                self.destination.up = true;
                let Some(line) = self.destination.journal.filter(|line| line.ended.is_none()) else { return };
                let there = self.destination.vmm == Process::Alive;
                let found = if there { found(&self.destination.devices) } else { Vec::new() };
                self.destination.attempt = line.attempt;
                let found = destination::Found {
                    record: line.record,
                    devices: found,
                    twin_there: there,
                    failure: restarted,
                };
                self.destination.machine =
                    Some(Destination::recover(&config.features(), Driver::Agent, found));
                self.tell_destination(config, destination::Event::Start);
            }
        }
    }

    /// All that was in the node's memory is gone, and its devices begin anew.
    pub(crate) fn power_off(&mut self, side: Side) {
        self.crash(side);
        match side {
            Side::Source => self.source.power_off(),
            Side::Destination => {
                self.twin_died |= self.destination.vmm == Process::Alive;
                self.destination.power_off();
            }
        }
    }

    pub(crate) fn kill(&mut self, config: &Config, side: Side) {
        match side {
            Side::Source => {
                self.source.vmm = Process::Died;
                self.source.runs = false;
                self.tell_source(config, source::Event::VmmExited);
            }
            Side::Destination => {
                self.destination.vmm = Process::Died;
                self.destination.runs = false;
                self.twin_died = true;
                self.tell_destination(config, destination::Event::Failed(failure(Reason::TwinFailed)));
            }
        }
    }
}

fn found(devices: &[MigrationState]) -> Vec<Option<MigrationState>> {
    devices.iter().copied().map(Some).collect()
}
