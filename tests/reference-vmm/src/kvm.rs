//! The machine: KVM's VM, its vCPU and the ports behind it.

use std::sync::Arc;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data};
use kvm_ioctls::{Cap, Kvm, VcpuExit};

use super::bus::{PortBus, PortWrite};
use super::guest;
use super::machine_state::{MSRS, MachineState, StatePart};
use super::ram::GuestRam;
use super::sys::VmOnRam;
use super::vcpu::{Machine, MachineError, Step};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetUpError {
    /// KVM refused.
    #[error("KVM cannot {step}")]
    Kvm {
        /// The step that failed.
        step: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM cannot be made to complete a port access without running the guest.
    #[error("KVM lacks KVM_CAP_IMMEDIATE_EXIT (Linux 4.12)")]
    NoImmediateExit,
    /// RAM could not be written.
    #[error("cannot write the guest's program into its RAM")]
    WriteGuest(#[source] std::io::Error),
}

/// A VM with one vCPU, its RAM and its ports.
pub struct KvmMachine {
    vm: VmOnRam,
    bus: PortBus,
}

impl KvmMachine {
    /// A machine whose vCPU is in KVM's initial state: for [`Self::set_up_guest`], or [`Machine::restore`].
    ///
    /// # Errors
    /// If KVM does not provide one.
    pub fn new(ram: Arc<GuestRam>, bus: PortBus) -> Result<Self, SetUpError> {
        let failed = |step| move |source| SetUpError::Kvm { step, source };
        let kvm = Kvm::new().map_err(failed("be opened (/dev/kvm)"))?;
        if !kvm.check_extension(Cap::ImmediateExit) {
            return Err(SetUpError::NoImmediateExit);
        }
        let vm = kvm.create_vm().map_err(failed("create a VM"))?;
        // Where Intel's processors keep a task state segment for real mode: in a hole of the guest's address
        // space.
        vm.set_tss_address(0xfffb_d000).map_err(failed("set the address of a task state segment"))?;
        let mut vm = VmOnRam::new(vm, ram).map_err(failed("create a vCPU with memory"))?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("report the supported CPUID"))?;
        vm.vcpu().set_cpuid2(&cpuid).map_err(failed("set the CPUID"))?;
        Ok(Self { vm, bus })
    }

    /// Writes a fresh guest with `devices` devices into RAM, which must be zero, and sets the vCPU to its
    /// first instruction.
    ///
    /// # Errors
    /// If RAM cannot be written, or KVM refuses.
    pub fn set_up_guest(&mut self, devices: u16) -> Result<(), SetUpError> {
        for (gpa, bytes) in guest::image(devices) {
            self.vm.ram().write(gpa, &bytes).map_err(SetUpError::WriteGuest)?;
        }
        let failed = |step| move |source| SetUpError::Kvm { step, source };
        let vcpu = self.vm.vcpu();
        // After its reset a vCPU is in real mode, at the top of the address space. All data segments are at
        // 0.
        let mut sregs = vcpu.get_sregs().map_err(failed("read the system registers"))?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).map_err(failed("set the system registers"))?;
        let mut regs = vcpu.get_regs().map_err(failed("read the registers"))?;
        regs.rip = guest::CODE;
        // Bit 1 is always set; interrupts are off.
        regs.rflags = 1 << 1;
        vcpu.set_regs(&regs).map_err(failed("set the registers"))
    }

    /// Enters KVM_RUN once. `None`: it was interrupted.
    fn enter(&mut self) -> Result<Option<Step>, MachineError> {
        match self.vm.vcpu().run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                self.bus.read(port, data).map_err(MachineError::Access)?;
                Ok(Some(Step::Next))
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                match self.bus.write(port, data).map_err(MachineError::Access)? {
                    PortWrite::Register => Ok(Some(Step::Next)),
                    PortWrite::Pace => Ok(Some(Step::Idle)),
                }
            }
            Ok(VcpuExit::Intr) => Ok(None),
            Ok(exit) => Err(MachineError::UnexpectedExit { exit: format!("{exit:?}") }),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(None),
            Err(error) => Err(MachineError::Run(error)),
        }
    }
}

impl Machine for KvmMachine {
    fn step(&mut self) -> Result<Step, MachineError> {
        Ok(self.enter()?.unwrap_or(Step::Next))
    }

    fn settle(&mut self) -> Result<(), MachineError> {
        // KVM completes a port access only when KVM_RUN is entered again (Documentation/virt/kvm/api.rst,
        // KVM_EXIT_IO): before that an IN's data is not in the registers, and the instruction pointer may be
        // before or after the access. With immediate_exit it does so, and comes back with EINTR without
        // running the guest. One instruction may have several accesses, hence the loop.
        self.vm.vcpu().set_kvm_immediate_exit(1);
        let settled = loop {
            match self.enter() {
                Ok(Some(_)) => {}
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.vm.vcpu().set_kvm_immediate_exit(0);
        settled
    }

    fn state(&mut self) -> Result<MachineState, MachineError> {
        let failed = |part: StatePart| move |source| MachineError::GetState { part: part.name(), source };
        let mut msrs = msr_list(&MachineState::default()).map_err(failed(StatePart::Msrs))?;
        let clock = self.vm.vm().get_clock().map_err(failed(StatePart::Clock))?;
        let vcpu = self.vm.vcpu();
        let mut state = MachineState {
            regs: vcpu.get_regs().map_err(failed(StatePart::Regs))?,
            sregs: vcpu.get_sregs().map_err(failed(StatePart::Sregs))?,
            xsave: vcpu.get_xsave().map_err(failed(StatePart::Xsave))?,
            xcrs: vcpu.get_xcrs().map_err(failed(StatePart::Xcrs))?,
            debug_regs: vcpu.get_debug_regs().map_err(failed(StatePart::DebugRegs))?,
            events: vcpu.get_vcpu_events().map_err(failed(StatePart::Events))?,
            mp_state: vcpu.get_mp_state().map_err(failed(StatePart::MpState))?,
            // The flags describe how the time was read and are not restored: the guest's time continues from
            // here.
            clock: kvm_clock_data { clock: clock.clock, ..Default::default() },
            ..Default::default()
        };
        let got = vcpu.get_msrs(&mut msrs).map_err(failed(StatePart::Msrs))?;
        expect_all(got, "read")?;
        for (msr, entry) in state.msrs.iter_mut().zip(msrs.as_slice()) {
            *msr = *entry;
        }
        Ok(state)
    }

    fn restore(&mut self, state: &MachineState) -> Result<(), MachineError> {
        let failed = |part: StatePart| move |source| MachineError::SetState { part: part.name(), source };
        self.vm.vm().set_clock(&state.clock).map_err(failed(StatePart::Clock))?;
        let vcpu = self.vm.vcpu();
        // The system registers first: what the others may be depends on them. XCR0 before the FPU state that
        // it delimits. Events last, since setting registers drops pending exceptions.
        vcpu.set_sregs(&state.sregs).map_err(failed(StatePart::Sregs))?;
        vcpu.set_regs(&state.regs).map_err(failed(StatePart::Regs))?;
        vcpu.set_xcrs(&state.xcrs).map_err(failed(StatePart::Xcrs))?;
        self.vm.set_xsave(&state.xsave).map_err(failed(StatePart::Xsave))?;
        let vcpu = self.vm.vcpu();
        vcpu.set_debug_regs(&state.debug_regs).map_err(failed(StatePart::DebugRegs))?;
        let msrs = msr_list(state).map_err(failed(StatePart::Msrs))?;
        let set = vcpu.set_msrs(&msrs).map_err(failed(StatePart::Msrs))?;
        expect_all(set, "set")?;
        vcpu.set_mp_state(state.mp_state).map_err(failed(StatePart::MpState))?;
        vcpu.set_vcpu_events(&state.events).map_err(failed(StatePart::Events))
    }
}

fn msr_list(state: &MachineState) -> Result<Msrs, kvm_ioctls::Error> {
    Msrs::from_entries(&state.msrs).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

/// KVM stops at the first MSR that it does not know.
fn expect_all(done: usize, verb: &'static str) -> Result<(), MachineError> {
    MSRS.get(done).map_or(Ok(()), |&index| Err(MachineError::Msr { index, verb }))
}

#[cfg(test)]
#[path = "kvm_tests.rs"]
mod tests;
