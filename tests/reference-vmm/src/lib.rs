//! A reference implementation of the VMM contract `slackwater.vmm.v1`
//! (`proto/proto/slackwater/vmm/v1/vmm.proto`, docs/api.md): a small, real virtual machine monitor that
//! leaves its devices' migration to the node agent. Read it to write your own.
//!
//! One KVM vCPU, guest RAM in a memfd, any number of VFIO devices opened by cdev and bound to iommufd. Its
//! guest counts, and checks on every count that its RAM and a register of every device still hold what it put
//! there: after a migration the count continues where it stopped, and `errors` stays 0 only if nothing was
//! lost. The lab migrates this VM in its tests.
//!
//! # What a VMM of the contract must do
//!
//! | the contract asks | here |
//! |---|---|
//! | serve the calls on a Unix socket for its owner only | [`run`] |
//! | Describe: name each device and its descriptor, which the agent borrows | [`devices`], [`service`] |
//! | issue no migration ioctl: the agent drives the devices | [`devices`] has none |
//! | refuse a call out of order, and change nothing | [`lifecycle`], a pure state machine |
//! | after Pause: no vCPU in KVM_RUN and no access to a device until Resume | [`vcpu`], `settle` in [`kvm`] |
//! | FinishSave: send RAM and the machine's state | [`service`] (`save.rs`), [`saved`] for the format |
//! | AbortSave: keep the VM, which can be resumed or saved again | [`service`] (`save.rs`) |
//! | StartLoad: receive the state, and refuse anything else | [`service`] (`load.rs`), [`saved`] |
//! | FinishLoad: restore the state, without touching the devices | [`service`], `restore` in [`kvm`] |
//! | be the VM: the end of the process is the end of the VM | [`run`] |
//!
//! This VMM has no dirty tracking, so it refuses a live save: RAM is sent after the pause. A VMM with dirty
//! logs switches them on before the first page (StartSave with `live`), and reads them a last time in
//! FinishSave.
//!
//! # Where to start
//!
//! Read [`lifecycle`] for the order of the calls, then [`service`] for what each does, then [`vcpu`] for the
//! pause. The rest is this VMM's own: its guest, its format, its machine.
//!
//! | module | content |
//! |---|---|
//! | [`lifecycle`] | which call of the contract is legal in which state |
//! | [`service`] | the contract itself |
//! | [`vcpu`] | the thread that runs the vCPU, and pauses it between two port accesses |
//! | [`kvm`] | the machine: KVM's VM and its vCPU |
//! | [`machine_state`] | the state of a vCPU and its clock |
//! | [`saved`] | the format of a saved VM |
//! | [`ram`] | guest RAM: a memfd, mapped |
//! | [`devices`] | opening VFIO devices and mapping guest RAM to them |
//! | [`bus`] | which guest port is which register of which device |
//! | [`guest`] | the guest's program, where its data is, and its report |
//! | [`outside`] | reading the report of a running guest through `/proc` |
//! | [`run`] | the process: from its arguments to a served socket, and its end |
//!
//! ```text
//!  agent ── Unix socket ──▶ service ── lifecycle (may it?)
//!                             │  │
//!                  requests ──┘  └── saved ◀──▶ ram (memfd)
//!                      ▼                          ▲
//!                   vcpu (thread) ── kvm ── bus ──┼── devices (VFIO)
//!                                     └───────────┘
//! ```
//! Only the vCPU's thread accesses a device's registers. There is no interrupt controller: the guest takes no
//! interrupts and the devices' interrupts are not connected.

pub mod bus;
pub mod devices;
mod error_text;
pub mod guest;
pub mod kvm;
pub mod lifecycle;
pub mod machine_state;
pub mod outside;
pub mod ram;
pub mod run;
pub mod saved;
pub mod service;
mod sys;
pub mod vcpu;
