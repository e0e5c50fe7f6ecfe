//! Processes that end, nodes that lose their power, and agents that restart.

use slackwater_handover::destination::{self, Destination};
use slackwater_handover::source::{self, Source};
use slackwater_handover::state::MigrationState;
use slackwater_handover::{Reason, Record};

use crate::effects::{How, failure};
use crate::mutants::Mutant;
use crate::world::{Config, Device, Line, Process, Save, Side, World};

impl World {
    pub(crate) fn crash(&mut self, config: &Config, side: Side) {
        self.hang_up(side);
        self.unstick(side);
        match side {
            Side::Source => {
                // The VMM's stream ends with the agent.
                self.give_save_up(config);
                self.source.crash();
            }
            Side::Destination => self.destination.crash(),
        }
    }

    /// An agent restarts, from its journal and from what it finds.
    pub(crate) fn restart(&mut self, config: &Config, side: Side) {
        let restarted = failure(Reason::AgentRestarted);
        self.say(side);
        match side {
            Side::Source => {
                self.source.up = true;
                if let Some(forgotten) = self.source.forgotten
                    && Line::is_open(&self.source.journal)
                {
                    if !Mutant::acts_on_all(config.mutant) {
                        return;
                    }
                    self.act_on_forgotten(config, forgotten);
                }
                let Some(line) = self.source.journal.filter(|line| line.ended.is_none()) else { return };
                let vmm_gone = self.source.vmm != Process::Alive;
                let devices = if vmm_gone { Vec::new() } else { found(&self.source.devices) };
                self.source.attempt = line.attempt;
                if Mutant::wakes_at_restart(config.mutant) && line.record == Record::Saving && !vmm_gone {
                    self.source.devices.fill(Device::RUNNING);
                    self.source.runs = true;
                    self.wake();
                }
                let found = source::Found { record: line.record, devices, vmm_gone, failure: restarted };
                let machine = Source::recover(&config.features, config.plan, config.driver, found);
                self.source.machine = Some(machine);
                self.source_event(config, source::Event::Start);
            }
            Side::Destination => {
                self.destination.up = true;
                let Some(line) = self.destination.journal.filter(|line| line.ended.is_none()) else { return };
                let twin_there = self.destination.vmm == Process::Alive;
                let devices = if twin_there { found(&self.destination.devices) } else { Vec::new() };
                self.destination.attempt = line.attempt;
                let found =
                    destination::Found { record: line.record, devices, twin_there, failure: restarted };
                let machine = Destination::recover(&config.features, config.driver, found);
                self.destination.machine = Some(machine);
                self.destination_event(config, destination::Event::Start);
            }
        }
    }

    /// Takes up an earlier migration's journal besides the current one, and brings it to its end.
    fn act_on_forgotten(&mut self, config: &Config, forgotten: Line) {
        let current = self.source.journal.replace(forgotten);
        let vmm_gone = self.source.vmm != Process::Alive;
        let devices = if vmm_gone { Vec::new() } else { found(&self.source.devices) };
        let restarted = failure(Reason::AgentRestarted);
        let found = source::Found { record: forgotten.record, devices, vmm_gone, failure: restarted };
        self.source.attempt = forgotten.attempt;
        let machine = Source::recover(&config.features, config.plan, config.driver, found);
        self.source.machine = Some(machine);
        self.source_event(config, source::Event::Start);
        while !self.source.todo.is_empty() {
            self.perform_at_source(config, 0, How::Well);
        }
        self.source.forgotten = None;
        self.source.journal = current;
    }

    /// All that was in the node's memory is gone, and its devices start anew.
    pub(crate) fn power_off(&mut self, config: &Config, side: Side) {
        match side {
            Side::Source => {
                self.hang_up(side);
                self.unstick(side);
                self.save = Save::None;
                self.source.crash();
                self.source.power_off();
            }
            Side::Destination => {
                self.crash(config, side);
                self.twin_died |= self.destination.vmm == Process::Alive;
                self.destination.power_off();
            }
        }
    }

    /// The process that holds the VM on this side ends.
    pub(crate) fn kill(&mut self, config: &Config, side: Side) {
        match side {
            Side::Source => {
                self.source.vmm = Process::Died;
                self.source.runs = false;
                self.save = Save::None;
                self.source_event(config, source::Event::VmmExited);
            }
            Side::Destination => {
                self.destination.vmm = Process::Died;
                self.destination.runs = false;
                self.twin_died = true;
                let event = destination::Event::Failed(failure(Reason::TwinFailed));
                self.destination_event(config, event);
            }
        }
    }
}

fn found(devices: &[Device]) -> Vec<Option<MigrationState>> {
    devices.iter().map(|device| Some(device.at)).collect()
}
