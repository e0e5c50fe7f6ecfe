//! The state of a vCPU and its clock: everything of a machine that is neither RAM nor a device.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use strum::VariantArray;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The MSRs that are saved (EFER and the APIC base are part of sregs), by their numbers in Linux'
/// msr-index.h: TSC, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, PAT, STAR, LSTAR, CSTAR, SYSCALL_MASK,
/// KERNEL_GS_BASE.
pub const MSRS: [u32; 10] =
    [0x10, 0x174, 0x175, 0x176, 0x277, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102];

/// One part of a [`MachineState`], with the number by which a saved VM names it. They are saved in this
/// order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum StatePart {
    Regs = 1,
    Sregs = 2,
    Xsave = 3,
    Xcrs = 4,
    DebugRegs = 5,
    Events = 6,
    MpState = 7,
    Msrs = 8,
    Clock = 9,
}

impl StatePart {
    /// Its name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Regs => "registers",
            Self::Sregs => "system registers",
            Self::Xsave => "FPU state",
            Self::Xcrs => "extended control registers",
            Self::DebugRegs => "debug registers",
            Self::Events => "pending events",
            Self::MpState => "run state",
            Self::Msrs => "MSRs",
            Self::Clock => "clock",
        }
    }
}

/// A vCPU between two instructions, and the VM's clock. The default is all zeros, which is not a valid state
/// of a vCPU.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct MachineState {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xsave: kvm_xsave,
    pub xcrs: kvm_xcrs,
    pub debug_regs: kvm_debugregs,
    pub events: kvm_vcpu_events,
    pub mp_state: kvm_mp_state,
    /// In the order of [`MSRS`].
    pub msrs: [kvm_msr_entry; MSRS.len()],
    pub clock: kvm_clock_data,
}

impl Default for MachineState {
    fn default() -> Self {
        Self {
            regs: Default::default(),
            sregs: Default::default(),
            xsave: kvm_xsave::new_zeroed(),
            xcrs: Default::default(),
            debug_regs: Default::default(),
            events: Default::default(),
            mp_state: Default::default(),
            msrs: MSRS.map(|index| kvm_msr_entry { index, ..Default::default() }),
            clock: Default::default(),
        }
    }
}

impl MachineState {
    /// The bytes of one part: the kernel's own structure, whose layout is fixed by its ABI.
    pub fn part(&self, part: StatePart) -> &[u8] {
        match part {
            StatePart::Regs => self.regs.as_bytes(),
            StatePart::Sregs => self.sregs.as_bytes(),
            StatePart::Xsave => self.xsave.as_bytes(),
            StatePart::Xcrs => self.xcrs.as_bytes(),
            StatePart::DebugRegs => self.debug_regs.as_bytes(),
            StatePart::Events => self.events.as_bytes(),
            StatePart::MpState => self.mp_state.as_bytes(),
            StatePart::Msrs => self.msrs.as_bytes(),
            StatePart::Clock => self.clock.as_bytes(),
        }
    }

    /// Sets one part from its bytes. `false` if the length is wrong: nothing has changed then.
    pub fn set_part(&mut self, part: StatePart, bytes: &[u8]) -> bool {
        fn put<T: FromBytes>(field: &mut T, bytes: &[u8]) -> bool {
            T::read_from_bytes(bytes).map(|value| *field = value).is_ok()
        }
        match part {
            StatePart::Regs => put(&mut self.regs, bytes),
            StatePart::Sregs => put(&mut self.sregs, bytes),
            StatePart::Xsave => put(&mut self.xsave, bytes),
            StatePart::Xcrs => put(&mut self.xcrs, bytes),
            StatePart::DebugRegs => put(&mut self.debug_regs, bytes),
            StatePart::Events => put(&mut self.events, bytes),
            StatePart::MpState => put(&mut self.mp_state, bytes),
            StatePart::Msrs => put(&mut self.msrs, bytes),
            StatePart::Clock => put(&mut self.clock, bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_restored_and_no_part_accepts_another_length() {
        let mut from = MachineState::default();
        for (index, &part) in StatePart::VARIANTS.iter().enumerate() {
            let bytes: Vec<u8> = (0..from.part(part).len()).map(|at| (at + index) as u8).collect();
            assert!(from.set_part(part, &bytes), "{part:?}");
            assert_eq!(from.part(part), bytes, "{part:?}");
            assert!(!from.set_part(part, &bytes[1..]), "{part:?}");
        }
        for (index, &part) in StatePart::VARIANTS.iter().enumerate() {
            assert_eq!(from.part(part)[0], index as u8, "{part:?} was overwritten by another part");
        }
    }
}
