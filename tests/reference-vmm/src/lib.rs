//! The lab's VMM: a small, real virtual machine monitor that leaves its devices' migration to the node agent.
//!
//! One KVM vCPU, guest RAM in a memfd, any number of VFIO devices opened by cdev and bound to iommufd. Its guest counts, and
//! checks on every count that its RAM and a register of every device still hold what it put there: after a migration the count
//! goes on where it stopped, and `errors` stays 0 only if nothing was lost.
//!
//! | module | what it knows |
//! |---|---|
//! | [`guest`] | the guest's program, where its data lies, and what can be read from it |
//! | [`outside`] | reading the guest's data of a VMM that runs, through `/proc` |
//! | [`ram`] | guest RAM: a memfd, mapped |
//! | [`bus`] | which guest port is which register of which device |
//! | [`devices`] | opening VFIO devices and mapping guest RAM to them |
//! | [`kvm`] | the machine: KVM's VM and its vCPU |
//! | [`vcpu`] | the thread that runs the vCPU, and stops it between two port accesses |
//! | [`machine_state`] | what a vCPU and its clock consist of |
//! | [`saved`] | the format in which a VM travels |
//! | [`lifecycle`] | which call of the contract is legal when |
//! | [`service`] | the contract itself (`slackwater.vmm.v1`) |
//! | [`run`] | the process: from an argument vector to a served socket, and its end |
//!
//! ```text
//!  agent ── Unix socket ──▶ service ── lifecycle (may it?)
//!                             │  │
//!                  requests ──┘  └── saved ◀──▶ ram (memfd)
//!                      ▼                          ▲
//!                   vcpu (thread) ── kvm ── bus ──┼── devices (VFIO)
//!                                     └───────────┘
//! ```
//! Only the vCPU's thread touches a device's registers. There is no interrupt controller: the guest takes no interrupts and the
//! devices' interrupts are not wired.

pub mod bus;
pub mod devices;
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
