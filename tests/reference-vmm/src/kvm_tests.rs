//! The guest on a real KVM, with fake devices. Without /dev/kvm these tests are skipped and print so;
//! the end-to-end tests run the same guest in a node of the lab, which always has one.

use std::time::Duration;

use super::*;
use crate::bus::Registers;
use crate::bus::tests::FakeUart;
use crate::guest::{MIN_RAM_BYTES, Report};

/// A VM and what it is made of.
struct Vm {
    machine: KvmMachine,
    ram: Arc<GuestRam>,
    uarts: Vec<Arc<FakeUart>>,
}

impl Vm {
    /// `None` where there is no KVM.
    fn new(devices: usize) -> Option<Self> {
        if let Err(error) = Kvm::new() {
            eprintln!("skipped: no /dev/kvm here ({error})");
            return None;
        }
        let ram = Arc::new(GuestRam::new(MIN_RAM_BYTES).unwrap());
        let uarts: Vec<_> = (0..devices).map(|_| Arc::new(FakeUart::default())).collect();
        let bus = PortBus::new(uarts.iter().map(|uart| uart.clone() as Arc<dyn Registers>).collect());
        let machine = KvmMachine::new(ram.clone(), bus).unwrap();
        Some(Self { machine, ram, uarts })
    }

    fn fresh(devices: usize) -> Option<Self> {
        let mut vm = Self::new(devices)?;
        vm.machine.set_up_guest(devices as u16).unwrap();
        Some(vm)
    }

    fn report(&self) -> Report {
        Report::read(|gpa, bytes| self.ram.read(gpa, bytes)).unwrap()
    }

    fn run(&mut self, steps: u32) {
        for _ in 0..steps {
            self.machine.step().unwrap();
        }
    }

    fn run_until_count(&mut self, count: u64) {
        while self.report().count < count {
            self.machine.step().unwrap();
        }
    }

    fn copy_ram(&self, to: &Self) {
        let mut bytes = vec![0; MIN_RAM_BYTES as usize];
        self.ram.read(0, &mut bytes).unwrap();
        to.ram.write(0, &bytes).unwrap();
    }

    fn copy_registers(&self, to: &Self) {
        for (from, to) in self.uarts.iter().zip(&to.uarts) {
            *to.0.lock().unwrap() = *from.0.lock().unwrap();
        }
    }
}

#[test]
fn the_guest_counts_and_finds_no_error() {
    let Some(mut vm) = Vm::fresh(3) else { return };
    vm.run_until_count(600);
    let report = vm.report();
    assert_eq!(report.errors, 0, "{report:?}");
    assert_eq!(report.devices.len(), 3);
    for device in report.devices {
        assert!([600_u64 as u8, 599_u64 as u8].contains(&device.register));
    }
}

#[test]
fn a_new_guest_ignores_what_its_devices_held_before() {
    let Some(mut vm) = Vm::fresh(2) else { return };
    vm.uarts[1].0.lock().unwrap().registers[7] = 0x5a;
    vm.run_until_count(10);
    assert_eq!(vm.report().errors, 0);
}

#[test]
fn the_guest_finds_a_register_that_changed_and_goes_on() {
    let Some(mut vm) = Vm::fresh(2) else { return };
    vm.run_until_count(10);
    while vm.machine.step().unwrap() != Step::Idle {}
    vm.uarts[1].0.lock().unwrap().registers[7] ^= 1;
    vm.run_until_count(20);
    let report = vm.report();
    assert_eq!((report.errors, report.devices[0].errors, report.devices[1].errors), (1, 0, 1));
}

#[test]
fn the_guest_finds_a_page_that_changed() {
    let Some(mut vm) = Vm::fresh(1) else { return };
    vm.run_until_count(300);
    vm.ram.write(0x1_0000 + 77 * 4096, &[0xff]).unwrap();
    vm.run_until_count(500);
    let report = vm.report();
    assert_eq!((report.errors, report.ram_errors), (1, 1));
}

#[test]
fn the_count_carries_into_its_upper_half() {
    let Some(mut vm) = Vm::fresh(1) else { return };
    vm.run_until_count(5);
    while vm.machine.step().unwrap() != Step::Idle {}
    // The low half of the count is what registers and stamps are compared with, so they go wrong once and
    // twice.
    vm.ram.write(0x2010, &0xffff_fff0_u32.to_le_bytes()).unwrap();
    vm.run_until_count(0x1_0000_0010);
    assert_eq!(vm.report().count >> 32, 1);
}

#[test]
fn a_vm_that_moves_at_any_port_access_loses_and_repeats_nothing() {
    let Some(mut vm) = Vm::fresh(2) else { return };
    let mut count = 0;
    // Steps between the moves that leave the guest at every one of its port accesses in turn.
    for round in 0..60 {
        vm.run(20 + round % 13);
        vm.machine.settle().unwrap();
        let state = vm.machine.state().unwrap();
        let mut next = Vm::new(2).unwrap();
        vm.copy_ram(&next);
        vm.copy_registers(&next);
        next.machine.restore(&state).unwrap();
        assert!(next.report().count >= count, "the count went back");
        count = next.report().count;
        vm = next;
    }
    while vm.machine.step().unwrap() != Step::Idle {}
    let report = vm.report();
    assert_eq!(report.errors, 0, "{report:?}");
    // A register that keeps its value does not show a repeated access. Other devices do.
    for uart in &vm.uarts {
        let uart = *uart.0.lock().unwrap();
        assert_eq!(
            (uart.reads, uart.writes),
            (2 * report.count, report.count + 1),
            "two reads and a write a round"
        );
    }
}

#[test]
fn a_vm_that_moves_without_its_devices_state_finds_errors() {
    let Some(mut vm) = Vm::fresh(2) else { return };
    vm.run_until_count(40);
    while vm.machine.step().unwrap() != Step::Idle {}
    vm.machine.settle().unwrap();
    let mut next = Vm::new(2).unwrap();
    vm.copy_ram(&next);
    next.machine.restore(&vm.machine.state().unwrap()).unwrap();
    next.run_until_count(vm.report().count + 10);
    let report = next.report();
    assert_eq!((report.devices[0].errors, report.devices[1].errors), (1, 1));
}

#[test]
fn a_settled_machine_has_not_run_further() {
    let Some(mut vm) = Vm::fresh(2) else { return };
    vm.run(333);
    vm.machine.settle().unwrap();
    let (regs, report) = (vm.machine.state().unwrap().regs, vm.report());
    vm.machine.settle().unwrap();
    assert_eq!((vm.machine.state().unwrap().regs, vm.report()), (regs, report));
}

#[tokio::test]
async fn a_thread_runs_the_machine_at_the_guests_pace() {
    let Some(vm) = Vm::fresh(2) else { return };
    let ram = vm.ram.clone();
    let count = || Report::read(|gpa, bytes| ram.read(gpa, bytes)).unwrap().count;
    let vcpu = crate::vcpu::Vcpu::spawn(vm.machine, Duration::from_secs(3600)).unwrap();
    vcpu.resume().await.unwrap();
    while count() < 1 {
        tokio::task::yield_now().await;
    }
    vcpu.pause().await.unwrap();
    assert_eq!(count(), 1, "the first round ends with an idle hour");
    vcpu.stop().await;
}
